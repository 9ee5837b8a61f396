"""A loaded transformers Llama in the place of a checkpoint.

Its tensors are read under the names a checkpoint has for them, so that everything that loads from a
folder loads from memory as well. Where peft has wrapped a module, what is read is the weight that
its active adapters make of it; the model itself is not touched. Where nothing has to be merged,
moved or reordered, tensors are shared, not copied.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hispec.errors import CheckpointError
from hispec.model.checkpoint import Checkpoint, expected_shapes, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Of each tensor, three times; as in :meth:`TensorFile.sample`.
SAMPLE_BYTES = 4096
#: safetensors' names.
_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class ModuleWeights:
    """Reads the weights of a transformers ``LlamaForCausalLM``, which it does not keep alive.

    Args:
        model: the model; its layers may be wrapped by peft.

    Attributes:
        name: what the model was loaded from.
        path: that folder, or the hub's cached copy; it need not exist.
        config: its sizes; tied only if head and embedding are one tensor.
        device: where its weights are.
        dtype: of its weights.

    Raises:
        CheckpointError: it is no Llama, is spread over devices, quantized, or has forward hooks.
    """

    eos_token_ids: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self.name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.path = _local_folder(self.name)
        raw = {**model.config.to_dict(), "quantization_config": None}
        config = read_config(raw, self.name)
        words, head = self._module("model.embed_tokens"), self._module("lm_head")
        tied = not _wrapped(words) and not _wrapped(head) and words.weight is head.weight
        self.config = replace(config, tie_word_embeddings=tied)
        places = {(p.device, p.dtype) for p in self._parameters()}
        devices = sorted({str(device) for device, _ in places})
        dtypes = sorted({str(dtype) for _, dtype in places})
        if len(devices) > 1 or "meta" in devices:
            raise CheckpointError(
                f"{self.name} lies on {' and '.join(devices)}; hispec needs it whole on one device."
            )
        if len(dtypes) > 1 or not next(iter(places))[1].is_floating_point:
            raise CheckpointError(
                f"{self.name} holds weights in {' and '.join(dtypes)}; hispec runs one of bf16, "
                f"fp16 and fp32: load it with dtype=."
            )
        self.device, self.dtype = next(iter(places))

    def tensor(self, name: str) -> Tensor:
        """Returns a weight, detached: shared with the module unless adapters change it.

        Args:
            name: as in a checkpoint, such as ``model.layers.0.mlp.up_proj.weight``.

        Raises:
            CheckpointError: there is no such module.
        """
        path, _, kind = name.rpartition(".")
        module = self._module(path)
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module = _merged(module)
        found = getattr(module, kind, None)
        if not isinstance(found, Tensor):
            raise CheckpointError(f"{self.name} has no tensor {name}.")
        return found.detach()

    def __contains__(self, name: str) -> bool:
        return name in expected_shapes(self.config)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that lies where the model came from, or None."""
        if not (self.path / "tokenizer.json").exists():
            return None
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(self.path))

    @functools.cached_property
    def fingerprint(self) -> str:
        """As a checkpoint's: that of the folder the model came from, while dtype and weights are.

        See :attr:`Checkpoint.fingerprint`.
        """
        digest = hashlib.sha256()
        for name in sorted(expected_shapes(self.config)):
            tensor = self.tensor(name).contiguous().cpu()
            kind = _DTYPES[tensor.dtype]
            digest.update(f"{name}|{kind}|{tuple(tensor.shape)}|".encode())
            raw = tensor.reshape(-1).view(torch.uint8)
            last = max(len(raw) - SAMPLE_BYTES, 0)
            for start in sorted({0, last // 2, last}):
                digest.update(raw[start : start + SAMPLE_BYTES].numpy().tobytes())
        return digest.hexdigest()[:32]

    def as_checkpoint(self) -> Checkpoint:
        """Returns itself, typed as what it stands in for."""
        return cast("Checkpoint", self)

    def stamp(self) -> Hashable:
        """Returns something that changes when the weights or the active adapters do.

        In-place changes raise a tensor's version, but not through ``.data``, which optimizers and
        peft's merging use; so three values of each tensor are looked at as well.
        """
        model = self._living()
        parameters = list(model.parameters())
        samples = [
            p.detach().reshape(-1)[:: max(1, p.numel() // 2)][:3].float()
            for p in parameters
            if p.numel()
        ]
        values = torch.cat(samples).tolist()  # sync: once a call
        adapters = tuple(
            (
                name,
                repr(getattr(module, "active_adapters", None)),
                bool(getattr(module, "disable_adapters", False)),
                repr(getattr(module, "merged_adapters", None)),
                repr(getattr(module, "scaling", None)),
            )
            for name, module in model.named_modules()
            if _wrapped(module)
        )
        places = tuple((p.data_ptr(), p._version) for p in parameters)
        return places, tuple(values), adapters

    # ------------------------------------------------------------------ modules

    def _living(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None, "the module is gone"
        return model

    def _module(self, path: str) -> Any:
        """Returns a module by its checkpoint path, the active one where peft keeps several."""
        try:
            module: Any = self._living().get_submodule(path)
        except AttributeError:
            raise CheckpointError(
                f"{self.name} has no module {path}: hispec runs transformers' LlamaForCausalLM, "
                f"this is {type(self._living()).__name__}."
            ) from None
        if module._forward_hooks or module._forward_pre_hooks:
            raise CheckpointError(
                f"{path} has forward hooks, which hispec's own passes would not run. Remove them "
                f"(or adapter_names, which makes such hooks)."
            )
        if hasattr(module, "modules_to_save"):
            active = list(module.active_adapters)
            if module.disable_adapters or not active:
                return module.original_module
            return module.modules_to_save[active[0]]
        return module

    def _parameters(self) -> Iterator[nn.Parameter]:
        for name in expected_shapes(self.config):
            path, _, kind = name.rpartition(".")
            module = self._module(path)
            while hasattr(module, "base_layer"):
                module = module.base_layer
            yield getattr(module, kind)


def _local_folder(name: str) -> Path:
    """Returns the folder that a name stands for, looking into the hub's cache but not the hub."""
    if not Path(name).is_dir() and name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return Path(found).parent
    return Path(name)


def _wrapped(module: nn.Module) -> bool:
    """Whether peft has wrapped a module."""
    return hasattr(module, "base_layer") or hasattr(module, "modules_to_save")


def _merged(layer: Any) -> Any:
    """Returns the plain module that a peft layer's active adapters make of its base."""
    if layer.disable_adapters:
        if layer.merged:
            raise CheckpointError("adapters are merged and disabled at once. Unmerge them first.")
        return layer.base_layer
    if not layer.merged:
        with torch.no_grad():
            layer = copy.deepcopy(layer)
            layer.merge()
    return layer.get_base_layer()
