"""A test may leave compiled code out where the machine is the reason, and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import builds

CLAIMS = {
    "no C compiler (cc or gcc) is installed": "has_compiler",
    "this torch does not use GNU OpenMP": "has_gnu_openmp",
    "the kernel does not grant AMX registers": "kernel_grants_amx",
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("reason", CLAIMS)
def test_an_excuse_holds_where_the_machine_confirms_it(
    reason: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builds, CLAIMS[reason], lambda: there)
    with pytest.raises(pytest.fail.Exception if there else pytest.skip.Exception):
        builds.skip_or_fail(reason)


def test_code_that_does_not_compile_is_no_excuse() -> None:
    with pytest.raises(pytest.fail.Exception):
        builds.skip_or_fail("cc failed: error: expected ';'")


def test_compilers_are_found_where_the_path_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not builds.has_compiler()
    (tmp_path / "gcc").touch(mode=0o755)
    assert builds.has_compiler()


def test_where_no_system_tells_openmp_is_looked_for_in_torch_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: Path) -> str:
        raise FileNotFoundError

    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert not builds.has_gnu_openmp()
    (tmp_path / "lib" / "libgomp.so.1").touch()
    assert builds.has_gnu_openmp()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own list of what is loaded")
def test_openmp_is_seen_where_it_is_loaded_and_only_there() -> None:
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('b', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); before = m.has_gnu_openmp();"
        "import torch; print(before, m.has_gnu_openmp(), 'GNU' if list(__import__('pathlib')"
        ".Path(torch.__file__).parent.glob('lib/libgomp*')) else 'other')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, builds.__file__], capture_output=True, text=True, check=True
    )
    before, after, kind = done.stdout.split()
    assert before == "False", "nobody has loaded it yet"
    assert after == "True" or kind == "other"
