"""LoRA adapters opened like models: the base with ``W + (alpha / r) B A`` folded in, once.

An adapter is a folder as peft saves it: ``adapter_config.json``, which names the base and the
scales, and ``adapter_model.safetensors``. Opening one merges it into its base in the user's cache;
from there on it is a plain Llama folder, for us and for transformers alike. Where ``hispec train``
made it, a record of its exits lies beside it (``config.json``) and names the base's weights.

Sums are taken in float64 and rounded once, to the base's own dtype. A product of two bf16 numbers
has 16 bits, so the sums of a bf16 adapter are exact in any order, and the merged weights (hence
their fingerprint, by which exits are found) are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hispec.errors import CheckpointError
from hispec.model.store import build_once, cache_dir, require_space
from hispec.model.tensorfile import TensorFile, write_tensors

if TYPE_CHECKING:
    from hispec.model.checkpoint import Checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Adapters that come with hispec, by the name that opens them.
SHIPPED = {
    file.parent.name: file.parent
    for file in sorted((Path(__file__).parent.parent / "exits").glob(f"*/{CONFIG}"))
}

# Raised when the sum changes, so that folders merged by an older one are left alone.
_VERSION = 1
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
# Options under which an adapter is more than its two matrices.
_MORE = ("use_dora", "fan_in_fan_out", "lora_bias", "bias", "modules_to_save", "layer_replication")
# Ways to start that put a part of the base's weights into the matrices.
_STARTS = ("pissa", "olora", "corda", "loftq")
# The linears whose outputs a head's scales multiply.
_SCALED = {"block.self_attn.o_proj": "attention_scale", "block.mlp.down_proj": "mlp_scale"}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG).exists() and not any(folder.glob("model*.safetensors*"))


@dataclass(frozen=True)
class Adapter:
    """An adapter whose config has been read.

    Attributes:
        folder: Where it lies.
        base: Name of the model it belongs to, as the user who trained it gave it.
        fingerprint: Of the base's weights, where training noted it; else None.
        config: All of adapter_config.json.
        file: The weights.
    """

    folder: Path
    base: str
    fingerprint: str | None
    config: Mapping[str, Any]
    file: TensorFile

    @staticmethod
    def open(folder: Path) -> Adapter:
        """Returns the adapter of a folder.

        Raises:
            CheckpointError: There is none, it is damaged, or it is of a kind that is no plain sum.
        """
        if not (folder / CONFIG).exists():
            raise CheckpointError(f"{folder} holds no adapter ({CONFIG} is missing).")
        config = _read_object(folder / CONFIG)
        record = folder / "config.json"
        base = config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise CheckpointError(f"{folder / CONFIG} does not say which model it belongs to.")
        if not (folder / WEIGHTS).exists():
            raise CheckpointError(f"{folder} has no {WEIGHTS}: copy or download it again.")
        odd = [name for name in _MORE if config.get(name) not in (None, False, [], "none")]
        if str(config.get("init_lora_weights")).startswith(_STARTS):
            odd.append("init_lora_weights")
        if config.get("peft_type") != "LORA" or odd:
            what = odd[0] if odd else f"peft_type {config.get('peft_type')!r}"
            raise CheckpointError(
                f"{folder} is an adapter with {what}, which is no plain LoRA: merge it with peft's "
                "merge_and_unload() and save_pretrained(), and open the result."
            )
        of = _read_object(record).get("adapter_of") if record.exists() else None
        fingerprint = of.get("fingerprint") if isinstance(of, dict) else None
        return Adapter(folder, base, fingerprint, config, TensorFile(folder / WEIGHTS))

    def check_base(self, base: Checkpoint) -> None:
        """Raises ``CheckpointError`` if it was trained on other weights than ``base``."""
        if self.fingerprint not in (None, base.fingerprint):
            raise CheckpointError(
                f"{self.folder} was trained on another base ({self.fingerprint}) than {base.name} "
                f"({base.fingerprint})."
            )

    def scale(self, module: str, rank: int) -> float:
        """Returns what the product at a module is multiplied by; a rank is that of its matrices."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            # peft's own rule: the pattern is the name's end, from a dot on
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def updates(self, base: Checkpoint) -> dict[str, tuple[str, str]]:
        """Returns weight of the base → names of A and B.

        Raises:
            CheckpointError: A tensor is none of LoRA's, or the base has no such weight or shape.
        """
        halves: dict[str, dict[str, str]] = {}
        for name in self.file.entries:
            found = _NAME.fullmatch(name)
            if not found:
                raise CheckpointError(f"{self.file.path} holds {name}, which is no LoRA matrix.")
            halves.setdefault(found["module"] + ".weight", {})[found["half"]] = name
        for weight, pair in halves.items():
            fits = set(pair) == {"A", "B"} and weight in base
            if fits:
                a, b = (self.file.entries[pair[half]].shape for half in "AB")
                shape = base.files[weight].entries[weight].shape
                fits = len(a) == len(b) == 2 and (b[0], a[1]) == shape and a[0] == b[1]
            if not fits:
                raise CheckpointError(f"{self.folder} does not fit {base.name} at {weight}.")
        return {weight: (pair["A"], pair["B"]) for weight, pair in halves.items()}


