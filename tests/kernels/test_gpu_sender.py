"""What the device is told of a pass: one array, where ids that it alone knows find their place."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers.gpu_llama import DEVICE

from hispec.model import sender
from hispec.model.linear import Linear
from hispec.model.nodes import Nodes
from hispec.model.passes import Asked, Words
from hispec_kernels.noise import seeded_state

pytest.importorskip("triton")
WORDS = Linear(torch.zeros(50, 4, device=DEVICE))
STRAIGHT = 1 << 30


def on_device(token: int) -> torch.Tensor:
    return torch.tensor(token, device=DEVICE)


def test_places_ids_and_trees() -> None:
    ours, nodes = sender.Sender(DEVICE), Nodes.line(9, 2)
    nodes.append(0)
    with mock.patch.object(sender, "upload", wraps=sender.upload) as upload:
        message = sender.Message(ours)
        plan = message.plan(7, 3)
        message.send()
        assert plan[:4].tolist() == [7, 3, STRAIGHT, 0]
        message = sender.Message(ours)
        plan = message.plan(9, 2, Nodes.line(9, 2), Words(WORDS, [49, on_device(31)]))
        message.send()
        assert plan[:6].tolist() == [9, 2, STRAIGHT, 9, 49, 31], "a chain's root is told, too"
        message = sender.Message(ours)
        plan = message.plan(9, 3, nodes, Words(WORDS, [5, on_device(6), on_device(7)]))
        message.send()
    assert plan[:7].tolist() == [9, 3, 9, 9, 5, 6, 7]
    assert plan[36:39].tolist() == [0, 1, 1]
    assert plan[68 + 32 : 68 + 34].tolist() == [0, 1], "the path to the first node"
    assert plan[68 + 64 : 68 + 66].tolist() == [0, 2]
    assert upload.call_count == 3, "a copy a pass"


def test_one_message_tells_of_everything_a_graph_does() -> None:
    ours, nodes = sender.Sender(DEVICE), Nodes.line(9, 2)
    nodes.append(0)
    before = sender.Message(ours)  # what it leaves is nobody's
    for _ in range(sender.PASSES):
        before.plan(10, 2, nodes, Words(WORDS, [7, 7]))
    before.send()
    message = sender.Message(ours)
    words = Words(WORDS, [on_device(8), on_device(9)])
    first, second = message.plan(10, 2, nodes, words), message.plan(9, 3, nodes)
    late, root = message.rows(5, 4), message.rows(8, 1)
    last = message.plan(9, 3)
    sampling, temperature = message.ranking(Asked(2, 0.7, 3, [10, 11]), 1)
    with mock.patch.object(sender, "upload", wraps=sender.upload) as upload:
        message.send()
    assert upload.call_count == 1
    assert first[:6].tolist() == [10, 2, 9, 9, 8, 9]
    assert second[:4].tolist() == [9, 3, 9, 9] and second[36:39].tolist() == [0, 1, 1]
    assert last[:4].tolist() == [9, 3, STRAIGHT, 0]
    assert late.tolist() == [5, 4, STRAIGHT, 0] and root.tolist() == [8, 1, STRAIGHT, 0]
    assert sampling[0].item() % (1 << 32) == seeded_state(3)
    assert sampling[2:4].tolist() == [10, 11], "behind a row that nobody asked about"
    assert temperature.item() == pytest.approx(0.7)
    with pytest.raises(AssertionError, match="room for two"):
        message.rows(1, 1)


@pytest.mark.parametrize("ids", [[50], [3, -1]])
def test_what_is_no_id_is_refused(ids: list[int]) -> None:
    with pytest.raises(IndexError, match=r"token ids must be in \[0, 49\]"):
        sender.Message(sender.Sender(DEVICE)).plan(0, len(ids), None, Words(WORDS, ids))
