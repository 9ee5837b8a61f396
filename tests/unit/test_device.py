"""Which device and dtype a name means, with CUDA and bf16 there or not."""

from __future__ import annotations

import pytest
import torch

from hispec.errors import UsageError
from hispec.loading import choose_for
from hispec.model import device
from hispec.model.device import DTYPES, choose, dtype_name


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretends that there is a CUDA device or not, and that CPU and GPU multiply bf16 or not."""

    def pretend(*, cuda: bool, cpu_bf16: bool = True, gpu_bf16: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16
        )
        monkeypatch.setattr(device, "cpu_has_bf16", lambda: cpu_bf16)

    return pretend


@pytest.mark.parametrize(
    ("cuda", "cpu_bf16", "gpu_bf16", "wanted"),
    [
        (False, True, False, ("cpu", torch.bfloat16)),
        (False, False, False, ("cpu", torch.float32)),
        (True, False, True, ("cuda", torch.bfloat16)),
        (True, True, False, ("cuda", torch.float16)),
    ],
)
def test_auto(machine, cuda: bool, cpu_bf16: bool, gpu_bf16: bool, wanted) -> None:
    machine(cuda=cuda, cpu_bf16=cpu_bf16, gpu_bf16=gpu_bf16)
    choice = choose()
    assert (choice.device.type, choice.dtype) == wanted
    assert "bf16" in choice.reason


def test_what_is_asked_for_is_taken(machine) -> None:
    machine(cuda=True)
    assert choose("cpu", "fp32")[:2] == (torch.device("cpu"), torch.float32)
    assert choose("cuda", "fp16")[:2] == (torch.device("cuda"), torch.float16)
    assert choose("auto", "fp16")[:2] == (torch.device("cuda"), torch.float16)
    machine(cuda=False, cpu_bf16=False)
    assert choose("cpu", "bf16").dtype == torch.bfloat16  # slow, but as asked
    assert "asked for" in choose("cpu", "bf16").reason


def test_compiled_passes_make_bf16_worth_it_on_any_cpu(machine, monkeypatch) -> None:
    monkeypatch.setattr("hispec.loading.native_library", lambda *_: (object(), ""))
    machine(cuda=False, cpu_bf16=False)
    choice = choose_for(None)
    assert choice.dtype == torch.bfloat16 and "widen" in choice.reason
    assert choose_for(None, dtype="fp32").dtype == torch.float32
    monkeypatch.setattr("hispec.loading.native_library", lambda *_: (None, "no C compiler"))
    assert choose_for(None).dtype == torch.float32
    machine(cuda=True, gpu_bf16=False)
    assert choose_for(None)[:2] == (torch.device("cuda"), torch.float16)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("gpu", "auto"), "unknown device 'gpu'. Use auto, cpu or cuda."),
        (("cpu", "float32"), "unknown dtype 'float32'. Use auto, bf16, fp16, fp32."),
        (("cuda", "auto"), "no CUDA device is visible"),
        (("cpu", "fp16"), "fp16 needs a CUDA device. Use bf16 or fp32 on a CPU."),
    ],
)
def test_what_is_not_there_is_refused(machine, names: tuple[str, str], words: str) -> None:
    machine(cuda=False)
    with pytest.raises(UsageError) as caught:
        choose(*names)
    assert words in str(caught.value)


def test_names_and_dtypes_match() -> None:
    assert {dtype_name(dtype): dtype for dtype in DTYPES.values()} == DTYPES


def test_bf16_needs_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(device.cpu_has_bf16(), bool)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert device.cpu_has_bf16() is False