def merge(adapter: Adapter, base: Checkpoint, folder: Path) -> None:
    """``folder`` holds the base with the adapter folded in, dtypes and all else as in the base.

    Args:
        adapter: What to fold in.
        base: The model it was trained on.
        folder: An existing folder.

    Raises:
        CheckpointError: The adapter belongs to another base, or there is no room.
        OSError: The folder cannot be written.
    """
    adapter.check_base(base)
    updates = adapter.updates(base)
    # A tied checkpoint may hold its head twice; the embedding is what everyone reads.
    tied = base.config.tie_word_embeddings
    names = [name for name in base.tensors() if not (tied and name == "lm_head.weight")]

    def produce(name: str) -> Tensor:
        weight = base.tensor(name)
        if name not in updates:
            return weight
        a, b = (adapter.file.read(half).double() for half in updates[name])
        scale = adapter.scale(name.removesuffix(".weight"), a.shape[0])
        return (weight.double() + scale * (b @ a)).to(weight.dtype)

    specs = [
        (name, base.files[name].dtype(name), base.files[name].entries[name].shape) for name in names
    ]
    num_bytes = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in specs)
    require_space(folder, num_bytes + (16 << 20), f"{adapter.folder.name} merged into its base")
    write_tensors(folder / "model.safetensors", specs, produce)
    for file in base.path.iterdir():  # config, tokenizer, template
        if file.is_file() and ".safetensors" not in file.name and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def merged_folder(path: Path) -> Path:
    """Returns the folder in the user's cache with an adapter merged into its base, made once.

    Args:
        path: The adapter's folder.

    Raises:
        CheckpointError: The adapter or its base cannot be opened, or they do not fit.
    """
    from hispec.model.checkpoint import open_checkpoint

    adapter = Adapter.open(path)
    if Path(adapter.base).expanduser().absolute() == path.absolute():
        raise CheckpointError(f"The adapter {path} names itself as its base.")
    try:
        base = open_checkpoint(adapter.base)
    except CheckpointError as error:
        raise CheckpointError(
            f"The base of the adapter {path} cannot be opened: {error}"
        ) from error
    adapter.check_base(base)
    digest = hashlib.sha256(base.fingerprint.encode())
    for name in (CONFIG, WEIGHTS):
        digest.update((path / name).read_bytes())

    def build(folder: Path) -> None:
        merge(adapter, base, folder)

    return build_once(
        cache_dir() / "merged" / f"v{_VERSION}-{digest.hexdigest()[:32]}",
        build,
        is_whole=_is_whole,
        label=f"{path.name} merged into {adapter.base}",
    )


def block_of_layer(
    tensors: Mapping[str, Tensor], checkpoint: Checkpoint, layer: int
) -> dict[str, Tensor]:
    """Returns a head's tensors with a whole block: the model's own layer and the head's updates.

    Args:
        tensors: Of the head; ``block.M.lora_{A,B}.weight`` are added to linear M as ``B A``, and
            ``block.{attention,mlp}_scale`` (D,) multiply what attention and MLP put out.
        checkpoint: The model.
        layer: Which of its layers.

    Raises:
        KeyError: A matrix is missing.
    """
    prefix = f"model.layers.{layer}."
    whole = {n: x for n, x in tensors.items() if ".lora_" not in n and not n.endswith("_scale")}
    for name in checkpoint.tensors():
        if not name.startswith(prefix):
            continue
        own = "block." + name.removeprefix(prefix)
        module = own.rsplit(".", 1)[0]
        found = checkpoint.tensor(name).double()
        if own.endswith(".weight") and f"{module}.lora_B.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{half}.weight"].double() for half in "AB")
            found = found + b @ a
        if module in _SCALED:
            scale = tensors[f"block.{_SCALED[module]}"].double()
            found = found * scale.view(-1, *[1] * (found.ndim - 1))
        whole[own] = found.float()
    return whole


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / "config.json").read_bytes())
        TensorFile(folder / "model.safetensors")
    except (OSError, ValueError, CheckpointError):
        return False
    return True


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} should hold a JSON object: copy or save it again.")
    return found
