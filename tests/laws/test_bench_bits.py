"""Comparing rows in company with rows alone: the same bits are, others are counted."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.laws import random_prompt

from hispec.bench import bits
from hispec.bench.bits import compare_bits, differing_bits, long_texts
from hispec.model.passes import Lift


@pytest.mark.parametrize("kind", ["torch fp32", "compiled bf16"])
def test_nothing_differs(zoo, kind: str) -> None:
    found = compare_bits(zoo("gqa", kind), [random_prompt(1, 380)], 80)
    assert found.same and found.positions == 80 and found.longest == 380
    assert found.trees > 1 and found.rows > 80 and found.passes > 2 * found.trees


def test_a_tree_taken_for_a_chain_is_found(zoo) -> None:
    lm = zoo("gqa")
    run = lm.model.run

    def chains(lifts: Sequence[Lift], **options: Any) -> None:
        run([lift._replace(nodes=None) for lift in lifts], **options)

    with mock.patch.object(lm.model, "run", chains):
        found = compare_bits(lm, [random_prompt(1, 360)], 60)
    assert 0 < found.rows_that_differ < found.bits_that_differ and not found.same


def test_a_head_that_depends_on_its_company_is_found(zoo) -> None:
    lm = zoo("gqa", "compiled fp32")
    best = lm.model.narrow.best

    def shaky(linear: Any, x: torch.Tensor, *rest: Any) -> Any:
        return best(linear, x * (1 + 1e-3 * (len(x) > 1)), *rest)

    with mock.patch.object(lm.model.narrow, "best", shaky):
        found = compare_bits(lm, [random_prompt(1, 330)], 30)
    assert found.picks_that_differ and not found.rows_that_differ and not found.same


def test_on_the_passes_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from helpers.gpu_llama import random_llama

    monkeypatch.setattr(bits, "WARM", 124)
    with torch.inference_mode():
        model = random_llama(torch.float16)
    levels = SimpleNamespace(exit_layers=(1, 2))
    lm: Any = SimpleNamespace(model=model, hierarchy=lambda name: levels)
    text = [(7 * place) % 53 for place in range(134)]
    found = compare_bits(lm, [text], 10, seed=46)
    assert found.positions == 10 and found.longest == 134  # behind the first split
    assert found.trees > 0 and found.rows > 10  # of this seed
    assert found.same and found.bits_that_differ == 0


def test_bits_are_counted() -> None:
    a = torch.tensor([1.0, 0.0, 2.0])
    assert differing_bits(a, a.clone()) == 0
    assert differing_bits(a, torch.tensor([1.0, -0.0, 2.0])) == 1
    other = torch.tensor([1.0, 0.0, 2.0]).nextafter(torch.tensor([9.0, 0.0, 9.0]))
    assert differing_bits(a, other) == 2
    assert differing_bits(a.bfloat16(), -a.bfloat16()) == 3


def test_long_texts_are_long_and_many_enough() -> None:
    texts = long_texts([[1] * 100, [2] * 250], 400, 250)
    assert [len(text) for text in texts] == [400] * 3  # 100 rows of each behind the first 300
