"""What a plan is made of: the model answers some prompts, and the answers are looked at.

Answers are plain decoding's whatever drafts, so they are made with databases. From them come how
often exits stand (:mod:`hispec.planner.shadow`), what any hierarchy would have done with these
texts (:mod:`hispec.planner.replay`), and what the engine and the databases take besides passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hispec.errors import UsageError
from hispec.hierarchy import AR, HD, MAX_WIDTH, Hierarchy, Level
from hispec.planner.acceptance import Acceptance
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.costs import cost_table
from hispec.planner.replay import Replayed, replay
from hispec.planner.shadow import Shadow

if TYPE_CHECKING:
    from hispec.generation import LM
    from hispec.result import Result

#: Contexts are measured in steps of so many positions.
CONTEXT_STEP = 128
#: Tokens of plain decoding that tell what passes take in earnest, and the engine besides.
PLAIN_TOKENS = 32
#: Tokens of plain decoding beside each answer, and the most that its passes may correct.
BESIDE, MOST_DEARER = 16, 3.0
#: Tokens of the prompt that tells what a separate model takes to read one.
PROMPT_TOKENS = 256
#: The most that the engine's own work may be of a pass.
MOST_OWN_WORK = 0.2
#: Half the width of an interval of acceptance from which on more answers are asked for.
TOO_WIDE = 0.05
#: Scatter of the passes' times from which on the machine is said to be busy.
TOO_NOISY = 0.2


@dataclass
class Calibration:
    """Costs, acceptance and texts of one model on one machine.

    Attributes:
        costs: of every pass.
        acceptance: of every edge between levels and target.
        shadows: the answers.
        roots: rounds that acceptance was counted over.
        recycled: what the databases' passes yield over what their replay does: in earnest they
            learn from rejected drafts too.
    """

    costs: CostTable
    acceptance: Acceptance
    shadows: Sequence[Shadow]
    roots: int
    recycled: float = 1.0

    def replay(self, lm: LM, hierarchy: Hierarchy) -> Replayed:
        """Returns what a hierarchy would have done with the answers."""
        done = replay(lm, hierarchy, self.shadows, self.costs, self.acceptance)
        if hierarchy.nodes and dict(hierarchy.sources).get("recycle"):
            done.seconds /= self.recycled
            done.parts = {name: part / self.recycled for name, part in done.parts.items()}
            done.passes = {name: count / self.recycled for name, count in done.passes.items()}
        return done

    def doubts(self) -> list[str]:
        """Returns a sentence for each thing that is known too badly to plan by."""
        found, wide = [], self.acceptance.widest()
        if self.acceptance.counts and wide > TOO_WIDE:
            found.append(
                f"Acceptance is known to ±{wide:.2f} only, from {self.roots} rounds: about "
                f"{self.roots * (wide / TOO_WIDE) ** 2:.0f} make it ±{TOO_WIDE}. Give more prompts "
                f"or more --max-new-tokens."
            )
        if self.costs.spread > TOO_NOISY:
            found.append(
                f"The times of passes scatter by {self.costs.spread:.0%} on this machine just now, "
                f"and forecasts with them. Plan again when it has nothing else to do."
            )
        return found


def calibrate(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    exits: Sequence[int],
    max_new_tokens: int,
    tell: Callable[[str], None] = lambda _: None,
    models: Sequence[str] = (),
) -> Calibration:
    """Returns what the planner needs to know of a model.

    Args:
        lm: the model.
        prompts: ids.
        exits: layers to look at, ascending.
        max_new_tokens: of every answer.
        tell: called with what is done next, once a prompt and once before.
        models: separate ones to look at, as ``--model`` takes them.

    Raises:
        UsageError: no answer has two tokens.
    """
    tell("costs of passes")
    context = sum(len(ids) for ids in prompts) // max(len(prompts), 1) + max_new_tokens // 2
    context = max(CONTEXT_STEP, round(context / CONTEXT_STEP) * CONTEXT_STEP)
    heads = {exit_layer: lm.head(exit_layer) for exit_layer in exits}
    label = lm.exits.fingerprint if lm.exits else "own"
    costs = cost_table(lm.model, heads, context, label, anew=True)
    lm.reprice(exits, models)
    usual = min(prompts, key=lambda ids: abs(len(ids) - context))
    plain = plainly(lm, usual)
    costs = replace(
        costs,
        models_s=models_cost(lm, models, context),
        prompt_s={**costs.prompt_s, **prompt_cost(lm, models)},
    )
    acceptance = Acceptance()
    shadows: list[Shadow] = []
    answers: list[Result] = []
    beside: list[Result] = []
    for number, ids in enumerate(prompts, 1):
        tell(f"answer {number} of {len(prompts)}")
        answer = lm.generate(ids, hierarchy=HD, max_new_tokens=max_new_tokens, learn=False)
        if answer.num_tokens > 1:
            answers.append(answer)
            beside.append(lm.generate(ids, hierarchy=AR, max_new_tokens=BESIDE, learn=False))
            shadows.append(Shadow(lm, exits, ids, answer.token_ids, models))
    if not shadows:
        raise UsageError("the model answers none of these prompts with two tokens. Give others.")
    passes = sum(answer.passes for answer in answers)
    ask_s = sum(map(_besides, answers)) / passes - _besides(plain) / max(plain.passes, 1)
    costs = costs.dearer(rows_dearer(costs, answers, beside))
    costs = replace(fitted(costs, plain), ask_s=max(ask_s, 0.0))
    roots = sum(shadow.count(acceptance) for shadow in shadows)
    found = Calibration(costs, acceptance, shadows, roots)
    yielded = sum(answer.committed for answer in answers) / passes
    found.recycled = yielded / found.replay(lm, HD).tokens_per_pass
    return found


def timed(lm: LM) -> CostTable:
    """Returns what passes of a model and its exits take in earnest here, measured now."""
    exits = lm.exits.exit_layers if lm.exits else ()
    label = lm.exits.fingerprint if lm.exits else "own"
    costs = cost_table(lm.model, {e: lm.head(e) for e in exits}, label=label, anew=True)
    room = lm.model.config.max_positions - PLAIN_TOKENS - 1
    return fitted(costs, plainly(lm, [0] * max(min(costs.context, room), 1)))


def models_cost(lm: LM, models: Sequence[str], context: int) -> dict[str, list[float]]:
    """Returns seconds of a whole pass of each separate model by rows, by its level's name."""
    found = {}
    for model in models:
        own = cost_table(lm.separate(model).model, {}, context, anew=True)
        rows = [own.pass_s(TARGET, 0, width) for width in range(1, MAX_WIDTH + 1)]
        found[Level(0, 1, model=model).name] = [0.0, *rows]
    return found


