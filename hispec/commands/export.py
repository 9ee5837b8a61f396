"""``hispec export``: a folder for the hub whose ``generate`` is hispec's, in plain transformers.

With ``--cut`` it is the model's first layers alone: a small Llama that drafts (``--level``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hispec import __version__
from hispec.errors import UsageError
from hispec.files import FULL, unwritable
from hispec.hierarchy import Hierarchy, check_preset

if TYPE_CHECKING:
    from hispec.model.checkpoint import Checkpoint
    from hispec.model.exits import Exits

#: What a model is made of, besides its weights.
_FILES = ("*.json", "*.jinja", "*.model", "*.txt")

_GENERATE = '''\
"""``model.generate`` by hispec: the same tokens, fewer passes. Needs ``pip install hispec``."""

HIERARCHY = {hierarchy}


def generate(*args, model, **options):
    from hispec import hf
    from hispec.hierarchy import Hierarchy

    names = ("hierarchy", "assistant_early_exit", "prompt_lookup_num_tokens")
    if HIERARCHY is not None and all(options.get(name) is None for name in names):
        is_preset = isinstance(HIERARCHY, str)
        options["hierarchy"] = HIERARCHY if is_preset else Hierarchy.from_json(HIERARCHY)
    return hf.generate(model, *args, **options)
'''

_CARD = """\
---
library_name: transformers
tags:
- custom_generate
- speculative-decoding
- hispec
---

# {name}

{what} `generate` runs hierarchical self-speculative decoding
([hispec](https://pypi.org/project/hispec/)): early exits of the model and n-gram databases draft,
the model confirms. Greedy ids are those of transformers' own `generate`, rounding ties apart.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

{use}
inputs = tokenizer("Why is the sky blue?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, {argument}max_new_tokens=64)[0]))
```

All arguments of `generate` for one text or a padded batch are taken, with processors, stopping
criteria and streamers; further ones are `hierarchy`, `seed`, `numerics`, `exits`. Beam search and
other modes are refused.
"""

_WHOLE = """\
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")"""

_RECIPE = """\
model = AutoModelForCausalLM.from_pretrained("{model}")
tokenizer = AutoTokenizer.from_pretrained("{model}")"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--model", required=True, metavar="M", help="as in hispec generate")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="a folder that is not there yet"
    )
    parser.add_argument("--exits", metavar="DIR", help="trained exits (default: those shipped)")
    parser.add_argument(
        "--hierarchy", metavar="H", help="what generate uses by default: a preset or a JSON file"
    )
    parser.add_argument(
        "--no-weights",
        action="store_true",
        help="only custom_generate and the exits, to be used with a model from elsewhere",
    )
    parser.add_argument(
        "--cut",
        type=int,
        metavar="N",
        help="instead: the first N layers with the model's own norm and head, a model for --level",
    )


def main(args: argparse.Namespace) -> int:
    """Writes the folder; returns the exit code."""
    out = Path(args.out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UsageError(f"{out} is there already. Name a folder that is not.")
    if args.cut is not None and (args.hierarchy or args.no_weights):
        raise UsageError("--cut writes plain layers. Drop --hierarchy and --no-weights.")
    hierarchy = _hierarchy(args.hierarchy)
    from hispec.model.checkpoint import open_checkpoint  # torch: after the cheap checks
    from hispec.model.exits import Exits, shipped_exits

    checkpoint = open_checkpoint(args.model)
    if args.exits:
        exits: Exits | None = Exits.open(Path(args.exits))
        assert exits is not None
        exits.check_base(checkpoint)
    else:
        exits = shipped_exits(checkpoint)
    place = Path(os.path.abspath(out))  # "." has no name
    with _whole(place) as part:
        if args.cut is None:
            _write_hub(part, place.name, args, checkpoint, exits, hierarchy)
        else:
            from hispec.model.cut import write_cut

            write_cut(checkpoint, args.cut, part)
    if args.cut is None:
        drafts = f"exits {', '.join(map(str, exits.exit_layers))}" if exits else "no exits"
        said = f"{out} is ready for the hub, with {drafts}."
    else:
        said = f"{out} holds {args.cut} layers of {args.model}; --level {out} lets them draft."
        if args.cut not in _trained_own(args.model, exits):
            said += (
                f" Nothing says that its own norm and head were trained to work there (hispec "
                f"train --mode lora --exits {args.cut}), so expect little of it."
            )
    print(f"hispec: {said}", file=sys.stderr)
    print(out)
    return 0


def _trained_own(model: str, exits: Exits | None) -> tuple[int, ...]:
    """Returns the exits at which the model's own norm and head are known to have been trained."""
    from hispec.model.exits import Exits

    try:
        return (exits or Exits.open(Path(model))).own  # a folder of hispec train --mode lora
    except UsageError:
        return ()


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yields an empty folder whose files become those of ``out`` when all are written.

    Otherwise it vanishes. An ``out`` that is there and empty stays the same folder: it may be the
    one the user stands in, or a disk of its own.

    Args:
        out: An absolute path, of nothing or of an empty folder.

    Raises:
        UsageError: A file cannot be read, or ``out`` cannot be written.
    """
    part = (out if out.is_dir() else out.parent) / f".{out.name}.{os.getpid()}.part"
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise UsageError(unwritable(out, error)) from None
    try:
        yield part
        if out.is_dir():
            for file in sorted(part.iterdir()):
                file.rename(out / file.name)
        else:
            part.rename(out)
    except OSError as error:
        # A full disk may come with the name of the file that was being copied.
        file = Path(str(error.filename or part))
        if error.errno in FULL or file.is_relative_to(part):
            raise UsageError(unwritable(out, error)) from None
        raise UsageError(f"cannot read {file}: {error.strerror or error}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_hub(
    part: Path,
    name: str,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    exits: Exits | None,
    hierarchy: str | dict[str, object] | None,
) -> None:
    """Fills the folder for the hub."""
    if not args.no_weights:
        for pattern in (*_FILES, "*.safetensors"):
            for file in sorted(checkpoint.path.glob(pattern)):
                shutil.copyfile(file, part / file.name)
    if exits is not None:
        (part / "exits").mkdir()
        for file in sorted(exits.path.iterdir()):  # not the folders training left beside them
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, part / "exits" / file.name)
    code = part / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text(_GENERATE.format(hierarchy=repr(hierarchy)))
    (code / "requirements.txt").write_text(f"hispec>={__version__}\n")
    (part / "README.md").write_text(_card(name, args.model, whole=not args.no_weights))


def _hierarchy(given: str | None) -> str | dict[str, object] | None:
    if given is None:
        return None
    if given.endswith(".json"):
        hierarchy = Hierarchy.load(Path(given))
        if hierarchy.models:
            raise UsageError(
                f"{given} names a separate model, which a folder for the hub does not carry. Drop "
                f"{hierarchy.models[0].name}."
            )
        return json.loads(json.dumps(hierarchy.to_json()))
    check_preset(given)
    return given


def _card(name: str, model: str, *, whole: bool) -> str:
    use = (_WHOLE if whole else _RECIPE).format(name=name, model=model)
    argument = "" if whole else f'custom_generate="{name}", trust_remote_code=True, '
    what = f"Made from {model}." if whole else f"Exits and `generate` for {model}."
    return _CARD.format(name=name, what=what, use=use, argument=argument)
