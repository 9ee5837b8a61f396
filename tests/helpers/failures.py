"""Failures put into a pass, and the law that they leave the model usable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from hispec.generation import LM
from hispec.hierarchy import Hierarchy
from hispec.model.passes import Lift
from hispec.sampling import Sampling


class Injected(Exception):
    """The failure that a test puts into a round."""


@contextmanager
def failing_at(lm: LM, call: int) -> Iterator[None]:
    """The ``call``-th pass from here on raises, be it the target's or a separate model's."""
    calls = 0

    def failing(run: Callable[..., None]) -> Callable[..., None]:
        def run_one_by_one(lifts: Sequence[Lift], **options: Any) -> None:
            nonlocal calls
            for lift in lifts:
                calls += 1
                if calls == call:
                    raise Injected
                run([lift], **options)

        return run_one_by_one

    with ExitStack() as stack:
        for model in (lm.model, *(separate.model for separate in lm._separate.values())):
            patch = mock.patch.object(model, "run", failing(model.run))
            stack.enter_context(patch)
        yield


def interrupted_then_fresh(
    lm: LM,
    prompt: Sequence[int],
    hierarchy: Hierarchy,
    sampling: Sampling,
    wanted: Sequence[int],
    fail_at: int,
) -> bool:
    """An exception in any pass leaves the model usable; returns whether that pass was reached."""
    options: dict[str, Any] = {"hierarchy": hierarchy, "sampling": sampling}
    stream = lm.stream(prompt, max_new_tokens=len(wanted), **options)
    try:
        with failing_at(lm, fail_at):
            for _ in stream:
                pass
    except Injected:
        assert stream.result.finish_reason == "interrupted"
        assert stream.result.token_ids == list(wanted[: stream.result.num_tokens])
    again = lm.generate(prompt, max_new_tokens=len(wanted), **options)
    assert again.token_ids == list(wanted)
    return stream.result.finish_reason == "interrupted"
