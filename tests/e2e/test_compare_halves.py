"""``scripts/compare_halves.py``: an adaptive method against the best fixed one, from a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.bench import save_agreeing_llama, write_prompts
from helpers.scripts import script

from hispec.bench.folder import RunFolder
from hispec.cli import main

#: How much slower the fixed methods are than `auto` in the run, by category.
SLOWER = {"small": {"chat": 3.0, "maths": 1.5}, "large": {"chat": 2.0, "maths": 2.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `auto` and two fixed trees whose times are made up afterwards."""
    folder = tmp_path_factory.mktemp("halves")
    model = save_agreeing_llama(folder / "llama")
    rows = [
        {"id": f"{category}-{n}", "category": category, "prompt": f"Say {n}."}
        for n in range(4)
        for category in ("chat", "maths")
    ]
    prompts = write_prompts(folder / "prompts.jsonl", rows)
    for name, nodes in (("small", 2), ("large", 6)):
        hierarchy = {"levels": [], "sources": {"context": 8}, "nodes": nodes, "adaptive": False}
        (folder / f"{name}.json").write_text(json.dumps(hierarchy))
    methods = f"auto,{folder / 'small.json'},{folder / 'large.json'}"
    command = ["--methods", methods, "--model", str(model), "--prompts", str(prompts)]
    command += ["--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "8", "--repeats", "1"]
    assert main(["bench", *command, "--out", str(folder / "run")]) == 0
    path = folder / "run" / "rows.jsonl"
    made_up = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row["decode_s"] = SLOWER.get(row["method"], {}).get(row["category"], 1.0)
        made_up.append(json.dumps(row) + "\n")
    path.write_text("".join(made_up))
    return folder / "run"


def test_runs_that_did_not_count_rows_have_no_counted_ratio(
    run: Path, tmp_path: Path, cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    rows = [json.loads(line) for line in (old / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        for level in row["levels"]:
            del level["passes_of"]
    (old / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, told, err = compare(old, capsys, "--fixed", "large")
    assert code == 0, err
    assert [line.split()[-1] for line in told.splitlines()[-3:]] == ["-"] * 3
    assert "2.000" in told


def compare(run: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    """Returns the exit code, stdout and stderr."""
    code = script("compare_halves").main([str(run), *options])
    return (code, *capsys.readouterr())


def test_the_fixed_method_is_chosen_on_the_other_half(
    run: Path, tmp_path: Path, cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "told.jsonl"
    code, told, err = compare(run, capsys, "--fixed", "[sl]*", "--out", str(out))
    assert code == 0, err
    assert told.count("chosen on 4 answers, told on 4: large") == 2
    provenance, *records = map(json.loads, out.read_text().splitlines())
    assert provenance["model"] == RunFolder.open(run).provenance["model"]
    assert {x["category"]: x["ratio"] for x in records} == {"all": 2.0, "chat": 2.0, "maths": 2.0}
    assert all(x["counted"] > 0 and x["against"] == ["large"] for x in records)


def test_in_hindsight_all_prompts_choose_and_are_told(
    run: Path, cache_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, told, err = compare(run, capsys, "--hindsight", "--fixed", "small")
    assert code == 0, err
    assert "chosen on 8 answers, told on 8: small" in told
    ratios = {line.split()[0]: float(line.split()[2]) for line in told.splitlines()[2:]}
    assert ratios == {"all": 2.25, "chat": 3.0, "maths": 1.5}


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [(("--against", "hispec"), 1, "lacks hispec"), (("--fixed", "no*"), 1, "to compare it with")],
)
def test_nothing_to_compare(
    run: Path, options: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = compare(run, capsys, *options)
    assert found == code and words in err


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = compare(tmp_path / "none", capsys)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
