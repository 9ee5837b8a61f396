"""``hispec generate``: one prompt, answered as it is decoded."""

from __future__ import annotations

import argparse
import json
import sys

from hispec.commands import options
from hispec.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_model(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="- reads stdin")
    parser.add_argument("--raw", action="store_true", help="no chat template")
    options.add_generation(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, no text")


def main(args: argparse.Namespace) -> int:
    """Streams the answer to stdout; returns the exit code."""
    settings = options.generation_settings(args)
    prompt = options.read_text(args.prompt)
    if not prompt.strip():
        raise UsageError("the prompt is empty. Give at least one character.")
    lm = options.load_model(args)
    from hispec.advice import warning  # torch: after the cheap checks

    stream = lm.stream(prompt, raw=args.raw, **settings)
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
    advice = warning(lm, result)
    if advice:
        print(f"hispec: {advice}", file=sys.stderr)
    return code
