"""``hispec bench``: the same prompts, answered by every method, timed side by side."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hispec.commands import options
from hispec.errors import UsageError

if TYPE_CHECKING:
    from hispec.bench.folder import RunFolder
    from hispec.generation import LM

#: Tokens on which agreement of a shared head is looked at.
_TEXT_ENOUGH = 128

METHODS = "ar,layerskip,hispec,auto,hf,hf-prompt-lookup"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_model(parser)
    add_prompts(parser)
    parser.add_argument(
        "--methods",
        default=METHODS,
        metavar="LIST",
        help="of ar, layerskip, hispec, layerskip-paper, hispec-paper, hd, auto, a hierarchy's "
        "JSON file, lookahead, adadecode, hf, hf-early-exit, hf-prompt-lookup, llama-cpp, "
        "llama-cpp-lookup "
        f"(default: {METHODS}); plain decoding always runs",
    )
    options.add_level(
        parser,
        "a smaller model of the same vocabulary (repeatable): every hierarchy, plain decoding too, "
        "runs once more with it below its levels",
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="R")
    parser.add_argument("--out", metavar="DIR", help="the run's folder; an unfinished one goes on")
    parser.add_argument("--json", action="store_true", help="end with one JSON document")
    parser.epilog = (
        "hispec bench report RUN... rebuilds a report or compares runs; hispec bench sweep looks "
        "for the best exits and windows."
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is asked."""
    parser.add_argument(
        "--prompts",
        default="builtin",
        metavar="FILE",
        help="a JSONL file (prompt, messages, turns or prompt_ids), builtin, or humaneval, gsm8k, "
        "cnn_dm, xsum, dolly, each from the hub or NAME=FOLDER",
    )
    parser.add_argument(
        "--limit", type=int, metavar="K", help="at most K prompts, spread over the categories"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--raw", action="store_true", help="no chat template")


def main(args: argparse.Namespace) -> int:
    """Runs the comparison; returns 1 if a method failed on any prompt."""
    from hispec.bench.prompts import load_prompts
    from hispec.bench.run import Plan

    plan = Plan(load_prompts(args.prompts, args.limit), args.max_new_tokens, args.repeats, args.raw)
    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods names no method. Give at least one, such as hispec.")
    from hispec.bench.report import write_report
    from hispec.bench.roster import build, gguf_of

    lm, exact = load_exact(args)
    bench, methods = build(lm, names, gguf_of(args.model), exact=exact, levels=args.level)
    out = Path(args.out) if args.out else default_folder("bench", args.model)
    folder = execute(plan, out, bench, methods)
    document = write_report(folder)
    print((folder.path / "report.md").read_text(encoding="utf-8"))
    print(f"The report with pictures: {folder.path / 'report.html'}", file=sys.stderr)
    if args.json:
        print(json.dumps(document))
    return 1 if any(entry["error"] for entry in document["methods"].values()) else 0


def load_exact(args: argparse.Namespace) -> tuple[LM, bool]:
    """Returns the model, ready for exact numerics, and whether methods are to use them.

    Plain decoding in exact numerics is what tokens are compared with, whatever ``--numerics`` says.

    Raises:
        UsageError: unknown numerics, or what loading finds wrong.
    """
    if args.numerics not in ("exact", "fast"):
        raise UsageError(f"unknown numerics {args.numerics!r}. Use exact or fast.")
    # Models of --level stand in rows of their own, not below all that is named.
    given = {**vars(args), "numerics": "exact", "level": ()}
    return options.load_model(argparse.Namespace(**given)), args.numerics == "exact"


def execute(plan: Any, out: Path, bench: Any, methods: Any) -> RunFolder:
    """Runs, or goes on with, the run in folder ``out`` and returns it, finished."""
    from hispec.bench.folder import RunFolder
    from hispec.bench.prompts import encode
    from hispec.bench.provenance import collect
    from hispec.bench.roster import explain_early_exit
    from hispec.bench.run import Run

    with RunFolder.create(out, plan.settings(bench.lm, methods), collect(bench.lm)) as folder:
        print(f"The run's folder: {folder.path}", file=sys.stderr)
        run = Run(plan, folder, bench, methods)
        if not folder.document.get("notes"):
            some = encode(bench.lm, plan.prompts.prompts[0], raw=plan.raw)[:_TEXT_ENOUGH]
            explain_early_exit(bench.lm, methods, some)
            folder.note({method.name: method.note for method in methods})
        run()
    return folder


def default_folder(kind: str, model: str) -> Path:
    """Returns ``bench-runs/DATE-KIND-MODEL`` below the current folder."""
    name = re.sub(r"[^\w.-]+", "-", Path(model).name or "model")
    return Path("bench-runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}-{name}"
