"""What the GPU path does without a GPU, a compiler, memory, or a size it covers."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.gpu_llama import (
    CONFIG,
    DEVICE,
    DTYPES,
    open_gpu_lm,
    random_llama,
    random_rows,
    run,
)
from helpers.lms import save_model

from hispec.errors import HispecError, UsageError
from hispec.hierarchy import Hierarchy, Level
from hispec.model import cache, llama, numerics
from hispec.model.device import enough_memory
from hispec.model.gpu import gpu_passes
from hispec.model.graphs import Graphs
from hispec.model.llama import Llama
from hispec.model.ready import without_kernels
from hispec.streaming import ADVICE
from hispec_kernels import gpu
from hispec_kernels.gpu import attention, compact, exit_head, noise, products, rope


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": 7}, "even head sizes"),
        ({"head_dim": 130}, "head sizes up to 128"),
        ({"heads": 34}, "16 query heads a KV head, not 17"),
        ({"vocabulary": 2**21}, "vocabularies up to"),
        ({"hidden": 2**16}, "hidden sizes up to"),
        ({"dtype": torch.float64}, "float64"),
        ({}, ""),
    ],
)
def test_what_the_kernels_cover(changes: dict[str, Any], words: str) -> None:
    sizes = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 64, "vocabulary": 100}
    found = gpu.uncovered(**{**sizes, "dtype": torch.float32, **changes})
    assert words in found
    assert bool(found) == bool(changes)


def test_where_the_kernels_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    why_not = gpu.why_not.__wrapped__  # not the remembered answer
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "T4")
    assert why_not(cuda) == "T4 has compute capability 7.5; the kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_trial", lambda device: f"tried on {device}")
        assert why_not(cuda) == "tried on cuda"
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _: None)
    assert why_not(cuda) == "Triton is not installed (pip install triton)"
    assert "mps" in why_not(torch.device("mps")) or "Triton" in why_not(torch.device("mps"))


def test_no_kernel_is_used_where_the_smallest_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert gpu._trial(DEVICE) == ""

    def fail(*_: Any) -> None:
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    monkeypatch.setattr(noise, "noisy", fail)
    assert gpu._trial(DEVICE).startswith("Triton cannot build the kernels here: Command '['gcc'")


@torch.inference_mode()
def test_a_build_that_fails_is_a_reason(fp32: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("Failed to find C compiler.\nSet CC.")

    what = fp32.rotary, torch.float32, DEVICE, fp32.blocks[0], fp32.head
    for kernels, name in (
        (attention, "decode_attention"),
        (exit_head, "best"),
        (compact, "compact"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, fail)
            found = gpu_passes(CONFIG, *what)
        said = "Triton cannot build the kernels here: Failed to find C compiler."
        assert found == (None, said), name
    passes, why = gpu_passes(replace(CONFIG, head_dim=130), *what)
    assert passes is None and "head sizes up to 128" in why


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernels_that_are_wrong_here_are_not_used(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llama(dtype)
    what = model.rotary, dtype, DEVICE, model.blocks[0], model.head
    for kernels, name, written in (
        (attention, "decode_attention", 5),
        (products, "gated_product", 3),
        (rope, "rope_write", 5),
    ):
        right = getattr(kernels, name)

        def wrong(*arguments: Any, right: Any = right, written: int = written, **kw: Any) -> None:
            right(*arguments, **kw)
            arguments[written].zero_()

        with monkeypatch.context() as patch:
            patch.setattr(kernels, name, wrong)
            passes, why = gpu_passes(CONFIG, *what)
        assert passes is None and "the kernels' results are not torch's here" in why, name


@torch.inference_mode()
def test_graphs_that_are_wrong_here_are_not_used(
    fp32: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = fp32.rotary, torch.float32, DEVICE, fp32.blocks[0], fp32.head

    def stale(self: Any, work: Any) -> Any:
        return mock.Mock(replay=lambda: None)

    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "_capture", stale)
        patch.setattr(Graphs, "on", property(lambda self: True, lambda self, on: None), False)
        passes, why = gpu_passes(CONFIG, *what)
    assert passes is None and "CUDA graphs give other results here" in why


def test_a_model_without_kernels_runs_and_says_so_once(
    fp32: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "gpu_passes", lambda *_: (None, "Triton is not installed"))
    plain = Llama(CONFIG, fp32.embedding, fp32.blocks, fp32.norm, fp32.head)
    monkeypatch.setattr(plain, "device", torch.device("cuda"))
    monkeypatch.setattr(plain, "_torch_passes", lambda: "torch's")
    narrow, plain.why_not_native = plain._narrow_passes()
    assert (narrow, plain.why_not_native) == ("torch's", "Triton is not installed")
    assert without_kernels(plain, "mine") == (
        "hispec: no GPU kernels for mine (Triton is not installed); it runs operator by operator, "
        "which is slower."
    )


@torch.inference_mode()
def test_out_of_memory_says_what_was_needed(fp32: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run(fp32, random_rows(2), (2,))

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(llama, "Cache", fail)
        words = r"a cache for 480 tokens of context needs \d+\.\d GiB.*shorter --context"
        with pytest.raises(HispecError, match=words):
            fp32.new_cache([3])
    assert torch.equal(run(fp32, random_rows(2), (2,)), wanted), "the model stays usable"


@torch.inference_mode()
def test_a_cache_without_room_for_an_exit_is_as_it_was(
    fp32: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = fp32.new_cache([3])

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "lazy_zeros", fail)
        with pytest.raises(HispecError, match=r"keeping an exit's states .* shorter --context"):
            kept.reset([1, 3])
    assert kept.boundaries == [3]
    kept.reset([1, 3])
    assert kept.computed == {1: 0, 3: 0}


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …", r"2\.50 GiB more"),
        ("CUDA error: out of memory", "more memory than there is"),
    ],
)
def test_what_ran_out_is_told_by_whoever_noticed(said: str, needed: str) -> None:
    with (
        pytest.raises(HispecError, match=f"decoding needs {needed}.*: do that"),
        enough_memory("decoding", None, "do that"),
    ):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="else"), enough_memory("decoding", None, "do that"):
        raise RuntimeError("something else")


def test_kernels_that_round_by_width_are_not_called_exact(
    fp32: Llama, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "find_min_width", lambda model: 17)
    with pytest.raises(HispecError, match=r"fewer than 17 rows round otherwise.*--numerics fast"):
        numerics.settle_width(fp32)
    monkeypatch.setattr(fp32.narrow, "build", "other kernels")
    monkeypatch.setattr(numerics, "find_min_width", lambda model: 1)
    numerics.settle_width(fp32)  # of other kernels nothing is remembered


def test_memory_that_runs_out_in_a_text_says_what_helps() -> None:
    words = r"decoding needs more memory than there is.*: do that"
    with pytest.raises(HispecError, match=words), enough_memory("decoding", None, "do that"):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_model_whose_memory_ran_out_in_a_text_is_as_it_was(tmp_path: Path) -> None:
    lm = open_gpu_lm(save_model(tmp_path / "llama", "tied mha", num_hidden_layers=2))
    hierarchy, prompt = Hierarchy((Level(1, 2),)), [3, 1, 4, 1, 5]
    wanted = lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=5).token_ids
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    run, calls = Graphs.run, iter(range(9))

    def fail(*args: Any) -> None:
        if next(calls) == 3:
            raise full
        run(*args)

    words = rf"^decoding needs 20\.00 MiB more(?: and .* GiB are free)?: {ADVICE}\.$"
    with mock.patch.object(Graphs, "run", fail), pytest.raises(HispecError, match=words):
        lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=5)
    assert lm.generate(prompt, hierarchy=hierarchy, max_new_tokens=5).token_ids == wanted


def test_a_context_the_model_does_not_have_is_refused() -> None:
    checkpoint = mock.Mock(config=CONFIG)
    for context in (0, 481):
        with pytest.raises(UsageError, match=r"context must be in \[2, 480\]"):
            Llama.load(checkpoint, torch.float32, torch.device("cpu"), context=context)
