"""Options that several commands share, and how they become a model and settings."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.arguments import check_lengths, sampling_of
from hispec.errors import UsageError
from hispec.hierarchy import Hierarchy, check_preset
from hispec.model.bundled import model_help

if TYPE_CHECKING:
    from hispec.generation import LM
    from hispec.result import Result


#: Options that are fields of :class:`hispec.sampling.Sampling`: the kind of value, and the help.
SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 takes the likeliest token"),
    "top_k": (int, "only the K likeliest tokens"),
    "top_p": (float, "only the likeliest tokens of this probability together"),
    "min_p": (float, "only tokens this fraction as likely as the likeliest"),
    "typical_p": (float, "only the most typical tokens of this probability together"),
    "repetition_penalty": (float, "over 1: what has occurred becomes less likely"),
    "presence_penalty": (float, "likewise for what was generated, once"),
    "frequency_penalty": (float, "likewise, each time"),
    "no_repeat_ngram_size": (int, "no sequence of so many tokens occurs twice"),
    "seed": (int, "fixes the text; drawn and reported if not given"),
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which model to load, and how."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help=model_help(),
    )
    parser.add_argument("--exits", metavar="DIR", help="trained exits (default: those shipped)")
    parser.add_argument(
        "--force-exits", action="store_true", help="use exits that were trained on other weights"
    )
    parser.add_argument(
        "--force-plan", action="store_true", help="use plans made for other exits or machines"
    )
    parser.add_argument("--dtype", default="auto", metavar="auto|bf16|fp16|fp32")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument(
        "--numerics",
        default="exact",
        metavar="exact|fast",
        help="exact: the very tokens of plain decoding; fast: up to rounding ties",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="the most tokens of a text; fewer take less memory"
    )


def add_level(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds the option that names separate models."""
    parser.add_argument(
        "--level", action="append", default=[], type=model_path, metavar="M", help=text
    )


def model_path(given: str) -> str:
    """Returns a model's name, or its absolute path: a plan that names it is used elsewhere, too."""
    path = Path(given).expanduser()
    return str(path.resolve()) if path.exists() else given


def add_generation(parser: argparse.ArgumentParser) -> None:
    """Adds the options of one generation."""
    parser.add_argument(
        "--hierarchy",
        default="auto",
        metavar="H",
        help="ar, layerskip, hispec, hd, layerskip-paper, hispec-paper, auto, or a JSON file",
    )
    add_level(
        parser, "a smaller model of the same vocabulary that drafts below the exits (repeatable)"
    )
    parser.add_argument(
        "--corpus", metavar="STORE", help="n-grams of any text, from hispec ngrams build"
    )
    parser.add_argument(
        "--no-learn",
        action="store_true",
        help="keep nothing of this text for later drafts, and use nothing of earlier ones",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--min-new-tokens", type=int, default=0, metavar="N")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (repeatable)"
    )
    sampling = parser.add_argument_group("sampling (greedy without a temperature)")
    for name, (kind, text) in SAMPLING.items():
        sampling.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__[0].upper(), help=text
        )
    sampling.add_argument(
        "--bad-word",
        action="append",
        default=[],
        metavar="TEXT",
        help="never write TEXT, at the start of a word or within one (repeatable)",
    )
    parser.add_argument("--stats", action="store_true", help="print statistics to stderr")


def read_text(given: str) -> str:
    """Returns an option's text, or all of stdin where it is ``-``.

    Raises:
        UsageError: it is not UTF-8.
    """
    with utf8("stdin" if given == "-" else "the prompt"):
        text = sys.stdin.read() if given == "-" else given
        text.encode()  # bytes that are no text come from the shell as lone surrogates
    return text


@contextmanager
def utf8(source: str) -> Iterator[None]:
    """Inside, text that is not UTF-8 raises ``UsageError``, which names its source."""
    try:
        yield
    except UnicodeError:
        raise UsageError(f"{source} is not valid UTF-8. Convert it first.") from None


def load_model(args: argparse.Namespace) -> LM:
    """Returns the model the options name."""
    from hispec.loading import load

    return load(
        args.model,
        exits=args.exits,
        dtype=args.dtype,
        device=args.device,
        numerics=args.numerics,
        force_exits=args.force_exits,
        force_plan=args.force_plan,
        corpus=getattr(args, "corpus", None),
        context=getattr(args, "context", None),
        levels=getattr(args, "level", ()),
    )


def generation_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of ``LM.stream``; what can be checked without a model is.

    Raises:
        UsageError: a number out of range, a text that is none, or a hierarchy that is none.
    """
    for option, texts in (("--stop", args.stop), ("--bad-word", args.bad_word)):
        with utf8(option):
            "".join(texts).encode()
    check_lengths(args.min_new_tokens, args.max_new_tokens, args.stop)
    if any(not word for word in args.bad_word):
        raise UsageError("--bad-word needs a text with something in it.")
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.hierarchy.endswith(".json"):
        # Whether a plan fits is seen when the model is open.
        Hierarchy.load(Path(args.hierarchy)).over(args.level)
    else:
        check_preset(args.hierarchy)
    return {
        "hierarchy": args.hierarchy,
        "max_new_tokens": args.max_new_tokens,
        "min_new_tokens": args.min_new_tokens,
        "learn": not args.no_learn,
        "stop": args.stop,
        "sampling": sampling_of(given).seeded(),
    }


def ban_words(lm: LM, args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Adds ``--bad-word`` to the settings, in both spellings that a tokenizer may have for it."""
    words = [
        list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        for word in args.bad_word
        for text in (word, f" {word}")
    ]
    if words:
        settings["sampling"] = replace(settings["sampling"], bad_words_ids=words)


def print_stats(result: Result) -> None:
    """Prints what a generation did, to stderr."""
    lines = [
        f"{result.num_tokens} tokens ({result.finish_reason}), "
        f"{result.tok_per_s:.1f} tok/s decoding {result.decode_s:.2f} s, "
        f"prefill {result.num_prompt_tokens} tokens {result.prefill_s:.2f} s",
        f"{result.hierarchy} · {result.dtype} {result.device}, {result.numerics} numerics",
        f"{result.block_efficiency:.2f} tokens a full pass, "
        f"{result.layer_visits_per_token:.1f} layer visits a token"
        + (f", seed {result.seed}" if result.seed is not None else ""),
    ]
    names = [x.name for x in result.levels] + [x.name for x in result.sources]
    wide = max(8, *map(len, names))
    for level in result.levels:
        line = f"  {level.name:<{wide}} {level.passes:5d} passes  {level.time_s:6.2f} s"
        if level.drafted:
            line += (
                f"  drafted {level.drafted:5d}  accepted {level.accepted:5d}"
                f"  ({level.accepted / level.drafted:.0%})"
            )
        lines.append(line)
    for source in result.sources:
        lines.append(
            f"  {source.name:<{wide}} {'':12}  {source.time_s:6.2f} s"
            f"  drafted {source.proposed:5d}  accepted {source.accepted:5d}"
        )
    print("\n".join(lines), file=sys.stderr)
