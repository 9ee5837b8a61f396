"""LoRA on the backbone: layers that keep their meaning for those above and learn to speak early.

The base stays as it is; peft puts low-rank updates beside its linear layers. Layers below the
deepest exit carry most of the change and get the larger rank, those above only have to make up
for it. The result is a peft adapter like any other: it loads through peft, and merged into the
base it is a plain Llama whose shared norm and head work at the exits too, as LayerSkip's
checkpoints are: transformers' ``assistant_early_exit`` runs it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hispec.errors import CheckpointError, HispecError, UsageError
from hispec.model.checkpoint import Checkpoint
from hispec_training import short_attention

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
        alpha: The update is scaled by ``alpha / rank``; this is the ratio.
    """

    rank: int = 64
    deep_rank: int = 8
    alpha: float = 1.0


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
    model.peft_config["default"].base_model_name_or_path = checkpoint.name
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()
    for module in model.modules():
        # peft casts inputs up to the updates' fp32, autocast down again: a tenth of a step
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = dtype == torch.float32
    return model


def check_exits(exits: Sequence[int], num_layers: int) -> None:
    """Every exit lies in the model.

    Raises:
        UsageError: One does not, or there is none.
    """
    if not exits:
        raise UsageError("At least one exit layer is needed.")
    for e in exits:
        if not 1 <= e < num_layers:
            raise UsageError(
                f"exit_layer must be in [1, {num_layers - 1}] for this {num_layers}-layer model, "
                f"got {e}."
            )


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
        backbone = self.backbone
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        h = backbone.embed_tokens(ids)  # (B, T, D)
        rope = backbone.rotary_emb(h, position_ids=positions)
        states = {}
        for number, layer in enumerate(backbone.layers[: max(stops)], 1):
            if number - 1 not in dropped:
                # Without a mask the attention is causal; pads stand behind what is real.
                h = layer(h, attention_mask=None, position_ids=positions, position_embeddings=rope)
            if number in stops:
                states[number] = h
        return states

    def normed(self, h: Tensor) -> Tensor:
        """Returns the final norm of (..., D) states: what the shared head is applied to."""
        return self.backbone.norm(h)

    @property
    def head(self) -> Tensor:
        """(V, D), frozen."""
        return self.model.get_base_model().lm_head.weight


def save_adapter(model: PeftModel, folder: Path, record: dict[str, Any]) -> None:
    """``folder`` holds the adapter in bf16, as peft reads it, and ``exits.json`` about it.

    Raises:
        HispecError: The disk is full or the folder cannot be written.
    """
    from peft import get_peft_model_state_dict

    state = {k: v.to(torch.bfloat16) for k, v in get_peft_model_state_dict(model).items()}
    try:
        model.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
        (folder / "exits.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise HispecError(f"Cannot write {folder}: {error.strerror or error}.") from error


def merge_adapter(checkpoint: Checkpoint, adapter: Path, folder: Path, dtype: torch.dtype) -> None:
    """``folder`` holds the base with the adapter folded in: a plain Llama checkpoint.

    Args:
        checkpoint: The base the adapter was trained on.
        adapter: As saved by ``save_adapter`` or by peft.
        folder: Where to save; with the tokenizer's files.
        dtype: To save in. The sum itself is taken in fp32.

    Raises:
        CheckpointError: There is no adapter, or it belongs to another base.
    """
    from peft import PeftModel

    if not (adapter / "adapter_config.json").exists():
        raise CheckpointError(f"{adapter} holds no adapter (adapter_config.json is missing).")
    record = adapter / "exits.json"
    if record.exists():
        wanted = json.loads(record.read_text()).get("base_fingerprint")
        if wanted not in (None, checkpoint.fingerprint):
            raise CheckpointError(
                f"{adapter} was trained on another base ({wanted}) than {checkpoint.name} "
                f"({checkpoint.fingerprint})."
            )
    base = base_model(checkpoint, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(base, str(adapter))
        except RuntimeError as error:  # shapes that do not fit
            reason = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(f"{adapter} does not fit {checkpoint.name}: {reason}") from error
    merged = model.merge_and_unload().to(dtype)
    merged.save_pretrained(str(folder))
    checkpoint.tokenizer.save_pretrained(str(folder))
