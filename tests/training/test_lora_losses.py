"""What LoRA training minimises, and the attention below it, against their plain definitions."""

import pytest
import torch
import torch.nn.functional as F
from training.exit_setup import make_cache
from training.lora_setup import EXITS, RECIPE, make_trainer

from hispec.model.checkpoint import open_checkpoint
from hispec_training.curriculum import exit_weights
from hispec_training.divergence import divergence


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


@pytest.fixture(scope="module")
def cache(checkpoint, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), checkpoint)


def test_divergence_is_the_kl_and_its_gradient(monkeypatch):
    from hispec_training import divergence as module

    monkeypatch.setattr(module, "chunk_values", lambda device: 75)  # 3 rows at a time
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 16, generator=generator, requires_grad=True)
    x0, rows = torch.randn(10, 16, generator=generator), torch.randn(50, 16, generator=generator)
    got = divergence(x, x0, rows)
    (grad,) = torch.autograd.grad(3 * got, x)
    logs = [(y @ rows.T).log_softmax(-1) for y in (x, x0)]
    want = F.kl_div(logs[0], logs[1], reduction="sum", log_target=True)
    (want_grad,) = torch.autograd.grad(3 * want, x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-5)
    assert divergence(x0, x0, rows).abs() < 1e-5


@pytest.mark.parametrize("full, some", [(True, True), (False, True), (False, False)])
def test_a_step_is_the_sum_of_its_losses(checkpoint, cache, tmp_path, full, some):
    """Against a plain loop over texts, exits and positions, with transformers' own head."""
    trainer = make_trainer(checkpoint, cache, tmp_path, keep_fraction=1.0, exit_scale=0.3)
    torch.manual_seed(1)
    for parameter in trainer.parameters:  # away from the start, where the updates are zero
        parameter.data.normal_(std=0.05)
    indices = [0, 1, 2, 3]
    onward = {0, 1, 2, 3} if full else {1, 3} if some else set()
    targets = sum(cache.response_lengths[i] for i in indices)
    kept = sum(cache.lengths[i] for i in onward)
    shares = exit_weights(EXITS, 0.3)
    got, _ = trainer._losses(indices, onward, shares, frozenset(), targets, kept)
    got_grads = torch.autograd.grad(got, trainer.parameters, allow_unused=True)

    model = trainer.student.model
    want = torch.zeros(())
    for i in indices:
        text = cache[i]
        out = model(text.ids.long()[None], output_hidden_states=True)
        for e, share in shares.items():
            h = out.hidden_states[e][0, text.first : text.first + len(text.pick)]
            logs = trainer.student.head @ trainer.student.normed(h)[..., None]
            logs = logs[..., 0].log_softmax(-1)
            for row, z in enumerate(logs):
                soft = text.top_logits[row].softmax(-1)
                loss = -0.5 * z[text.pick[row]] - 0.5 * (soft * z[text.top_ids[row].long()]).sum()
                want = want + share * loss / targets
        if i in onward:
            last = trainer.student.normed(text.states[checkpoint.config.num_layers].float())
            log_p0 = (last @ trainer.student.head.T).log_softmax(-1)
            log_p = out.logits[0].log_softmax(-1)
            kl = (log_p0.exp() * (log_p0 - log_p)).sum()
            want = want + kl * RECIPE.keep / kept
    want_grads = torch.autograd.grad(want, trainer.parameters, allow_unused=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b, parameter in zip(got_grads, want_grads, trainer.parameters, strict=True):
        none = torch.zeros_like(parameter)
        torch.testing.assert_close(
            none if a is None else a, none if b is None else b, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("length", [1, 40, 300])
def test_short_attention_is_attention(length):
    from hispec_training.short_attention import short_attention

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, length, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 8, generator=generator).requires_grad_() for _ in "kv")
    got, _ = short_attention(None, q, k, v, None)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-4, atol=1e-5)
    weights = torch.randn(got.shape, generator=generator)
    grads = [
        torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (got, want.transpose(1, 2))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
