"""A plan's file: a hierarchy, what it was made for, and when it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.lms import HEAD_KINDS, open_lm, save_exits, save_model

from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import Hierarchy, Level
from hispec.loading import load
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import Exits
from hispec.model.measured import cpu_name
from hispec.planner.plan import Plan, made_for, open_plan, saved_path

PLANNED = Hierarchy((Level(2, 3),), "2x3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("planned") / "llama", "gqa")


@pytest.fixture
def lm(folder: Path, cache_home: Path) -> LM:
    return open_lm(folder)


def planned(lm: LM, path: Path, **changes: object) -> Path:
    Plan(PLANNED, {"made_for": {**made_for(lm, PLANNED), **changes}, "chosen": "2x3"}).save(path)
    return path


def test_a_plan_is_a_hierarchy_file(lm: LM, tmp_path: Path) -> None:
    path = planned(lm, tmp_path / "plans" / "plan.json")
    assert Hierarchy.load(path) == PLANNED
    plan = Plan.load(path)
    assert plan.hierarchy == PLANNED and plan.record["chosen"] == "2x3"
    assert plan.misfit(lm) == ""
    assert lm.hierarchy(str(path)) == PLANNED
    assert lm.generate([1, 2, 3], hierarchy=str(path), max_new_tokens=4).hierarchy == PLANNED


def test_processors_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    first = "processor\t: 0\nmodel name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: {}\n"
    said = f"{first}\nprocessor\t: 1\n"
    names = []
    for model in (1, 17):
        monkeypatch.setattr(Path, "read_text", lambda _, model=model: said.format(model))
        names.append(cpu_name.__wrapped__())
    assert names == ["AMD EPYC (family 25, model 1)", "AMD EPYC (family 25, model 17)"]


def test_a_hierarchy_of_one_s_own_fits_anywhere(lm: LM, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(PLANNED.to_json()))
    assert open_plan(path, lm) == PLANNED


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "abc"}, "the model's weights (abc, here "),
        ({"exits": "abc"}, "the exits (abc, here none)"),
        ({"machine": "a computer"}, "the machine (a computer, here "),
        ({"dtype": "fp16"}, "the dtype (fp16, here fp32)"),
        ({"passes": "magic"}, "the kind of passes (magic, here "),
        ({"threads": 99}, "the number of threads (99, here "),
        ({"dtype": "fp16", "threads": 99}, "the dtype (fp16, here fp32), the number of threads"),
    ],
)
def test_a_plan_for_something_else_says_what(lm, tmp_path, changes, words: str) -> None:
    path = planned(lm, tmp_path / "plan.json", **changes)
    with pytest.raises(UsageError) as refused:
        lm.hierarchy(str(path))
    message = str(refused.value)
    assert words in message and str(path) in message
    assert "hispec plan" in message and "--force-plan" in message
    assert open_plan(path, lm, force=True) == PLANNED


def test_auto_is_the_saved_plan(lm: LM, folder: Path) -> None:
    assert lm.hierarchy("auto").name != "2x3"
    planned(lm, saved_path(lm))
    again = open_lm(folder)
    assert again.hierarchy("auto") == PLANNED
    assert again.hierarchy("hd").name == "hd", "only auto is planned"


def test_auto_ignores_a_plan_that_does_not_fit_and_says_so_once(
    lm: LM, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(lm, saved_path(lm), threads=99)
    other = open_lm(folder)
    assert other.hierarchy("auto") == other.hierarchy("auto") != PLANNED
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "the number of threads (99, here" in said and "It is ignored" in said
    forced = load(folder, dtype="fp32", device="cpu", force_plan=True)
    assert forced.hierarchy("auto") == PLANNED


@pytest.mark.parametrize(
    "text", ["{", '{"levels": 3}', '{"levels": [{"exit_layer": 99, "window": 1}]}']
)
def test_a_damaged_saved_plan_is_no_obstacle(lm: LM, text: str, capsys) -> None:
    saved_path(lm).parent.mkdir(parents=True)
    saved_path(lm).write_text(text)
    assert lm.hierarchy("auto").name == "hd"
    assert "It is ignored" in capsys.readouterr().err


def test_a_saved_plan_whose_separate_model_is_gone_or_another_is_no_obstacle(
    lm: LM, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = save_model(tmp_path / "draft", "gqa")
    below = Hierarchy((Level(0, 2, model=str(draft)),), "below")
    Plan(below, {"made_for": made_for(lm, below)}).save(saved_path(lm))
    assert open_lm(folder).hierarchy("auto") == below
    shutil.rmtree(draft)
    save_model(draft, "biases")
    assert open_lm(folder).hierarchy("auto").name == "hd"
    assert "the separate models (" in capsys.readouterr().err
    shutil.rmtree(draft)
    assert open_lm(folder).hierarchy("auto").name == "hd"
    said = capsys.readouterr().err
    assert str(draft) in said and "It is ignored" in said


def test_every_dtype_has_a_plan_of_its_own(lm: LM, folder: Path) -> None:
    planned(lm, saved_path(lm))
    other = load(folder, dtype="bf16", device="cpu")
    assert other.hierarchy("auto").name == "hd"
    planned(other, saved_path(other))
    assert open_lm(folder).hierarchy("auto") == PLANNED


def test_exits_are_told_apart(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    first, second = (
        save_exits(tmp_path / name, checkpoint, {2: HEAD_KINDS[kind]})
        for name, kind in (("a", "norm"), ("b", "affine reduced"))
    )
    assert first.fingerprint != second.fingerprint
    weights = tmp_path / "a" / "exit_2.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert Exits.open(tmp_path / "a").fingerprint != first.fingerprint
    assert len(first.fingerprint) == 16
