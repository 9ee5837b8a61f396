"""The simulator's counts are the engine's, where drafts stand with chosen chances."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from helpers.laws import random_prompt
from helpers.lms import chain, plain

from hispec.engine import Decoder
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.simulator import forecast
from hispec.planner.synthetic import Script, scripted
from hispec.sampling import Sampling

#: Exits with windows, and each exit's chance to agree with the one above: where the exit below
#: agrees with it, and where it does not.
CASES = [
    (((2, 1),), ((0.5, 0.5),)),
    (((2, 4),), ((0.8, 0.8),)),
    (((1, 2), (3, 4)), ((0.6, 0.6), (0.7, 0.7))),
    (((1, 1), (3, 2)), ((0.5, 0.5), (0.9, 0.4))),
    (((1, 1), (2, 3), (4, 5)), ((0.7, 0.7), (0.8, 0.5), (0.9, 0.6))),
]
FLAT = [1.0] * 33
COSTS = CostTable(
    {**{f"exit {e}": e for e in range(1, 6)}, TARGET: 6},
    FLAT,
    FLAT,
    {**{f"exit {e}": FLAT for e in range(1, 6)}, TARGET: FLAT},
)
TOKENS = 600
ROUND = Decoder.round


@pytest.fixture(scope="module")
def text(zoo) -> tuple[list[int], list[int]]:
    """A prompt and what plain decoding says, with some more than is asked for."""
    prompt = random_prompt(5, 7)
    return prompt, plain(zoo("gqa"), prompt, TOKENS + 40, Sampling())


@pytest.mark.parametrize(("levels", "rates"), CASES)
def test_tokens_a_pass_and_passes_of_every_level(zoo, text, levels, rates) -> None:
    lm, (prompt, answer) = zoo("gqa"), text
    exits = [exit_layer for exit_layer, _ in levels]
    for exit_layer in exits:
        lm.head(exit_layer)
    script = Script([*prompt, *answer], exits, rates, lm.model.config.vocab_size, seed=3)
    rounds: list[list[int]] = []  # tokens, then passes of each level so far

    def counted(decoder: Decoder, limit: int) -> list[int]:
        tokens = ROUND(decoder, limit)
        rounds.append([len(tokens), *(level.counts.passes for level in decoder.levels)])
        return tokens

    with scripted(lm._heads, script), mock.patch.object(Decoder, "round", counted):
        result = lm.generate(prompt, hierarchy=chain(*levels), max_new_tokens=TOKENS)
    assert result.token_ids == answer[:TOKENS], "drafting changed a token"
    names = tuple((f"exit {exit_layer}", window) for exit_layer, window in levels)
    wanted = forecast(names, COSTS, script.acceptance())
    seen = np.array(rounds[:-1], dtype=float)  # the last had no room
    seen[1:, 1:] = np.diff(seen[:, 1:], axis=0)
    means, errors = seen.mean(0), seen.std(0) / np.sqrt(len(seen))
    expected = [wanted.tokens_per_pass, *(wanted.passes[level.name] for level in result.levels)]
    # 4.5 standard errors: one false alarm in 150,000 for each of 20 numbers, and seeds are fixed.
    assert np.all(np.abs(means - expected) <= 4.5 * errors + 1e-6), (means, expected, errors)


def test_a_wrong_rate_is_noticed(zoo, text) -> None:
    """The test above can fail: a tenth more acceptance lies outside its bounds."""
    (levels, rates), (prompt, answer) = CASES[1], text
    script = Script([*prompt, *answer], [2], rates, 320)
    better = Script(script.text, [2], ((0.88, 0.88),), 320)
    chain_ = (("exit 2", levels[0][1]),)
    right, wrong = (
        forecast(chain_, COSTS, x.acceptance()).tokens_per_pass for x in (script, better)
    )
    assert wrong - right > 4.5 * 1.7 / np.sqrt(TOKENS / right)