def prompt_cost(lm: LM, models: Sequence[str]) -> dict[str, float]:
    """Returns seconds a token of a prompt takes each separate model, by its level's name."""
    found = {}
    for model in models:
        own = lm.separate(model).model
        length = min(PROMPT_TOKENS, own.config.max_positions)
        times = []
        with torch.inference_mode():
            cache = own.new_cache([own.config.num_layers])
            for _ in range(3):
                cache.truncate(0)
                started = time.perf_counter()
                own.prefill(cache, [0] * length)
                float(cache.states[own.config.num_layers][0, 0])  # sync: the prompt is read
                times.append(time.perf_counter() - started)
        found[Level(0, 1, model=model).name] = min(times) / length
    return found


def plainly(lm: LM, prompt: Sequence[int]) -> Result:
    """Returns the faster of two short runs of plain decoding: the first may compile and capture."""
    runs = [
        lm.generate(prompt, hierarchy=AR, max_new_tokens=PLAIN_TOKENS, learn=False) for _ in "ab"
    ]
    return min(runs, key=lambda run: run.decode_s / max(run.passes, 1))


def fitted(costs: CostTable, plain: Result) -> CostTable:
    """Returns costs as plain decoding proves them.

    Passes in earnest take longer than passes alone, in proportion to what they read. That is a
    factor to all of them; were it the engine's own work, every step of a shallow exit would be
    charged with what befell thirty layers.

    Args:
        costs: of passes alone.
        plain: of plain decoding.
    """
    if not plain.passes:
        return costs
    bare = costs.plain_s - costs.step_s
    slower = sum(level.time_s for level in plain.levels) / plain.passes / bare
    own = _besides(plain) / plain.passes
    # More than that is a machine that did something else just then.
    return replace(costs.times(slower), step_s=min(own, MOST_OWN_WORK * bare * slower))


def rows_dearer(costs: CostTable, answers: Sequence[Result], beside: Sequence[Result]) -> float:
    """Returns by what factor rows have proved dearer in some answers than the table says.

    A neighbour who takes the memory's bandwidth makes rows cheaper beside the weights, and the
    table knows one half minute. Answers take longer, and plain decoding of each prompt beside them
    tells what a pass over one row took just then.

    Args:
        costs: of passes.
        answers: whose passes ran over several rows.
        beside: plain decoding of the same prompts, right behind each.
    """
    relative = costs.relative()
    taken = expected = 0.0
    for answer, plain in zip(answers, beside, strict=True):
        if not plain.passes:
            continue
        one = plain.levels[-1].time_s / plain.passes
        target = answer.levels[-1]
        taken += target.time_s / one - target.passes
        expected += sum(n * (relative[w] - 1) for w, n in enumerate(target.passes_of) if w)
    return min(max(taken / expected, 1 / MOST_DEARER), MOST_DEARER) if expected > 0 else 1.0


def _besides(result: Result) -> float:
    """Seconds of decoding that no pass took."""
    return max(result.decode_s - sum(level.time_s for level in result.levels), 0.0)
