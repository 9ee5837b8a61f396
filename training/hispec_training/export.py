"""The saved form of trained exits: a folder that says what it is and which model it belongs to.

``config.json`` names the exits, how they were measured and the base by its weights' fingerprint;
``exit_{e}.safetensors`` holds one head in bf16 under the names of its parameters; ``README.md``
is a model card made from both. ``hispec.model.exits`` reads the same folder to draft with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hispec.errors import CheckpointError, UsageError
from hispec.files import replacing
from hispec.model.checkpoint import Checkpoint
from hispec.model.exits import FORMAT
from hispec.model.exits import Exits as Record
from hispec_training.card import model_card
from hispec_training.exits import Exits
from hispec_training.files import save_tensors
from hispec_training.heads import ExitHead, HeadSpec
from hispec_training.least_squares import start_from_neighbour
from hispec_training.shard_cache import Texts

VERSION = 1
# peft names an adapter inside its tensors' names; the file has one and does not.
_PEFT = re.compile(r"(lora_[AB])\.weight")


class TrainedExits(nn.Module):
    """Heads with the record that goes with them.

    Args:
        heads: By exit layer.
        vocab_ids: By exit layer, (V',) the token of each row; None for all rows.
        record: What ``config.json`` holds.
    """

    def __init__(
        self,
        heads: Mapping[int, ExitHead],
        vocab_ids: Mapping[int, Tensor | None],
        record: dict[str, Any],
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(e): head for e, head in sorted(heads.items())})
        self.vocab_ids = dict(vocab_ids)
        self.record = record

    @classmethod
    def from_training(
        cls,
        exits: Exits,
        checkpoint: Checkpoint,
        acceptance: Mapping[int, Mapping[str, Any]] | None = None,
        *,
        training: Mapping[str, Any] | None = None,
    ) -> TrainedExits:
        """The heads of a finished run.

        Args:
            exits: What was trained.
            checkpoint: Its base.
            acceptance: Table of each exit (``Tally.table()``).
            training: What the card should say about the run: data, steps, seconds, hardware.
        """
        vocab_size = checkpoint.config.vocab_size
        rows = {e: exits.vocab_ids(e) for e in exits.specs}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "base": {
                "model": Path(checkpoint.name).name
                if Path(checkpoint.name).exists()
                else checkpoint.name,
                "revision": checkpoint.revision,
                "fingerprint": checkpoint.fingerprint,
            },
            "num_layers": checkpoint.config.num_layers,
            "hidden_size": checkpoint.config.hidden_size,
            "vocab_size": vocab_size,
            "exits": [
                {
                    "exit_layer": e,
                    "kind": spec.kind,
                    "context": spec.context,
                    "feature": spec.feature,
                    "feature_maps": spec.feature_maps,
                    "vocab_size": len(rows[e]),
                    **_borrowed(spec, checkpoint.config.num_layers),
                    "acceptance": dict((acceptance or {}).get(e, {})),
                }
                for e, spec in sorted(exits.specs.items())
            ],
            "training": dict(training or {}),
            "hierarchies": {},
        }
        return cls(
            {e: exits.heads[str(e)] for e in exits.specs},
            {e: ids if len(ids) < vocab_size else None for e, ids in rows.items()},
            record,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """The folder holds config, weights in bf16 and the model card; each file whole or absent.

        Raises:
            OSError: If the disk is full or the folder cannot be written.
        """
        folder = Path(folder)
        for name, head in self.heads.items():
            tensors = _own_tensors(head)
            if (scale := tensors.pop("input_scale", None)) is not None:
                tensors["proj.weight"] = tensors["proj.weight"] / scale
            tensors = {n: x.bfloat16() for n, x in tensors.items()}
            ids = self.vocab_ids.get(int(name))
            if ids is not None:
                tensors["vocab_ids"] = ids.cpu().int()
            tensors = {n: x.contiguous() for n, x in sorted(tensors.items())}
            save_tensors(folder / f"exit_{name}.safetensors", tensors, {"format": "pt"})
        self.save_record(folder)

    def save_record(self, folder: str | Path) -> None:
        """The folder's config and model card are this record's; its weights stay as they are.

        Raises:
            OSError: If the disk is full or the folder cannot be written.
        """
        # The config is last: a folder without it holds no exits.
        config = json.dumps(self.record, indent=2) + "\n"
        for name, text in (("README.md", model_card(self.record)), ("config.json", config)):
            with replacing(Path(folder) / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, checkpoint: Checkpoint, *, force: bool = False
    ) -> TrainedExits:
        """The heads of a folder, in fp32, ready to be used or trained on.

        Args:
            folder: Local folder, or a hub id.
            checkpoint: The base they should belong to.
            force: Load them onto other weights of the same shape.

        Raises:
            UsageError: If there are none, or they belong to another base.
            CheckpointError: If a file is damaged or does not fit.
        """
        path = local_folder(folder)
        record = Record.open(path)
        record.check_base(checkpoint, force=force)
        heads: dict[int, ExitHead] = {}
        vocab: dict[int, Tensor | None] = {}
        for entry in record.record["exits"]:
            e = int(entry["exit_layer"])
            spec = HeadSpec(
                e,
                entry["kind"],
                entry["context"],
                entry.get("feature", False),
                entry["vocab_size"],
                feature_maps=entry.get("feature_maps", 1),
                start_layer=entry.get("layer", -1),
                rank=entry.get("rank", 1),
            )
            head = ExitHead(spec, checkpoint.config).start_from(checkpoint)
            file = path / f"exit_{e}.safetensors"
            try:
                tensors = load_file(file)
                ids = tensors.pop("vocab_ids", None)
                if "proj.weight" in tensors:
                    tensors["input_scale"] = torch.ones_like(head.input_scale)
                tensors = {_PEFT.sub(r"\1.default.weight", n): x for n, x in tensors.items()}
                loaded = head.load_state_dict({n: x.float() for n, x in tensors.items()}, False)
                frozen = {n for n, p in head.named_parameters() if not p.requires_grad}
                if odd := [*loaded.unexpected_keys, *(set(loaded.missing_keys) - frozen)]:
                    raise KeyError(f"{odd[0]} is missing or has no place")
            except Exception as error:  # safetensors and torch raise kinds of their own
                raise CheckpointError(
                    f"{file} is damaged or does not fit {checkpoint.name}: "
                    f"{str(error).splitlines()[0]}."
                ) from error
            heads[e], vocab[e] = head, None if ids is None else ids.long()
        return cls(heads, vocab, dict(record.record))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """The folder stands on the hub; returns its address.

        Args:
            repo_id: Such as ``name/smollm2-135m-exits``; created if it is not there.
            private: Whether a new repository is private.
            token: Of the hub; the stored login if None.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Trained exits")
        return str(address)


def _borrowed(spec: HeadSpec, num_layers: int) -> dict[str, int]:
    """What finds the rest of a head that keeps one of the model's own layers."""
    if spec.kind != "lora":
        return {}
    return {"layer": spec.start_layer % num_layers, "rank": spec.rank}


def _own_tensors(head: ExitHead) -> dict[str, Tensor]:
    """The head's tensors on the CPU, those that are the model's left out."""
    frozen = {n for n, p in head.named_parameters() if not p.requires_grad}
    found = {n: x.detach().cpu() for n, x in head.state_dict().items() if n not in frozen}
    return {n.replace(".default.weight", ".weight"): x for n, x in found.items()}


def local_folder(folder: str | Path) -> Path:
    """Returns the folder, fetched if it is a hub id.

    Raises:
        UsageError: There is none here, and none could be fetched.
    """
    path = Path(folder).expanduser()
    if path.exists() or str(folder).count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(folder)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"There is no folder {folder} here and no exits of that name could be fetched from the "
            "hub: check the spelling or the network."
        ) from error


def donor_of(exit_layer: int, saved: TrainedExits) -> int:
    """Returns which saved exit a head starts from: the one at its layer, or else the nearest."""
    return min((int(name) for name in saved.heads), key=lambda e: (abs(e - exit_layer), e))


def load_into(exits: Exits, saved: TrainedExits, cache: Texts | None = None) -> None:
    """Heads under training take the weights of saved ones of the same shape (a warm start).

    Where none was saved at a head's layer, the nearest one serves behind a projection of its own.

    Args:
        exits: The heads.
        saved: Where they start from.
        cache: Texts with the states of both heads' exits where they differ.

    Raises:
        UsageError: If a saved exit is made of other parts, or one is missing and there are no
            texts to fit another one to.
    """
    for exit_layer in exits.specs:
        head, name = exits.heads[str(exit_layer)], donor_of(exit_layer, saved)
        donor = saved.heads[str(name)]
        try:
            if name == exit_layer:
                head.load_state_dict(donor.state_dict())
            elif cache is not None:
                start_from_neighbour(head, donor, cache)
            else:
                raise UsageError(f"The saved exits have none at layer {exit_layer}.")
        except RuntimeError as error:
            raise UsageError(
                f"The saved exit {name} is made of other parts than the one asked for."
            ) from error
