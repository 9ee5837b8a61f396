"""When a hierarchy cannot pay: what acceptance it would need, and what to say about it.

Costs are counted in blocks, for a machine that is bound by reading weights: a pass over any few
rows costs the blocks between its level and the one below, what its newest row is lifted through,
and its head (for SmolLM2-135M the full vocabulary is worth 8 blocks). With every level's tokens
accepted at one rate, :mod:`hispec.planner.simulator` says what a token costs.
"""

from __future__ import annotations

from hispec.generation import LM
from hispec.hierarchy import MAX_WIDTH, Hierarchy
from hispec.model.config import ModelConfig
from hispec.planner.acceptance import Acceptance
from hispec.planner.cost_table import TARGET, CostTable
from hispec.planner.shortest_path import Chain
from hispec.planner.simulator import forecast
from hispec.result import Result


def head_blocks(lm: LM, boundary: int) -> float:
    """Returns what the head at a boundary costs, in blocks of the model."""
    config, head = lm.model.config, lm.head(boundary)
    rows = config.vocab_size if head.vocab_ids is None else len(head.vocab_ids)
    own = 1.0 if getattr(head, "block", None) is not None else 0.0
    return own + rows * config.hidden_size / block_size(config)


def block_size(config: ModelConfig) -> int:
    """Returns the numbers in a block's matrices."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def model_blocks(lm: LM, model: str) -> float:
    """Returns what a pass of a separate model costs, head included, in blocks of the target."""
    config = lm.separate(model).model.config
    size = config.num_layers * block_size(config) + config.vocab_size * config.hidden_size
    return size / block_size(lm.model.config)


def costs(lm: LM, hierarchy: Hierarchy) -> CostTable:
    """Returns the costs of every level's passes, in blocks of the target instead of seconds."""
    layers = lm.model.config.num_layers
    depths = {f"exit {e}": e for e in hierarchy.exit_layers} | {TARGET: layers}
    rows = MAX_WIDTH + 1
    heads = {name: [head_blocks(lm, depth)] * rows for name, depth in depths.items()}
    models = {x.name: [model_blocks(lm, x.model)] * rows for x in hierarchy.models}
    return CostTable(depths, [0.0] * rows, [1.0] * rows, heads, models_s=models)


def outgrown(lm: LM, result: Result) -> str | None:
    """Returns a sentence about levels whose context the text has outgrown, if there are any."""
    length = result.num_prompt_tokens + result.num_tokens
    short = [
        f"{level.name} ({context} tokens)"
        for level in result.hierarchy.models
        if (context := lm.separate(level.model).context) < length
    ]
    if not short:
        return None
    return (
        f"the text of {length} tokens outgrew the context of {', '.join(short)} and went on alone."
    )


def break_even(costs: CostTable, hierarchy: Hierarchy) -> float | None:
    """Returns the acceptance at which a hierarchy costs what plain decoding does, or None.

    Args:
        costs: of its levels' passes.
        hierarchy: its strict levels alone count.
    """
    chain = chain_of(hierarchy)
    names = [*(name for name, _ in chain), TARGET]

    def pays(rate: float) -> bool:
        rates = {(lower, upper): rate for lower in names for upper in names}
        return forecast(chain, costs, Acceptance.constant(rates)).speedup >= 1

    low, high = 0.0, 0.999
    if not pays(high):
        return None
    for _ in range(20):
        middle = (low + high) / 2
        if pays(middle):
            high = middle
        else:
            low = middle
    return high


def chain_of(hierarchy: Hierarchy) -> Chain:
    """Returns a hierarchy's levels and windows as the planner writes them."""
    return tuple((level.name, level.window) for level in hierarchy.levels)


def warning(lm: LM, result: Result) -> str | None:
    """Returns a sentence with numbers if this generation's drafts cost more than they gained."""
    hierarchy = result.hierarchy
    if not hierarchy.levels or result.passes < 8:
        return None  # too little to judge by
    blocks = costs(lm, hierarchy)
    ran = [0] * len(hierarchy.models) + [0, *hierarchy.exit_layers]  # layers from the level below
    spent = sum(
        blocks.pass_s(level.name, below, 1) * level.passes
        for level, below in zip(result.levels, ran, strict=True)
    )
    if spent <= blocks.plain_s * result.committed:
        return None
    top = result.levels[-2]
    rate = top.accepted / top.drafted if top.drafted else 0.0
    needed = break_even(blocks, hierarchy)
    threshold = f"about {needed:.0%} are needed to break even" if needed else "it cannot pay here"
    known = lm.exits.exit_layers if lm.exits else ()
    trained = all(layer in known for layer in hierarchy.exit_layers)
    advice = (
        "Try --hierarchy auto or smaller windows"
        if trained
        else "These exits look untrained: train some with hispec train --model "
        f"{lm.checkpoint.name} --data prompts.jsonl --out exits, or use --hierarchy ar"
    )
    return (
        f"the target accepted {rate:.1%} of {top.drafted} drafted tokens, where {threshold}: "
        f"plain decoding would have been faster. {advice}."
    )
