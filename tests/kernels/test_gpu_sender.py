"""What the device is told of a pass: one array, where ids that it alone knows find their place."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers.gpu_llama import DEVICE

from hispec.model import sender
from hispec.model.linear import Linear
from hispec.model.nodes import Nodes
from hispec.model.passes import Words

pytest.importorskip("triton")
WORDS = Linear(torch.zeros(50, 4, device=DEVICE))


def on_device(token: int) -> torch.Tensor:
    return torch.tensor(token, device=DEVICE)


def test_places_ids_and_trees() -> None:
    ours, nodes = sender.Sender(DEVICE), Nodes.line(9, 2)
    nodes.append(0)
    with mock.patch.object(sender, "upload", wraps=sender.upload) as upload:
        ours.plan(7, 3)
        assert ours.told[:4].tolist() == [7, 3, 1 << 30, 0]
        ours.plan(8, 3, None, Words(WORDS, [49, 0, on_device(31)]))
        assert ours.told[:7].tolist() == [8, 3, 1 << 30, 0, 49, 0, 31]
        ours.plan(9, 3, nodes, Words(WORDS, [5, on_device(6), on_device(7)]))
    assert ours.told[:7].tolist() == [9, 3, 9, 0, 5, 6, 7]
    assert ours.told[36:39].tolist() == [0, 1, 1]
    assert ours.told[68 + 32 : 68 + 34].tolist() == [0, 1], "the path to the first node"
    assert ours.told[68 + 64 : 68 + 66].tolist() == [0, 2]
    assert upload.call_count == 3, "a copy a pass"


@pytest.mark.parametrize("ids", [[50], [3, -1]])
def test_what_is_no_id_is_refused(ids: list[int]) -> None:
    with pytest.raises(IndexError, match=r"token ids must be in \[0, 49\]"):
        sender.Sender(DEVICE).plan(0, len(ids), None, Words(WORDS, ids))
