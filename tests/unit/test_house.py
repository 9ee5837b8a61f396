"""The packaging: what an import costs, what is declared, what the scripts promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hispec
from hispec.errors import CheckpointError, HispecError, UsageError

ROOT = Path(__file__).parents[2]
#: What results are kept in.
RESULTS = {".json", ".jsonl", ".md", ".txt"}
#: A path from the root that is somebody's own.
FOLDER = re.compile(r'[\s"=:]/(?:root|home|work|Users|tmp|mnt)/[^\s",]*')


def run(*command: str, **kwargs) -> subprocess.CompletedProcess[str]:
    kwargs.setdefault("timeout", 60)
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


def test_import_is_free_and_silent(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import hispec; hispec.CheckpointError;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}];"
    done = run(sys.executable, "-c", paths + code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "hispec" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "tokenizers", "huggingface_hub"}
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_public_names_are_listed_and_unknown_ones_refused() -> None:
    assert {"load", "generate", "stream", "open_checkpoint", "HispecError"} <= set(dir(hispec))
    assert hispec.HispecError is HispecError
    with pytest.raises(AttributeError, match="no attribute 'genrate'"):
        _ = hispec.genrate


def test_modules_need_no_import_of_their_own() -> None:
    assert "hf" in dir(hispec) and "hf" in hispec.__all__
    # asked for by hand, as another test may have imported the module already
    assert hispec.__getattr__("hf").generate_with is hispec.generate_with


def test_exit_codes() -> None:
    assert (HispecError.exit_code, CheckpointError.exit_code, UsageError.exit_code) == (1, 1, 2)
    assert issubclass(UsageError, ValueError)  # so that callers of the API can catch it as one


def test_one_version_everywhere() -> None:
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert declared and declared[1] == hispec.__version__


def test_constraints_satisfy_the_declared_ranges() -> None:
    from packaging.requirements import Requirement

    tomllib = pytest.importorskip("tomllib", reason="in the standard library from Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"{line} is no pin"
            pins[pin.name.lower().replace("_", "-")] = specifier.version
    extras = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for extra in ("train", "bench", "lm-eval", "dev"):
        wanted += [x for x in extras[extra] if not x.startswith("hispec[")]
    for requirement in map(Requirement, wanted):
        assert pins[requirement.name] in requirement.specifier, (
            f"{requirement} is not what is pinned"
        )


def test_scripts_are_valid_and_executable() -> None:
    scripts = [*ROOT.glob("scripts/*.sh"), ROOT / ".ci" / "run"]
    assert {path.name for path in scripts} >= {"demo.sh", "test.sh", "_env.sh", "run"}
    for path in scripts:
        done = run("bash", "-n", str(path))
        assert done.returncode == 0, done.stderr
        assert path.stat().st_mode & 0o100, f"{path.name} is not executable"


@pytest.mark.parametrize("script", ["demo.sh", "test.sh"])
def test_missing_python_is_one_sentence(script: str, tmp_path: Path) -> None:
    import shutil

    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "uname", "sed", "cat", "mkdir", "cksum"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    environment = {"PATH": str(tools), "HISPEC_VENV": str(tmp_path / "venv")}
    done = run("bash", str(ROOT / "scripts" / script), env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Python 3.10 or newer is missing" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_results_name_no_folder_of_the_machine_they_come_from() -> None:
    texts = [x for x in (ROOT / "scripts/results").rglob("*") if x.suffix in RESULTS]
    assert len(texts) > 50
    found = [(x, match[0]) for x in texts for match in FOLDER.finditer(x.read_text())]
    assert not found
