"""The mean of two trainings: exits that went on from others, and the others.

    python scripts/average_exits.py BEFORE AFTER OUT

After a few hundred steps at a fresh rate the weights lie across a valley from where they started,
and half-way is lower than either end (arXiv 2203.05482). BEFORE and AFTER are folders of exits,
AFTER trained with ``--start-from BEFORE``. OUT gets BEFORE's config, card and columns (the tokens a
head knows: their rows are the model's own and not trained), and the exits that AFTER lacks as they
are. ``python -m hispec_training.measure --write`` puts the acceptance right.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("before", "after", "out"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} is there already: name a new folder.")
    means = {}
    for path in sorted(args.before.glob("exit_*.safetensors")):
        if not (args.after / path.name).exists():
            print(f"{path.name}: as it was", file=sys.stderr)
            continue
        first, second = load_file(path), load_file(args.after / path.name)
        if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
            parser.error(f"{path.name} has other tensors in {args.after}: not trained from these.")
        for name, tensor in first.items():
            if tensor.is_floating_point():
                mean = (tensor.float() + second[name].float()) / 2
                first[name] = mean.to(tensor.dtype)
        means[path.name] = first
        print(f"{path.name}: the mean", file=sys.stderr)
    shutil.copytree(args.before, args.out)
    for name, tensors in means.items():
        with safe_open(args.before / name, "pt") as file:
            metadata = file.metadata()
        save_file(tensors, args.out / name, metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
