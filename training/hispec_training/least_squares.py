"""Where an exit head starts: the best linear guess at the target's final state.

    minimise  ‖ proj u(t) + bias + F_{t − r} rms(h_L(r − 1)) − rms(h_L(t)) ‖² + ridge

over the maps of a head and the positions t of responses, with rounds drawn as in training. One pass
over cached states and one solve, seconds instead of the first thousand steps: on SmolLM2-135M's
held-out answers this start agrees with the target's pick at 0.27 to 0.32 of the positions, where an
identity start agrees at one in twenty. The block begins as an identity behind it (its two output
projections, or their scales, are zero) and learns what is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hispec_training.batches import draw_roots, step_seed
from hispec_training.exits import Exits
from hispec_training.heads import ExitHead
from hispec_training.shard_cache import CachedText, Texts

_RIDGE = 1e-4  # of the mean square of the inputs
_TOKENS = 150_000  # responses looked at; the maps of 1,153 inputs change little beyond


@torch.no_grad()
def start_from_least_squares(
    exits: Exits, cache: Texts, *, seed: int = 0, max_round: int = 6, tokens: int = _TOKENS
) -> None:
    """The heads with a projection hold the least-squares maps, their blocks are identities.

    Args:
        exits: Heads at their usual starting values; those of kind ``shared`` are left alone.
        cache: Training texts with the states of the exits and of the last layer.
        seed: Of the rounds drawn.
        max_round: Longest of them.
        tokens: About so many response positions are used, spread over the cache.
    """
    last = exits.final_layer
    for layer, spec in exits.specs.items():
        head = exits.heads[str(layer)]
        if spec.kind == "shared" or last not in cache[0].states:
            continue
        scale_inputs(head, cache, layer)
        width = head.proj.weight.shape[0]
        maps = spec.feature_maps if spec.feature else 0
        stride = max(1, sum(cache.response_lengths) // tokens)
        sums, count = _sums(head, cache, range(0, len(cache), stride), layer, seed, max_round)
        size = width + 1 + maps * width
        squares = torch.zeros(size, size, dtype=torch.float64)
        products = torch.zeros(size, width, dtype=torch.float64)
        for j, both in enumerate(sums):  # the inputs of the other offsets' maps are zero
            own = torch.arange(width + 1)
            if maps:
                own = torch.cat([own, width + 1 + j * width + torch.arange(width)])
            squares[own[:, None], own] += both[:, : len(own)]
            products[own] += both[:, len(own) :]
        squares.diagonal().add_(_RIDGE * squares.diagonal() + 1e-6 * count + 1e-9)
        found = torch.linalg.solve(squares, products).float().T  # (D, n)
        head.proj.weight.copy_(found[:, :width] * head.input_scale)
        head.proj.bias.copy_(found[:, width])
        if maps:
            head.feature_proj.weight.copy_(torch.cat(found[:, width + 1 :].split(width, 1)))
        if spec.kind == "lora":
            head.block.attention_scale.zero_()
            head.block.mlp_scale.zero_()
        elif head.block is not None:
            head.block.self_attn.o_proj.weight.zero_()
            head.block.mlp.down_proj.weight.zero_()


@torch.no_grad()
def start_from_neighbour(
    head: ExitHead, donor: ExitHead, cache: Texts, tokens: int = _TOKENS
) -> None:
    """The head is another exit's, its projection the best linear guess at what that one reads.

        minimise  ‖ proj u(t) + bias − proj' u'(t) ‖²

    Args:
        head: At its starting values.
        donor: A trained head of the same parts; unchanged.
        cache: Texts with the states of both exits.
        tokens: About so many response positions are used, spread over the cache.
    """
    here, there = head.spec.exit_layer, donor.spec.exit_layer
    head.load_state_dict(donor.state_dict())
    chosen = range(0, len(cache), max(1, sum(cache.response_lengths) // tokens))
    texts = [text.cpu() for part in _parts(chosen) for text in cache.texts(part)]
    head.input_scale.copy_(_sizes([text.states[here] for text in texts]))
    width = head.proj.weight.shape[0]
    squares = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    products = torch.zeros(width + 1, width, dtype=torch.float64)
    for text in texts:
        rows = slice(1, None)  # queries, and past positions that become keys; not the first token
        read = text.states[here][rows].float() / head.input_scale
        read = torch.cat([read, torch.ones(len(read), 1)], 1)
        wanted = donor.proj(text.states[there][rows].float() / donor.input_scale)
        squares += (read.T @ read).double()
        products += (read.T @ wanted).double()
    squares.diagonal().add_(_RIDGE * squares.diagonal() + 1e-9)
    found = torch.linalg.solve(squares, products).float().T  # (D, D + 1)
    head.proj.weight.copy_(found[:, :width])
    head.proj.bias.copy_(found[:, width])


@torch.no_grad()
def scale_inputs(head: ExitHead, cache: Texts, layer: int, texts: int = 64) -> None:
    """What the head's maps read is of size one in every dimension, for the optimizer's sake.

    The head computes what it did before: what the inputs are divided by, the maps' columns gain.

    Args:
        head: With a projection.
        cache: Training texts.
        layer: The head's exit.
        texts: How many to look at.
    """
    every = range(0, len(cache), max(1, len(cache) // texts))
    chosen = [text.cpu() for text in cache.texts(every)]
    head.set_input_scale(_sizes([text.states[layer] for text in chosen]))
    deep = [text.states[max(text.states)].float() for text in chosen]
    pairs = [(head.feature_layernorm, [head.feature_proj])] if head.spec.feature else []
    if head.block is not None and head.spec.context == "deep":
        block = head.block
        pairs.append((block.context_layernorm, [block.context_k_proj, block.context_v_proj]))
    for norm, maps in pairs:
        before = norm.weight.clone()
        norm.weight.fill_(1.0)
        norm.weight.copy_(1.0 / _sizes([norm(state) for state in deep]))
        for linear in maps:
            linear.weight.mul_(before / norm.weight)


def _sizes(states: list[Tensor]) -> Tensor:
    """(D,) root mean square of each dimension over texts, first tokens (huge norms) left out."""
    rows = torch.cat([state[1:] if len(state) > 1 else state for state in states]).float()
    return rows.square().mean(0).sqrt().clamp_min(1e-3)


def _sums(
    head: ExitHead, cache: Texts, texts: range, layer: int, seed: int, longest: int
) -> tuple[list[Tensor], int]:
    """For each offset's map, inputs times [inputs, outputs] over its positions; all positions."""
    groups = max(1, head.spec.feature_maps if head.spec.feature else 1)
    sums: list[Tensor] = []
    count = 0
    for part in _parts(texts):
        found = zip(cache.texts(part), part, strict=True)
        parts = [_rows(head, text.cpu(), layer, seed, i, longest) for text, i in found]
        x, y, offsets = (torch.cat(part) for part in zip(*parts, strict=True))
        count += len(x)
        both = torch.cat([x, y], 1)
        for j in range(groups):
            rows = offsets.clamp_max(groups - 1) == j
            product = (x[rows].T @ both[rows]).double()
            if len(sums) <= j:
                sums.append(product)
            else:
                sums[j] += product
    return sums, count


def _parts(texts: range) -> list[range]:
    """The texts, so many at a time as fit into memory."""
    return [texts[start : start + 64] for start in range(0, len(texts), 64)]


def _rows(
    head: ExitHead, text: CachedText, layer: int, seed: int, index: int, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (R, n), wanted outputs (R, D) and offsets (R,) of a text's response positions."""
    at = torch.arange(text.first, text.first + len(text.pick))
    parts = [text.states[layer][at].float(), torch.ones(len(at), 1)]
    deep = text.states[max(text.states)]
    offsets = torch.zeros_like(at)
    if head.spec.feature:
        generator = torch.Generator().manual_seed(step_seed(seed, index))
        roots = draw_roots(text.first, len(at), generator, longest)
        offsets = at - roots
        parts.append(head.feature_layernorm(deep[(roots - 1).clamp_min(0)].float()))
    wanted = deep[at].float()
    wanted = wanted * torch.rsqrt(wanted.pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.cat(parts, 1), wanted, offsets
