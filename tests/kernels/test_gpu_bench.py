"""How the GPU's benchmark measures: what it calls wrong, warm, idle, and a step's time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.gpu_llama import DEVICE, open_gpu_lm, random_rows, replaying
from helpers.lms import save_model

from hispec import shelf
from hispec.bench import gpu_methods, gpu_shapes
from hispec.bench.gpu_kernels import Trial, measure, tilings
from hispec.bench.gpu_peers import Peers, measure_peer
from hispec.bench.gpu_picks import Picks, step_rows
from hispec.bench.gpu_timing import Spans, poisoned
from hispec.bench.methods import Engine, Outcome, Question
from hispec.bench.roster import engines
from hispec.generation import LM
from hispec.hierarchy import MAX_WIDTH, Hierarchy, Level
from hispec.model.gpu import GpuPasses
from hispec.model.llama import Llama
from hispec.planner.first_prices import LevelCost
from hispec.planner.prices import Growth


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tmp_path_factory.mktemp("bench") / "llama"
    return open_gpu_lm(save_model(folder, "tied mha", num_hidden_layers=2))


def trial_of(write: Callable[[torch.Tensor], None], exact: bool = False) -> Trial:
    """A kernel that allocates what it writes, which should be 0, 1, …, 7."""
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept[:] = [torch.empty(8, device=DEVICE)]
        write(kept[0])

    return Trial(run, lambda: kept[0], lambda: torch.arange(8, device=DEVICE).double(), 8, exact)


def test_what_a_kernel_leaves_out_is_wrong_even_where_it_allocates_it() -> None:
    numbers = torch.arange(8.0, device=DEVICE)

    def judged(trial: Trial) -> Any:
        return measure(lambda: trial, torch.float32, 1.0)

    assert judged(trial_of(lambda out: out.copy_(numbers)))["right"]
    half = judged(trial_of(lambda out: out[:4].copy_(numbers[:4])))
    assert not half["right"] and "ms" not in half
    nearly = numbers * (1 + 1e-6)
    assert judged(trial_of(lambda out: out.copy_(nearly)))["right"]
    assert not judged(trial_of(lambda out: out.copy_(nearly), exact=True))["right"]
    with poisoned():
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.empty(3, dtype=torch.int64, device=DEVICE).min() > 1 << 60
    assert not torch.are_deterministic_algorithms_enabled()


@torch.inference_mode()
def test_a_pass_is_watched_and_its_time_told(fp32: Llama) -> None:
    passes, spans = fp32.narrow, Spans(DEVICE)
    assert isinstance(passes, GpuPasses)
    assert spans.seconds() == 0
    marks = mock.Mock(wraps=spans.mark)
    x = random_rows(1)
    with passes.graphs.watched(marks):
        fp32.logits(fp32.run_layers(x, 0, 3, 0, fp32.new_cache([3]).kv))
    assert marks.call_count == 4, "before and behind the layers, and the head"
    assert spans.seconds() > 0
    fp32.logits(x)
    assert marks.call_count == 4


@torch.inference_mode()
def test_a_steps_kernels_and_the_rest_add_up() -> None:
    config = gpu_shapes.shape("tiny", 200)
    with mock.patch("hispec.bench.gpu_picks.measure") as measured:
        measured.side_effect = lambda *_: {"right": True, "ms": 2.0, "floor_ms": 1.0}
        rows = step_rows(Picks(config, 1, 130, torch.float32, DEVICE), 100.0, 1.0)
    times = {row["op"]: row["times"] for row in rows}
    assert times["attention"] == times["add_rms_norm"] == 3 and times["rms_norm"] == 4
    assert rows[0]["op"] == "rms_norm" and rows[0]["lost_ms"] == 4.0, "the greatest loss first"
    assert rows[-1]["op"] == "all else"
    assert math.isclose(sum(row["ms"] for row in rows), 100.0)
    assert math.isclose(sum(row["share"] for row in rows), 1.0)


class Counted(Engine):
    """A method of ours that answers nothing."""

    name = "ours"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, question: Question) -> Outcome:
        self.asked.append(len(question.ids))
        return Outcome()


def at_once(methods: Any, questions: Any, *_: Any) -> gpu_methods.Warm:
    return gpu_methods.Warm(methods, questions, [])


def test_ours_warm_up_on_every_question_where_graphs_are() -> None:
    questions = [Question([1] * length, 3) for length in (2, 9, 4)]
    for device, wanted in (("cuda", [2, 2, 9, 9, 4, 4]), ("cpu", [9])):
        ours, theirs = Counted(), mock.Mock()
        warm = gpu_methods.warm_up([ours, theirs], questions, torch.device(device))
        assert warm == ([ours, theirs], questions, [])
        assert ours.asked == wanted
        assert [len(call.args[0].ids) for call in theirs.call_args_list] == [9]
    spent = iter((0.3, 0.7))
    warm = gpu_methods.warm_up([ours], questions, torch.device("cuda"), lambda: next(spent))
    assert warm.questions == questions[:2], "when most of the time is over the rest is left out"


def test_a_method_that_cannot_answer_here_is_a_row(lm: LM) -> None:
    _, (plain,) = engines(lm, {})
    theirs = mock.Mock(side_effect=RuntimeError("no compiler\nat all"))
    theirs.name = "hf-static"
    rows = list(gpu_methods.compare(lm, [plain, theirs], [Question([3, 1, 4], 3)]))
    assert [row["method"] for row in rows] == ["ar", "hf-static"] and rows[0]["tokens"] == 2
    assert rows[1] == {"method": "hf-static", "right": None, "why": "no compiler"}
    plain, theirs = mock.Mock(side_effect=ValueError("broken")), plain
    with pytest.raises(ValueError, match="broken"):
        list(gpu_methods.compare(lm, [plain, theirs], [Question([3, 1, 4], 3)]))


def test_no_question_is_asked_when_time_is_over(lm: LM) -> None:
    _, methods = engines(lm, {})
    questions = [Question([3, 1, 4], 3), Question([1, 5], 3), Question([9, 2], 3)]
    spent, peaks = iter((0.5, 1.1)), iter((5 << 30, 3 << 30))
    with mock.patch.object(gpu_methods, "warm_up", at_once):
        rows = gpu_methods.compare(
            lm, methods, questions, memory=lambda: next(peaks), spent=lambda: next(spent)
        )
        assert [(row["prompts"], row["memory_gib"]) for row in rows] == [(2, 5.0)]


def test_measured_passes_become_the_planner_s_table() -> None:
    """Layers of 2 and a head of 5 over one row, of 3 and 6 over the widest pass."""
    few, whole = {1: 9.0, MAX_WIDTH: 12.0}, {1: 29.0, MAX_WIDTH: 42.0}
    costs = gpu_shapes.table_of(few, whole, 2, 3, 12)
    assert costs.plain_s == pytest.approx(29.0)
    assert costs.pass_s("exit 2", 0, 1) == pytest.approx(9.0)
    assert costs.pass_s("target", 3, MAX_WIDTH, lifted=0) == pytest.approx(9 * 3 + 6)
    assert costs.pass_s("target", 3, 1) == pytest.approx(29.0 + 0.0)


@torch.inference_mode()
def test_products_cut_in_other_ways_are_right_too() -> None:
    picks = Picks(gpu_shapes.shape("tiny", 200), 1, 130, torch.float32, DEVICE)
    first, second = itertools.islice(tilings(picks, 1.0), 2)
    assert first["tiling"] != second["tiling"]
    assert first["kernel"] == second["kernel"] and first["right"] and second["right"]


@torch.inference_mode()
@pytest.mark.parametrize("width", [1, 3])
def test_others_kernels_are_held_against_the_references(width: int) -> None:
    peers = Peers(gpu_shapes.shape("tiny", 200), width, 130, torch.float32, DEVICE)
    rows = {name: measure_peer(make, torch.float32, 1.0) for name, make in peers.all()}
    assert all(row["right"] for name, row in rows.items() if "liger" not in name)

    def fails() -> Trial:
        raise RuntimeError("not for this device\nreally")

    row = measure_peer(fails, torch.float32, 1.0)
    assert row == {"error": None, "right": None, "why": "not for this device"}


def test_what_is_captured_under_the_clock_is_counted(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = lm.model.narrow
    assert isinstance(passes, GpuPasses)
    _, methods = engines(lm, {})
    questions = [Question(list(range(3, 9)), 4)]
    monkeypatch.setattr(gpu_methods, "WATCHED", 0)
    with mock.patch.object(passes.graphs, "on", True), replaying():
        with mock.patch.object(gpu_methods, "warm_up", at_once):
            (cold,) = gpu_methods.compare(lm, methods, questions)
        (warm,) = gpu_methods.compare(lm, methods, questions)
    passes._of_heads.clear()
    assert cold["captures"] == 1, "layers and head are one"
    assert warm["captures"] == 0


def test_plain_decoding_is_compared_with_what_is_not_exact(lm: LM) -> None:
    work, methods = engines(lm, {"layerskip": Hierarchy((Level(1, 2),))})
    methods[1:1] = gpu_methods.plain_on_fast(work)
    cleared: list[str] = []
    questions = [Question([3, 1, 4, 1, 5], 3)]
    rows = list(gpu_methods.compare(lm, methods, questions, lambda: cleared.append("once")))
    assert [row["method"] for row in rows] == [
        "ar",
        "ar on torch.mm",
        "ar on torch.mm, our gate",
        "layerskip",
    ]
    assert len(cleared) == 4, "the peak of memory is each method's own"
    assert rows[0]["speedup"] == 1 and rows[0]["passes"] == 2
    for row in rows:
        assert row["prompts"] == 1 and row["tokens"] == 2
        assert row["exact"] == (row["method"] in ("ar", "layerskip"))
        assert row["differ"] == 0, "in fp32 no two logits are as near as rounding"
        assert 0 < row["host"] < 1 and 0 < row["idle"] < 1


def test_databases_and_what_adapts_are_compared_like_any_other(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter's times say nothing, and take a minute to measure.
    monkeypatch.setattr(shelf, "pass_costs", lambda model, **_: [0.0] + [1.0] * MAX_WIDTH)
    monkeypatch.setattr(shelf, "context_growth", lambda model, **_: Growth(256))
    monkeypatch.setattr(shelf, "level_cost", lambda *_, **__: LevelCost(0.05, 0.0))
    _, methods = engines(lm, {name: lm.hierarchy(name) for name in ("hd", "auto")})
    questions = [Question([3, 1, 4, 3, 1], 4)]
    rows = list(gpu_methods.compare(lm, methods, questions))
    assert [row["method"] for row in rows] == ["ar", "hd", "auto"]
    for row in rows:
        assert row["differ"] == 0 and row["tokens"] == 3 and 0 < row["passes"] <= 3
        assert 0 < row["host"] < 1 and 0 < row["idle"] < 1
