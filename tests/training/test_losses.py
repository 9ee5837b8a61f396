import pytest
import torch
import torch.nn.functional as F
from training.exit_setup import make_cache, make_exits

from hispec.model.checkpoint import open_checkpoint
from hispec_training import losses
from hispec_training.batches import collate, fixed_roots
from hispec_training.losses import sparse_cross_entropy, sparse_targets


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_chunked_loss_equals_dense_cross_entropy(monkeypatch, chunk):
    monkeypatch.setattr(losses, "chunk_values", lambda device: chunk * 11)
    x = torch.randn(23, 8, requires_grad=True)
    rows, ids = torch.randn(11, 8), torch.randint(-1, 11, (23, 4))
    weights = torch.rand(23, 4)
    loss, best = sparse_cross_entropy(x, rows, ids, weights)
    (gradient,) = torch.autograd.grad(loss, x)
    logits = x @ rows.T
    dense = torch.zeros(23, 11).scatter_add(1, ids.clamp_min(0), weights * (ids >= 0))
    want = -(dense * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, x)[0])
    right = logits.argmax(-1) == ids[:, 0]
    assert ((best >= 0) == right).all()
    with torch.no_grad():
        assert (sparse_cross_entropy(x, rows, ids, weights)[1] == logits.argmax(-1)).all()


def test_targets_mix_pick_and_distribution():
    row_of = torch.tensor([2, -1, 0, 1])
    pick, top = torch.tensor([3, 1]), torch.tensor([[3, 1, 0], [1, 3, 2]])
    logits = torch.tensor([[2.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    rows, weights = sparse_targets(pick, top, logits, row_of, soft=0.25)
    assert rows[0].tolist() == [1, 1, -1, 2]
    share = F.softmax(torch.tensor([2.0, 0.0]), 0)
    torch.testing.assert_close(
        weights[0], torch.tensor([0.75, 0.25 * share[0], 0, 0.25 * share[1]])
    )
    assert weights[1].tolist() == [0, 0, 0, 0]  # the pick has no row: no answer is right


def test_loss_equals_a_per_exit_loop(checkpoint, tmp_path):
    """All exits at once against one head, one position at a time."""
    cache = make_cache(tmp_path, checkpoint)
    exits = make_exits(checkpoint, cache)
    texts = [cache[i] for i in range(5)]
    roots = [fixed_roots(t.first, len(t.pick), 4, 1) for t in texts]
    together = exits(collate(texts, roots, exits.layers), soft=0.3)
    for e in exits.specs:
        total = torch.zeros(())
        for text, root in zip(texts, roots, strict=True):
            x = exits.normed(collate([text], [root], exits.layers), e)
            logits = F.linear(x, getattr(exits, f"rows_{e}"))
            for i, pick in enumerate(text.pick.tolist()):
                row = int(getattr(exits, f"row_of_{e}")[pick])
                if row < 0:
                    continue
                log_q = logits[i].log_softmax(-1)
                total = total - 0.7 * log_q[row]
                rows = getattr(exits, f"row_of_{e}")[text.top_ids[i].long()]
                p = text.top_logits[i].softmax(-1)[rows >= 0]
                total = total - 0.3 * (p / p.sum() * log_q[rows[rows >= 0]]).sum()
        torch.testing.assert_close(together[e].loss, total, rtol=1e-4, atol=1e-4)
