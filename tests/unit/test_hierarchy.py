"""Hierarchies: presets, JSON in and out, and one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.lms import chain

from hispec.errors import UsageError
from hispec.hierarchy import (
    MAX_WIDTH,
    PRESETS,
    SOURCES,
    Hierarchy,
    Level,
    eighth_and_quarter,
    preset,
)
from hispec.model import nodes


def refusal(function, *args) -> str:
    with pytest.raises(UsageError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("."), message
    return message


@pytest.mark.parametrize(
    ("num_layers", "exits"),
    [
        (30, (4, 8)),
        (32, (4, 8)),
        (16, (2, 4)),
        (22, (3, 6)),
        (80, (10, 20)),
        (4, (1, 2)),
        (3, (1, 2)),
        (2, (0, 1)),
        (1, (0, 0)),
    ],
)
def test_an_eighth_and_a_quarter_rounded_half_up(num_layers: int, exits: tuple[int, int]) -> None:
    assert eighth_and_quarter(num_layers) == exits


@pytest.mark.parametrize("num_layers", range(1, 130))
def test_every_model_has_the_exits_of_the_presets(num_layers: int) -> None:
    draft, check = eighth_and_quarter(num_layers)
    assert 0 <= draft < check < num_layers or (draft, check, num_layers) == (0, 0, 1)
    for name in PRESETS:
        preset(name, num_layers)


def test_presets() -> None:
    assert preset("ar", 30).levels == ()
    assert preset("layerskip-paper", 30) == Hierarchy((Level(8, 6),), "layerskip-paper")
    assert preset("hispec-paper", 30) == Hierarchy((Level(4, 2), Level(8, 4)), "hispec-paper")
    assert preset("layerskip", 30) == Hierarchy((Level(8, 6),), "layerskip")
    assert preset("hispec", 30) == Hierarchy((Level(4, 2), Level(8, 4)), "hispec")
    assert preset("auto", 30) == preset("hd", 30)
    assert [source for source, _ in preset("hd", 30).sources] == list(SOURCES)
    for name in PRESETS:
        preset(name, 6).check(6)


def test_presets_take_what_was_measured_best() -> None:
    best = {"hispec": chain((3, 1), (9, 5)), "auto": Hierarchy((Level(3, 7),), "exit 3")}
    assert preset("hispec", 30, best) == Hierarchy(best["hispec"].levels, "hispec")
    assert preset("auto", 30, best) == best["auto"]
    assert preset("hispec-paper", 30, best).levels == (Level(4, 2), Level(8, 4))
    assert "got 9" in refusal(preset, "hispec", 9, best)


def test_an_unknown_preset_names_the_nearest() -> None:
    message = refusal(preset, "layerskp", 30)
    assert "'layerskp'" in message
    assert "Did you mean 'layerskip'?" in message
    assert "Known: ar, layerskip, hispec, hd, auto" in message


@pytest.mark.parametrize(
    "hierarchy",
    [
        Hierarchy((), "mine"),
        Hierarchy((Level(4, 2),), "mine"),
        Hierarchy((Level(4, 2), Level(8, 4, ranks=True), Level(20, 1)), "mine"),
        Hierarchy((Level(0, 3, model="org/small"), Level(4, 2)), "mine"),
        Hierarchy((Level(0, 3, ranks=True, model="small"),), "mine", (("context", 4),), 7),
        Hierarchy((), "mine", (("context", 4), ("recycle", 0)), 7),
        Hierarchy((Level(4, 2, ranks=True),), "mine", (("history", 31),), 29, branches=False),
        Hierarchy((Level(4, 2, adaptive=True),), "mine", adaptive=False),
        Hierarchy((), "mine", (("context", 4),), 7, adaptive=False),
    ],
)
def test_json_and_back(hierarchy: Hierarchy) -> None:
    document = json.loads(json.dumps(hierarchy.to_json()))
    assert Hierarchy.from_json(document) == hierarchy


def test_a_file_without_a_name_is_called_after_it(tmp_path: Path) -> None:
    path = tmp_path / "fast.json"
    path.write_text('{"levels": [{"exit_layer": 4, "window": 2}]}')
    assert Hierarchy.load(path) == Hierarchy((Level(4, 2),), "fast")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "a hierarchy is a JSON object such as"),
        ("{}", "a hierarchy is a JSON object such as"),
        ('{"levels": 3}', "a hierarchy is a JSON object such as"),
        ('{"levels": [4]}', "a level is an object, got 4"),
        ('{"levels": [{"exit_layer": 4}]}', "lacks window"),
        ('{"levels": [{"window": 4}]}', "lacks exit_layer"),
        ('{"levels": [{"exit_layer": 4, "window": 2, "widow": 1}]}', "has widow"),
        (
            '{"levels": [{"exit_layer": "4", "window": 2}]}',
            "exit_layer must be a whole number, got '4'",
        ),
        (
            '{"levels": [{"exit_layer": 4, "window": 2.0}]}',
            "window must be a whole number, got 2.0",
        ),
        ('{"levels": [{"exit_layer": true, "window": 2}]}', "must be a whole number, got True"),
        (
            '{"levels": [{"exit_layer": 4, "window": 2, "ranks": 1}]}',
            "must be true or false, got 1",
        ),
        ('{"levels": [{"model": "small"}]}', "lacks window"),
        ('{"levels": [{"model": "small", "exit_layer": 4, "window": 2}]}', "has exit_layer"),
        ('{"levels": [{"model": 4, "window": 2}]}', "model must be a text, got 4"),
        ('{"levels": [{"model": "", "window": 2}]}', "model must name a folder or a hub id"),
        (
            '{"levels": [{"exit_layer": 4, "window": 2}, {"model": "a/small", "window": 2}]}',
            "so it stands below them: put model small first",
        ),
        (
            '{"levels": [{"model": "a/x", "window": 2}, {"model": "b/x/", "window": 2}]}',
            "two levels are called model x",
        ),
        ('{"levels": [{"model": "a/x", "window": 0}]}', "got 0 at model x"),
        ('{"levels": [], "level": 3}', "has level"),
        ('{"levels": [], "name": 3}', "name must be a text, got 3"),
        ('{"levels": [], "sources": ["context"]}', "sources must be an object"),
        ('{"levels": [], "sources": {"contxt": 3}}', "Did you mean 'context'?"),
        ('{"levels": [], "sources": {"context": "3"}}', "budget of context must be a whole number"),
        ('{"levels": [], "sources": {"context": 32}}', "context must be in [0, 31], got 32"),
        ('{"levels": [], "sources": {"context": 3}, "nodes": 32}', "nodes must be in [0, 31]"),
        (
            '{"levels": [{"exit_layer": 4, "window": 9}], "sources": {"context": 3}, "nodes": 23}',
            "nodes must be in [0, 22], what the windows leave of a pass of 32 rows; got 23",
        ),
        (
            '{"levels": [{"exit_layer": 4, "window": 0}]}',
            "window must be at least 1, got 0 at exit 4",
        ),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    message = refusal(Hierarchy.load, path)
    assert words in message
    assert str(path) in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refusal(Hierarchy.load, tmp_path / "none.json")
    assert "Is a directory" in refusal(Hierarchy.load, tmp_path)
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "is not JSON" in refusal(Hierarchy.load, tmp_path / "bytes.json")


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        (((4, 0),), "window must be at least 1, got 0 at exit 4"),
        (((4, -2),), "got -2 at exit 4"),
        (((4, 2), (4, 2)), "exit_layer 4 is given twice"),
        (((8, 2), (4, 2)), "must ascend, got 8, 4. Write 4, 8"),
        (((4, 16), (8, 16)), "add up to 32 tokens; a pass takes at most 31"),
    ],
)
def test_hierarchies_that_make_no_sense(levels, words: str) -> None:
    assert words in refusal(chain, *levels)


@pytest.mark.parametrize(
    ("exit_layer", "words"),
    [
        (30, "must be in [0, 29] for this 30-layer model, got 30. Use 29 or drop the level"),
        (99, "got 99"),
        (-1, "got -1. Use 0 or more"),
    ],
)
def test_exits_the_model_does_not_have(exit_layer: int, words: str) -> None:
    assert words in refusal(chain((exit_layer, 2)).check, 30)


def test_the_widest_hierarchy_fits_a_pass() -> None:
    assert MAX_WIDTH == nodes.MAX_WIDTH
    chain((1, MAX_WIDTH - 1)).check(2)


def test_how_a_hierarchy_reads() -> None:
    assert str(preset("ar", 30)) == "ar: plain decoding"
    assert str(preset("hd", 30)).startswith("hd: context + history + corpus + recycle (")
    mixed = Hierarchy((Level(4, 2),), "mine", (("context", 4), ("recycle", 0)), 7, branches=False)
    assert str(mixed) == "mine: context (7 tokens in a chain) → exit 4 (window 2) → target"
    assert str(preset("hispec", 30)) == "hispec: exit 4 (window 2) → exit 8 (window 4) → target"
    fixed = Hierarchy((), "fixed", (("context", 4),), 7, adaptive=False)
    assert str(fixed) == "fixed: context (always 7 nodes) → target"


def test_models_below_a_hierarchy() -> None:
    below = preset("hispec", 30).over(["a/small", "b/large/"])
    assert below.name == "hispec+small+large"
    assert [level.name for level in below.levels] == [
        "model small", "model large", "exit 4", "exit 8"
    ]  # fmt: skip
    assert below.exit_layers == (4, 8)
    assert [level.model for level in below.models] == ["a/small", "b/large/"]
    assert not any(level.ranks for level in below.models)
    assert preset("hd", 30).over(["a/small"]).levels[0].ranks, "it must not veto databases"
    assert preset("hd", 30).over([]) == preset("hd", 30)
    assert "model small (window 4) → model large (window 4) → exit 4" in str(below)
    below.check(30)
    assert "two levels are called model small" in refusal(below.over, ["c/small"])


def test_a_tree_makes_room_for_models_below_it() -> None:
    full = Hierarchy((), "tree", (("context", 12),), MAX_WIDTH - 1)
    both = full.over(["a", "b"])
    assert [level.model for level in both.levels] == ["a", "b"]
    assert both.nodes + sum(level.window for level in both.levels) == MAX_WIDTH - 1
