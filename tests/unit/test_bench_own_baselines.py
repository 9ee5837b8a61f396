"""Lookahead decoding and AdaDecode: plain decoding's tokens, fewer passes, counts that add up."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.bench import save_agreeing_llama
from helpers.lms import open_lm, plain, save_model
from helpers.scripts import script

from hispec.bench import adadecode, lookahead, roster
from hispec.bench.methods import Engine, Question
from hispec.errors import UsageError
from hispec.generation import LM
from hispec.hierarchy import HD, Hierarchy, Level
from hispec.loading import load
from hispec.model.nodes import MAX_WIDTH
from hispec.tree import Tree

PROMPTS = [
    [7, 3, 9, 11, 250, 31, 7, 3, 9],
    [5],
    [1, 2, 3, 4] * 12,
    [(17 * i) % 313 for i in range(70)],
]
LIMIT = 48


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = save_agreeing_llama(tmp_path_factory.mktemp("agreeing") / "llama")
    loaded = load(folder, dtype="fp32", device="cpu")
    loaded.eos = frozenset()
    return loaded


def method(lm: LM, name: str) -> Engine:
    _, methods = roster.build(lm, [name])
    found = methods[-1]
    assert isinstance(found, Engine) and found.name == name and found.note
    return found


@pytest.mark.parametrize("name", roster.OWN_NAMES)
def test_tokens_are_plain_decodings(lm: LM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = method(lm, name)
    for prompt, limit in itertools.product(PROMPTS, (1, 2, 7, LIMIT)):
        wanted = lm.generate(prompt, hierarchy="ar", max_new_tokens=limit).token_ids
        for threshold in (0.0, 0.02):  # always left at the first exit, and now and then
            monkeypatch.setattr(adadecode.AdaDecoder, "threshold", threshold)
            assert decode(Question(prompt, limit)).token_ids == wanted, (prompt[:9], limit)


@pytest.mark.parametrize("name", roster.OWN_NAMES)
def test_counts_add_up(lm: LM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adadecode.AdaDecoder, "threshold", 0.02)
    decode = method(lm, name)
    for prompt in PROMPTS:
        found = decode(Question(prompt, LIMIT))
        tally = Counter(found.origins)
        assert found.committed == len(found.token_ids) - 1
        assert tally["prefill"] == 1 and tally["target"] == found.passes
        parts = found.sources if name == "lookahead" else found.levels[:-1]
        for part in parts:
            assert tally[part["name"]] == part["accepted"]
            assert part["accepted"] <= part.get("proposed", part.get("drafted"))
        assert sum(part["accepted"] for part in parts) == found.committed - found.passes
        assert found.bytes_read > 0 and found.decode_s > 0


def test_lookahead_yields_more_than_a_token_a_pass_where_text_repeats(lm: LM) -> None:
    decode = method(lm, "lookahead")
    found = [decode(Question(prompt, 120)) for prompt in PROMPTS]
    assert sum(x.committed for x in found) > 1.2 * sum(x.passes for x in found)
    assert any(part["accepted"] for x in found for part in x.sources if part["name"] == "pool")


def test_adadecode_runs_fewer_passes_and_no_layer_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers from the third on add nothing: whatever exits 3 and 4 say stands.
    echo = open_lm(save_model(tmp_path / "echo", "echo"))
    monkeypatch.setattr(adadecode.AdaDecoder, "threshold", 0.0)
    monkeypatch.setattr(roster.adadecode, "exits", lambda lm: Hierarchy((Level(3, 1), Level(4, 1))))
    found = method(echo, "adadecode")(Question(PROMPTS[2], LIMIT))
    assert found.token_ids == plain(echo, PROMPTS[2], LIMIT)
    assert (
        found.passes == 2 and found.committed == LIMIT - 1
    )  # 31 of a pass's 32 rows, and the rest
    assert found.levels[0]["drafted"] == found.levels[0]["accepted"] == LIMIT - 3
    assert found.layer_visits == found.committed * echo.model.config.num_layers
    monkeypatch.setattr(adadecode.AdaDecoder, "threshold", 1.1)  # never sure: plain decoding
    assert method(echo, "adadecode")(Question(PROMPTS[2], 9)).passes == 8


def test_adadecode_leaves_at_every_exit_but_0(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "exits", SimpleNamespace(exit_layers=(0, 2, 4)))
    assert adadecode.exits(lm).exit_layers == (2, 4)
    monkeypatch.setattr(lm, "exits", SimpleNamespace(exit_layers=(0,)))
    with pytest.raises(UsageError, match="at least 1, and this model has exit 0 alone"):
        adadecode.exits(lm)


def test_the_lookahead_branch_is_the_papers_pattern() -> None:
    drafter = lookahead.Lookahead([50, 60], window=3, ngram=4, guesses=2)
    drafter._rows = [[60, 1, 2], [10, 11, 12], [20, 21, 22]]
    tree = Tree(60, 0)
    drafter.grow(tree, 0, 20, MAX_WIDTH - 1, ())
    seen = {tree.tokens[node]: tree.path(node) for node in range(len(tree))}
    assert seen[22] == [1, 2, 12, 22]  # row 0 up to its column, then its column
    assert seen[20] == [10, 20] and seen[21] == [1, 11, 21]
    assert len(tree) == 9  # W (N − 1), the root among them
    picks = [100 + token for token in tree.tokens]
    drafter.saw(picks)
    assert drafter._rows == [[10, 11, 12], [20, 21, 22], [120, 121, 122]]
    assert drafter._pool.after(2) == [(12, 22, 122)] and drafter._pool.after(60) == [(10, 20, 120)]
    drafter.commit([7], ["target"], 9)
    assert drafter._rows[0] == [7, 11, 12]


def test_both_branches_of_the_defaults_fill_a_pass_and_no_more() -> None:
    columns, rows = lookahead.WINDOW, lookahead.NGRAM - 1
    assert (columns + lookahead.GUESSES) * rows == MAX_WIDTH


def test_the_pool_keeps_the_most_recent() -> None:
    pool = lookahead.Pool(2)
    for ngram in ([1, 2], [1, 3], [1, 2], [1, 4]):
        pool.add(ngram)
    assert pool.after(1) == [(4,), (2,)] and pool.after(9) == []


def test_databases_have_their_counts(lm: LM) -> None:
    _, methods = roster.engines(lm, {"hd": HD})
    for prompt in PROMPTS:
        question = Question(prompt, LIMIT)
        outcomes = [methods[-1](question) for _ in range(2)]
        assert outcomes[0].token_ids == methods[0](question).token_ids
        first, again = ({**vars(x)} for x in outcomes)
        for timed in (first, again):  # the second answer has learnt nothing from the first
            for key in ("decode_s", "prefill_s", "levels"):
                del timed[key]
            timed["sources"] = [x | {"time_s": 0} for x in timed["sources"]]
        assert first["passes"] == again["passes"] and first["sources"] == again["sources"]
        tally = Counter(outcomes[0].origins)
        for source in outcomes[0].sources:
            assert tally[source["name"]] == source["accepted"] <= source["proposed"]
        assert outcomes[0].committed == outcomes[0].passes + sum(
            source["accepted"] for source in outcomes[0].sources
        )


def test_ablation_removes_one_part_at_a_time(tmp_path: Path, lm: LM, capsys: Any) -> None:
    ablation = script("ablation_hierarchies")
    sources = (("context", 8), ("recycle", 8), ("history", 0))
    whole = Hierarchy((Level(2, 1, ranks=True), Level(4, 2)), "mine", sources, 8)
    (tmp_path / "mine.json").write_text(json.dumps(whole.to_json()))
    out = tmp_path / "parts"
    assert ablation.main(["--hierarchy", str(tmp_path / "mine.json"), "--out", str(out)]) == 0
    assert {path.stem for path in out.glob("*.json")} == {
        *("whole", "no-context", "no-recycle", "no-sources", "no-branches"),
        *("no-exit2", "no-exit4", "no-ranking", "no-adapting"),
    }
    names = (out / "methods").read_text().strip().split(",")
    _, methods = roster.build(lm, names)  # every file is a hierarchy of its own name
    assert methods[-9].name == "whole"
    assert ablation.main(["--hierarchy", str(tmp_path / "none.json"), "--out", str(out)]) == 2
    assert "cannot read hierarchy" in capsys.readouterr().err
