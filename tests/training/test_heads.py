from dataclasses import replace

import pytest
import torch
from training.exit_setup import make_cache, make_exits

from hispec.errors import UsageError
from hispec.hierarchy import MAX_WIDTH
from hispec.model.checkpoint import open_checkpoint
from hispec.planner.cost_table import TARGET, CostTable
from hispec_training.batches import collate, fixed_roots
from hispec_training.evaluate import ROUND, tokens_per_ms
from hispec_training.exit_block import Norm, attend
from hispec_training.export import TrainedExits, load_into
from hispec_training.heads import ExitHead, HeadSpec, frequent_tokens
from hispec_training.least_squares import _rows, scale_inputs, start_from_least_squares


@pytest.fixture(scope="module")
def checkpoint(tiny_llama):
    return open_checkpoint(tiny_llama)


def randomize(head):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return head


@pytest.mark.parametrize(
    "config", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}]
)
@torch.no_grad()
def test_block_starts_as_the_models_own_layer(make_llama, config):
    """A fresh head on the state before the last layer says what the model says."""
    from transformers import AutoModelForCausalLM

    folder = make_llama(**config)
    checkpoint = open_checkpoint(folder)
    last = checkpoint.config.num_layers - 1
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_hidden_states=True)
    head = ExitHead(HeadSpec(last), checkpoint.config).start_from(checkpoint)
    positions = torch.arange(17).expand(2, 17)
    roots = positions // 3 * 3
    deep = torch.randn(2, 17, checkpoint.config.hidden_size)
    x = head(out.hidden_states[last], deep, positions, roots)
    torch.testing.assert_close(model.lm_head(x), out.logits, rtol=1e-4, atol=1e-4)


