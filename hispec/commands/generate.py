"""``hispec generate``: one prompt, answered as it is decoded, or a file of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hispec.commands import options
from hispec.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_model(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="- reads stdin")
    asked.add_argument(
        "--prompts",
        metavar="FILE",
        help='JSON lines (.gz too) with "prompt", "messages" or "turns"',
    )
    parser.add_argument(
        "--out", metavar="FILE", help="answers to --prompts; goes on where it was left"
    )
    parser.add_argument("--raw", action="store_true", help="no chat template")
    options.add_generation(parser)
    parser.add_argument("--n", type=int, default=1, metavar="N", help="samples of each prompt")
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="each token's log-probability, in what --json prints or --out holds",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, no text")


def main(args: argparse.Namespace) -> int:
    """Streams the answer to stdout, or answers the file; returns the exit code."""
    settings = options.generation_settings(args)
    if args.n < 1 or (args.n > 1 and settings["sampling"].greedy):
        raise UsageError(
            f"--n {args.n}: at least 1 is needed."
            if args.n < 1
            else f"--n {args.n} at temperature 0 would give the same text {args.n} times. Give a "
            f"--temperature."
        )
    if args.prompts is not None:
        return _answer_file(args, settings)
    if args.out is not None:
        raise UsageError("--out belongs to --prompts. Redirect stdout to keep one answer.")
    if args.logprobs and not args.json:
        raise UsageError("--logprobs are shown in JSON alone. Add --json, or drop --logprobs.")
    prompt = options.read_text(args.prompt)
    if not prompt.strip():
        raise UsageError("the prompt is empty. Give at least one character.")
    lm = options.load_model(args)
    options.ban_words(lm, args, settings)
    settings |= {"raw": args.raw, "logprobs": args.logprobs}
    return _several(lm, prompt, args, settings) if args.n > 1 else _one(lm, prompt, args, settings)


def _one(lm: Any, prompt: str, args: argparse.Namespace, settings: dict[str, Any]) -> int:
    from hispec.advice import outgrown, warning  # torch: after the cheap checks

    stream = lm.stream(prompt, **settings)
    code = 0
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as terminated:
        code = int(terminated.code or 0)
    result = stream.result
    if args.json:
        print(json.dumps(result.to_json()), flush=True)
    else:
        print(flush=True)
    if code:
        print("hispec: interrupted.", file=sys.stderr)
    if args.stats or code:
        options.print_stats(result)
    elif result.seed is not None and args.seed is None:
        print(f"hispec: --seed {result.seed} repeats this text.", file=sys.stderr)
    for advice in (outgrown(lm, result), warning(lm, result)):
        if advice:
            print(f"hispec: {advice}", file=sys.stderr)
    return code


def _several(lm: Any, prompt: str, args: argparse.Namespace, settings: dict[str, Any]) -> int:
    from hispec.advice import outgrown  # torch: after the cheap checks

    results = lm.samples(prompt, args.n, **settings)
    if args.json:
        print(json.dumps({"samples": [result.to_json() for result in results]}), flush=True)
    for number, result in enumerate(results, 1):
        if not args.json:
            print(f"--- {number}\n{result.text}", flush=True)
        if args.stats:
            options.print_stats(result)
    if args.seed is None:
        print(f"hispec: --seed {results[0].seed} repeats these texts.", file=sys.stderr)
    if advice := outgrown(lm, max(results, key=lambda result: result.num_tokens)):
        print(f"hispec: {advice}", file=sys.stderr)
    return 0


def _answer_file(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    if args.out is None:
        raise UsageError("--prompts needs --out FILE, where the answers go.")
    from hispec.answers import Answers, read_rows  # torch: after the cheap checks

    rows = read_rows(Path(args.prompts))
    answers = Answers(Path(args.out), rows, fixed_seed=args.seed is not None)
    lm = options.load_model(args)
    options.ban_words(lm, args, settings)
    settings |= {"raw": args.raw, "logprobs": args.logprobs}
    code = 0
    try:
        answers.run(lm, args.n, settings)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as terminated:
        code = int(terminated.code or 0)
    totals = answers.totals()
    print(answers.summary(), file=sys.stderr)
    if args.json:
        print(json.dumps(totals), flush=True)
    return code or (1 if totals["failed"] else 0)
