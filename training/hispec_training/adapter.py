"""LoRA on the backbone: layers that keep their meaning for those above and learn to speak early.

The base stays as it is; peft puts low-rank updates beside its linear layers. Layers below the
deepest exit carry most of the change and get the larger rank, those above only have to make up
for it. The result is a peft adapter like any other: it loads through peft, and merged into the
base (``hispec.model.adapter``) it is a plain Llama whose shared norm and head work at the exits
too, as LayerSkip's checkpoints are: transformers' ``assistant_early_exit`` runs it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hispec.errors import UsageError
from hispec.model.adapter import Adapter
from hispec.model.checkpoint import Checkpoint
from hispec_training import short_attention
from hispec_training.options import check_exits

if TYPE_CHECKING:
    from peft import PeftModel

# A list, not a pattern: peft honours layers_to_transform only with a list.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class LoraShape:
    """How large the updates are.

    Attributes:
        rank: Of the layers below the deepest exit.
        deep_rank: Of the layers above; 0 leaves them alone.
        alpha: What the product is multiplied by, peft's ``alpha / rank``. Adam moves all entries
            alike, and B, which starts at zero, has far to go where A must not be shaken: at a ratio
            of 1 a rate that lets B grow in time changes A by a tenth a step.
    """

    rank: int = 64
    deep_rank: int = 8
    alpha: float = 8.0


def base_model(checkpoint: Checkpoint, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """Returns transformers' model of the checkpoint, on the CPU, with the named attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for a second of loading
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path), dtype=dtype, attn_implementation=attention
        )
    finally:
        if shown:
            logging.enable_progress_bar()


def add_lora(
    checkpoint: Checkpoint, exits: Sequence[int], shape: LoraShape, dtype: torch.dtype, seed: int
) -> PeftModel:
    """Returns the base with fresh updates, which change nothing yet.

    Args:
        checkpoint: The base.
        exits: Exit layers to train.
        shape: Ranks and scale.
        dtype: Of the base; the updates are fp32.
        seed: Of the updates' random half.

    Raises:
        UsageError: An exit this model does not have, or a rank below 1.
    """
    from peft import LoraConfig, get_peft_model

    layers = checkpoint.config.num_layers
    check_exits(exits, layers)
    if shape.rank < 1 or shape.deep_rank < 0:
        raise UsageError(f"LoRA ranks must be positive, got {shape.rank} and {shape.deep_rank}.")
    deepest = max(exits)
    adapted = range(layers if shape.deep_rank else deepest)
    shallow = "|".join(str(i) for i in range(deepest))
    below = rf"layers\.({shallow})\..+"
    config = LoraConfig(
        r=shape.deep_rank or shape.rank,
        lora_alpha=shape.alpha * (shape.deep_rank or shape.rank),
        rank_pattern={below: shape.rank},
        alpha_pattern={below: shape.alpha * shape.rank},
        target_modules=TARGETS,
        layers_to_transform=list(adapted),
        task_type="CAUSAL_LM",
    )
    base = base_model(checkpoint, dtype, short_attention.register())
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    # What peft writes into the adapter: the name another machine can load, not a cache folder.
    name = str(checkpoint.path) if Path(checkpoint.name).exists() else checkpoint.name
    model.peft_config["default"].base_model_name_or_path = name
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    for module in model.modules():
        # peft casts inputs up to the updates' fp32, autocast down again: a tenth of a step
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = dtype == torch.float32
    return model


@torch.no_grad()
def start_from(model: PeftModel, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """The fresh updates of ``model`` change its base as a saved adapter does.

    Args:
        model: See `add_lora`; ranks above the adapter's leave room for more.
        adapter: Trained on the same base, maybe with another scale.
        checkpoint: The base.

    Raises:
        UsageError: A rank below the adapter's, or no update where the adapter has one.
        CheckpointError: The adapter does not fit the base.
    """
    modules = dict(model.get_base_model().named_modules())
    for weight, (first, second) in adapter.updates(checkpoint).items():
        name = weight.removesuffix(".weight")
        a, b = adapter.file.read(first).float(), adapter.file.read(second).float()
        module: Any = modules[name]
        room = module.r["default"] if hasattr(module, "lora_A") else 0
        if (rank := len(a)) > room:
            raise UsageError(f"{adapter.folder} has rank {rank} at {name}; this run has {room}.")
        module.lora_A["default"].weight[:rank] = a
        scale = adapter.scale(name, rank) / module.scaling["default"]
        module.lora_B["default"].weight[:, :rank] = scale * b


def add_block_lora(block: nn.Module, rank: int) -> None:
    """The linear layers of a head's block are frozen and have fresh updates beside them.

    Args:
        block: An ``ExitBlock``; only its updates, its scales and its maps of deep context, which
            the model does not have, are trained from here on.
        rank: Of the updates.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), block)
    for name, parameter in block.named_parameters():
        own = "lora_" in name or name.endswith("_scale") or name.startswith("context_")
        parameter.requires_grad_(own)
    for module in block.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns what is trained, in a fixed order."""
    return [p for _, p in sorted(model.named_parameters()) if p.requires_grad]


class Student(nn.Module):
    """The adapted backbone, run layer by layer to wherever a loss needs it.

    Args:
        model: Base with updates.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.backbone = model.get_base_model().model  # a LlamaModel
        self.num_layers = len(self.backbone.layers)

    def forward(
        self, ids: Tensor, stops: Collection[int], dropped: Collection[int] = ()
    ) -> dict[int, Tensor]:
        """Returns the residual stream after ``layers[0:e]`` for e in ``stops``.

        Args:
            ids: (B, T), padded on the right.
            stops: Layers; ``num_layers`` is the stream before the final norm.
            dropped: Layers to leave out.

        Returns:
            e -> (B, T, D).
        """
        return self.run(self.backbone.embed_tokens(ids), 0, stops, dropped)

    def run(
        self, h: Tensor, start: int, stops: Collection[int], dropped: Collection[int] = ()
    ) -> dict[int, Tensor]:
        """Returns the residual stream after ``layers[0:e]`` for e in ``stops``, from (B, T, D).

        Args:
            h: The stream after ``layers[0:start]``.
            start: Below all stops.
            stops: See `forward`.
            dropped: Layers to leave out.
        """
        positions = torch.arange(h.shape[1], device=h.device)[None]
        rope = self.backbone.rotary_emb(h, position_ids=positions)
        states = {}
        for number in range(start, max(stops)):
            if number not in dropped:
                # Without a mask the attention is causal; pads stand behind what is real.
                h = self.backbone.layers[number](
                    h, attention_mask=None, position_ids=positions, position_embeddings=rope
                )
            if number + 1 in stops:
                states[number + 1] = h
        return states

    def normed(self, h: Tensor) -> Tensor:
        """Returns the final norm of (..., D) states: what the shared head is applied to."""
        return self.backbone.norm(h)

    @property
    def head(self) -> Tensor:
        """(V, D), frozen."""
        return self.model.get_base_model().lm_head.weight


def save_adapter(model: PeftModel, folder: Path) -> None:
    """``folder`` holds the adapter in bf16, as peft reads it.

    Raises:
        OSError: The disk is full or the folder cannot be written.
        SafetensorError: The same, met while the weights were written.
    """
    from peft import get_peft_model_state_dict

    state = {k: v.to(torch.bfloat16) for k, v in get_peft_model_state_dict(model).items()}
    model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    # safetensors writes 0600, which a package should not ship
    os.chmod(folder / "adapter_model.safetensors", 0o644)