def test_only_the_updates_of_a_lora_block_are_trained(checkpoint):
    head = ExitHead(HeadSpec(1, "lora", rank=2), checkpoint.config).start_from(checkpoint)
    plain = ExitHead(HeadSpec(1), checkpoint.config).start_from(checkpoint)
    trained = {n for n, p in head.named_parameters() if p.requires_grad}
    inside = {n for n in trained if n.startswith("block.")}
    assert trained - inside == {n for n, _ in plain.named_parameters() if "block" not in n}
    kinds = ("lora_A", "lora_B", "context_", "attention_scale", "mlp_scale")
    assert all(any(kind in name for kind in kinds) for name in inside)
    assert len([name for name in inside if "lora_" in name]) == 14
    states, deep = torch.randn(1, 9, 64), torch.randn(1, 9, 64)
    positions = torch.arange(9)[None]
    args = (states, deep, positions, positions // 3 * 3)
    # fresh updates change nothing
    torch.testing.assert_close(head(*args), plain(*args))
    head(*args).sum().backward()
    assert all((p.grad is not None) == (n in trained) for n, p in head.named_parameters())


@torch.no_grad()
def test_a_query_sees_deep_states_before_its_root_only(checkpoint):
    size, length = checkpoint.config.hidden_size, 20
    head = randomize(ExitHead(HeadSpec(1), checkpoint.config).start_from(checkpoint))
    states, deep = torch.randn(1, length, size), torch.randn(1, length, size)
    positions = torch.arange(4, 18)[None]
    roots = fixed_roots(4, 14, 5, 2)[None]
    base = head(states, deep, positions, roots)
    for changed in range(length):
        other_deep, other_states = deep.clone(), states.clone()
        other_deep[0, changed] += 1
        other_states[0, changed] += 1
        moved = (head(states, other_deep, positions, roots) != base).any(-1)[0]
        assert (moved == (changed < roots[0])).all(), changed
        moved = (head(other_states, deep, positions, roots) != base).any(-1)[0]
        assert (moved == (changed <= positions[0])).all(), changed


@torch.no_grad()
@pytest.mark.parametrize("context", ["deep", "none"])
def test_rows_do_not_depend_on_their_company(checkpoint, tmp_path, context):
    cache = make_cache(tmp_path, checkpoint)
    exits = make_exits(checkpoint, cache, context=context, feature=context == "deep")
    randomize(exits)
    texts = [cache[i] for i in range(6)]
    roots = [fixed_roots(t.first, len(t.pick), 3, 1) for t in texts]
    together = exits.normed(collate(texts, roots, exits.layers), 2)
    alone = [
        exits.normed(collate([t], [r], exits.layers), 2) for t, r in zip(texts, roots, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_norm_and_its_gradient_are_torchs():
    norm = Norm(torch.rand(16) + 0.5, 1e-5)
    x = torch.randn(3, 5, 16, requires_grad=True)
    other = torch.randn(3, 5, 16)
    found = torch.autograd.grad((norm(x) * other).sum(), [x, norm.weight])
    want = torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-5)
    torch.testing.assert_close(norm(x), want)
    for one, two in zip(
        found, torch.autograd.grad((want * other).sum(), [x, norm.weight]), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_attention_is_torchs():
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 1, 5, 9) > 0.5
    mask[..., 0] = True
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(attend(q, k, v, mask), want)


def test_vocabulary_is_ranked_by_frequency():
    counts = torch.tensor([3, 0, 9, 3, 1])
    assert frequent_tokens(counts, 3).tolist() == [2, 0, 3]
    assert frequent_tokens(counts, 3, always=[1]).tolist() == [1, 2, 0]
    assert (
        frequent_tokens(counts, 0).tolist()
        == frequent_tokens(counts, 9).tolist()
        == [0, 1, 2, 3, 4]
    )


@pytest.mark.parametrize(
    "spec, message",
    [
        (HeadSpec(-1), "exit_layer must be in"),
        (HeadSpec(99), "got 99"),
        (HeadSpec(1, "mlp"), "shared, affine, block"),
        (HeadSpec(1, "affine"), "needs a block"),
        (HeadSpec(1, "shared", "none"), "needs deep context"),
    ],
)
def test_impossible_heads_are_refused(checkpoint, spec, message):
    with pytest.raises(UsageError, match=message):
        ExitHead(spec, checkpoint.config)


@torch.no_grad()
def test_each_distance_from_the_root_has_its_map(checkpoint):
    head = ExitHead(HeadSpec(1, feature_maps=3), checkpoint.config)
    maps = head.feature_proj.weight.chunk(3)
    last, offsets = torch.randn(2, 6, maps[0].shape[1]), torch.tensor([[0, 1, 2, 3, 4, 0]] * 2)
    found = head._feature(last, offsets)
    for i, which in enumerate([0, 1, 2, 2, 2, 0]):
        torch.testing.assert_close(found[:, i], last[:, i] @ maps[which].T)


@torch.no_grad()
def test_least_squares_start_is_the_best_linear_guess(checkpoint, tmp_path):
    """Against a dense solve over all inputs, other offsets' columns zero."""
    cache = make_cache(tmp_path, checkpoint, count=80)
    exits = make_exits(checkpoint, cache, feature_maps=3, vocab_size=0)
    start_from_least_squares(exits, cache, max_round=4)
    head = exits.heads["2"]
    size = checkpoint.config.hidden_size
    xs, ys = [], []
    for i in range(len(cache)):
        x, y, offsets = _rows(head, cache[i], 2, 0, i, 4)
        wide = torch.zeros(len(x), 4 * size + 1)
        wide[:, : size + 1] = x[:, : size + 1]
        for row, j in enumerate(offsets.clamp_max(2).tolist()):
            wide[row, size + 1 + j * size :][:size] = x[row, size + 1 :]
        xs.append(wide)
        ys.append(y)
    x, y = torch.cat(xs).double(), torch.cat(ys).double()
    squares = x.T @ x
    squares.diagonal().add_(1e-4 * squares.diagonal() + 1e-6 * len(x) + 1e-9)
    want = torch.linalg.solve(squares, x.T @ y).float()
    got = torch.cat(
        [
            head.proj.weight.T / head.input_scale[:, None],
            head.proj.bias[None],
            *(m.T for m in head.feature_proj.weight.chunk(3)),
        ]
    )
    torch.testing.assert_close(x.float() @ got, x.float() @ want, rtol=1e-3, atol=1e-3)
    assert not head.block.mlp.down_proj.weight.any()


@torch.no_grad()
def test_scaled_inputs_change_nothing_but_the_scale(checkpoint, tmp_path):
    cache = make_cache(tmp_path, checkpoint)
    exits = randomize(make_exits(checkpoint, cache))
    texts = [cache[i] for i in range(4)]
    batch = collate(texts, [fixed_roots(t.first, len(t.pick), 3, 0) for t in texts], exits.layers)
    before = exits.normed(batch, 2)
    head = exits.heads["2"]
    scale_inputs(head, cache, 2)
    torch.testing.assert_close(exits.normed(batch, 2), before, rtol=1e-3, atol=1e-3)
    states = torch.cat([cache[i].states[2][1:] for i in range(len(cache))]).float()
    sizes = (states / head.input_scale).square().mean(0).sqrt()
    assert (sizes > 0.8).all() and (sizes < 1.2).all()


def test_a_new_exit_starts_from_the_nearest(checkpoint, tmp_path):
    """Where both exits' states are the same, the heads say the same; else it is the best map."""
    cache = make_cache(tmp_path, checkpoint, count=80)
    donors = randomize(make_exits(checkpoint, cache, layers=(2,)))
    saved = TrainedExits.from_training(donors, checkpoint)
    fresh = make_exits(checkpoint, cache, layers=(1,))

    class Alike(type(cache)):
        def __getitem__(self, index):
            text = super().__getitem__(index)
            return replace(text, states=text.states | {1: text.states[2]})

    load_into(fresh, saved, Alike(cache.paths))
    texts = [Alike(cache.paths)[i] for i in range(4)]
    roots = [fixed_roots(t.first, len(t.pick), 3, 0) for t in texts]
    batch = collate(texts, roots, [1, 2, checkpoint.config.num_layers])
    with torch.no_grad():
        torch.testing.assert_close(
            fresh.normed(batch, 1), donors.normed(batch, 2), rtol=0.02, atol=0.02
        )
    load_into(fresh, saved, cache)
    head, donor = fresh.heads["1"], donors.heads["2"]

    def distance(weight):
        total = torch.zeros(())
        for i in range(len(cache)):
            states = cache[i].states
            read = states[1][1:].float() / head.input_scale
            wanted = donor.proj(states[2][1:].float() / donor.input_scale)
            total += (read @ weight.T + head.proj.bias - wanted).square().sum()
        return total

    with torch.no_grad():
        best = distance(head.proj.weight)
        for seed in range(5):
            noise = torch.randn(
                head.proj.weight.shape, generator=torch.Generator().manual_seed(seed)
            )
            assert distance(head.proj.weight + 0.05 * noise) > best
    with pytest.raises(UsageError, match="none at layer 1"):
        load_into(fresh, saved)


def test_a_round_s_first_draft_is_charged_in_full() -> None:
    """What caches keep of an exit's layers helps later drafts, and whoever lifts its last pick."""
    wide = MAX_WIDTH + 1
    cold = CostTable(
        {"exit 2": 2, TARGET: 8},
        [0.0] * wide,
        [0.001] * wide,
        {name: [0.002] * wide for name in ("exit 2", TARGET)},
        {"exit 2": 0.001},
    )
    kept = replace(cold, kept_s={"exit 2": 0.0005})
    once = [0.6] + [0.6] * (ROUND - 1)  # nothing behind the first place ever stands
    assert tokens_per_ms(once, cold, 2) == (pytest.approx(1.6 / (4 + 1 + 10)), 1)
    assert tokens_per_ms(once, kept, 2) == (pytest.approx(1.6 / (4 + 1 + 10 - 2 * 0.5)), 1)
    long = [float(place) for place in range(1, ROUND + 1)]
    (slow, _), (fast, window) = (tokens_per_ms(long, x, 2) for x in (cold, kept))
    assert window == ROUND and fast > slow
