"""Options that several commands share, and how they become a model and settings."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.errors import UsageError
from hispec.hierarchy import Hierarchy, check_preset

if TYPE_CHECKING:
    from hispec.generation import LM, Result


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model to load, and how."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="a hub id, a folder, a .gguf file, or smollm2-135m",
    )
    parser.add_argument("--exits", metavar="DIR", help="trained exits (default: those shipped)")
    parser.add_argument(
        "--force-exits", action="store_true", help="use exits that were trained on other weights"
    )
    parser.add_argument("--dtype", default="auto", metavar="auto|bf16|fp16|fp32")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument(
        "--numerics",
        default="exact",
        metavar="exact|fast",
        help="exact: the very tokens of plain decoding; fast: up to rounding ties",
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the options of one generation."""
    parser.add_argument(
        "--hierarchy",
        default="auto",
        metavar="H",
        help="ar, layerskip, hispec, layerskip-paper, hispec-paper, auto, or a JSON file",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)"
    )
    parser.add_argument("--stats", action="store_true", help="print statistics to stderr")


def read_text(given: str) -> str:
    """Returns an option's text, or all of stdin where it is ``-``.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        text = sys.stdin.read() if given == "-" else given
        text.encode()  # bytes that are no text come from the shell as lone surrogates
    except UnicodeError:
        source = "stdin" if given == "-" else "the prompt"
        raise UsageError(f"{source} is not valid UTF-8. Convert it first.") from None
    return text


def load_model(args: argparse.Namespace) -> LM:
    """Returns the model the options name."""
    from hispec.generation import load

    return load(
        args.model,
        exits=args.exits,
        dtype=args.dtype,
        device=args.device,
        numerics=args.numerics,
        force_exits=args.force_exits,
    )


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of ``LM.stream``; what can be checked without a model is.

    Raises:
        UsageError: a number out of range, or a hierarchy that is none.
    """
    if args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    hierarchy: str | Hierarchy = args.hierarchy
    if args.hierarchy.endswith(".json"):
        hierarchy = Hierarchy.load(Path(args.hierarchy))
    else:
        check_preset(args.hierarchy)
    return {
        "hierarchy": hierarchy,
        "max_new_tokens": args.max_new_tokens,
        "stop": args.stop,
    }


def print_stats(result: Result) -> None:
    """Prints what a generation did, to stderr."""
    lines = [
        f"{result.num_tokens} tokens ({result.finish_reason}), "
        f"{result.tok_per_s:.1f} tok/s decoding {result.decode_s:.2f} s, "
        f"prefill {result.num_prompt_tokens} tokens {result.prefill_s:.2f} s",
        f"{result.hierarchy} · {result.dtype} {result.device}, {result.numerics} numerics",
        f"{result.block_efficiency:.2f} tokens a full pass, "
        f"{result.layer_visits_per_token:.1f} layer visits a token",
    ]
    for level in result.levels:
        line = f"  {level.name:<8} {level.passes:5d} passes  {level.time_s:6.2f} s"
        if level.drafted:
            line += (
                f"  drafted {level.drafted:5d}  accepted {level.accepted:5d}"
                f"  ({level.accepted / level.drafted:.0%})"
            )
        lines.append(line)
    print("\n".join(lines), file=sys.stderr)
