"""Trained heads on the GPU's passes: they draft as on torch's, and no token changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.gpu_llama import open_gpu_lm
from helpers.lms import HEAD_KINDS, chain, open_lm, save_exits, save_model

from hispec import shelf
from hispec.generation import LM
from hispec.hierarchy import MAX_WIDTH, Hierarchy, Level
from hispec.model.checkpoint import open_checkpoint
from hispec.model.exits import Exits
from hispec.planner.first_prices import LevelCost
from hispec.planner.prices import Growth
from hispec.result import Result

PROMPT, COUNT = list(range(3, 12)), 6
RANKING = Hierarchy((Level(0, 1, ranks=True), Level(2, 1, ranks=True)), "ranking")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("heads") / "llama", "tied mha")


@pytest.fixture(scope="module")
def exits(folder: Path) -> Exits:
    kinds = {0: HEAD_KINDS["deep"], 2: HEAD_KINDS["deep reduced"]}
    return save_exits(folder.with_name("exits"), open_checkpoint(folder), kinds)


@pytest.fixture(scope="module")
def lm(folder: Path, exits: Exits) -> LM:
    return open_gpu_lm(folder, exits)


def answer(lm: LM, hierarchy: Hierarchy) -> Result:
    return lm.generate(PROMPT, hierarchy=hierarchy, max_new_tokens=COUNT, learn=False)


@pytest.mark.parametrize("hierarchy", [chain((0, 2), (2, 3)), RANKING], ids=["strict", "ranking"])
def test_they_draft_as_on_torchs_passes(
    lm: LM, folder: Path, exits: Exits, hierarchy: Hierarchy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter's times say nothing, and take a minute to measure.
    monkeypatch.setattr(shelf, "pass_costs", lambda model, **_: [0.0] + [1.0] * MAX_WIDTH)
    monkeypatch.setattr(shelf, "context_growth", lambda model, **_: Growth(256))
    monkeypatch.setattr(shelf, "level_cost", lambda *_, **__: LevelCost(0.05, 0.0))
    wanted = answer(open_lm(folder, exits=exits), chain())
    ours, theirs = answer(lm, hierarchy), answer(open_lm(folder, exits=exits), hierarchy)
    assert ours.token_ids == theirs.token_ids == wanted.token_ids
    counts = [[(x.name, x.passes) for x in result.levels] for result in (ours, theirs)]
    assert counts[0] == counts[1]
    assert ours.passes < COUNT - 1, "drafts of theirs stood"
