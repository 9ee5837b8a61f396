"""What stands beside the exact passes: torch's products, on the same kernels and graphs."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers.gpu_llama import CONFIG, DEVICE, past_of, random_rows, replaying

from hispec.bench.gpu_library import LibraryPasses, decoding_on, fast_passes
from hispec.model.llama import Llama
from hispec.model.nodes import Nodes
from hispec.model.passes import Asked
from hispec.model.torch_passes import TorchPasses


def library(model: Llama, gate: bool = False) -> LibraryPasses:
    return LibraryPasses(CONFIG, model.rotary, model.dtype, DEVICE, gate=gate)


@torch.inference_mode()
@pytest.mark.parametrize("gate", [False, True])
def test_states_are_those_of_the_exact_passes_but_for_rounding(fp32: Llama, gate: bool) -> None:
    root, x = 126, random_rows(6)
    nodes = Nodes(root)
    for parent in (0, 0, 1, 2, 3):
        nodes.append(parent)
    passes = library(fp32, gate)
    for tree in (None, nodes):
        ours, theirs = past_of(fp32, root), past_of(fp32, root)
        wanted = fp32.run_layers(x, 0, 3, root, ours, nodes=tree)
        with decoding_on(fp32, passes):
            first = fp32.run_layers(x, 0, 2, root, theirs, nodes=tree)
            found = fp32.run_layers(first, 2, 3, root, theirs, nodes=tree)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(theirs.storage, ours.storage, rtol=1e-4, atol=1e-4)
    assert fp32.narrow is not passes


@torch.inference_mode()
def test_a_graph_of_theirs_serves_other_rows_and_places(fp32: Llama) -> None:
    passes, rows = library(fp32), random_rows(4)

    def decode() -> list[torch.Tensor]:
        kv, found = past_of(fp32, 10), []
        for place in range(4):
            x = fp32.run_layers(rows[place : place + 1], 0, 3, 10 + place, kv)
            found += [x, fp32.logits(x)]
        return found

    with decoding_on(fp32, passes):
        with passes.graphs.kernel_by_kernel():
            wanted = decode()
        assert passes.captured == 0
        passes._of_heads.clear()
        with mock.patch.object(passes.graphs, "on", True), replaying() as captured:
            found = decode()
            assert passes.captured == len(captured) == 2  # the layers and the head
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@torch.inference_mode()
def test_a_head_shows_its_logits_and_picks(fp32: Llama) -> None:
    passes, x = library(fp32), random_rows(3)
    found = passes.project(fp32.head, x, fp32.norm)
    wanted = fp32.narrow.project(fp32.head, x, fp32.norm)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    asked = Asked(8, 1.0, None, [4, 5, 6], odds=False)
    ids, _ = passes.best(fp32.head, x, fp32.norm, asked, None)
    assert ids.flatten().tolist() == wanted.argmax(-1).tolist()
    for more in (asked._replace(odds=True), asked._replace(seed=3)):
        assert passes.best(fp32.head, x, fp32.norm, more, None) is None


def test_what_stands_beside_other_passes(fp32: Llama) -> None:
    assert [passes.name for passes in fast_passes(fp32)] == ["torch.mm", "torch.mm, our gate"]
    plain = TorchPasses(CONFIG, fp32.rotary, fp32.dtype, DEVICE, exact=True)
    with decoding_on(fp32, plain):
        (other,) = fast_passes(fp32)
    assert isinstance(other, TorchPasses) and not other.exact
