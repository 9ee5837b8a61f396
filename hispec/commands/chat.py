"""``hispec chat``: a conversation whose cache is kept from turn to turn."""

from __future__ import annotations

import argparse
import sys

from hispec.commands import options
from hispec.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    options.add_model(parser)
    options.add_generation(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")


def main(args: argparse.Namespace) -> int:
    """Reads turns from stdin until it ends; returns the exit code."""
    settings = options.generation_settings(args)
    with options.utf8("--system"):
        (args.system or "").encode()
    from hispec.advice import outgrown  # torch: after the cheap checks

    lm = options.load_model(args)
    if not lm.tokenizer.chat_template:
        raise UsageError(f"{args.model} has no chat template. Use hispec generate --raw.")
    options.ban_words(lm, args, settings)
    lm.hierarchy(settings["hierarchy"])  # a wrong exit is said before the first turn
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (line editing for input())

        print("/reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends.\n")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(opening)
    while (turn := _read(interactive)) is not None:
        if turn == "/reset":
            messages = list(opening)
            continue
        if not turn.strip():
            continue
        messages.append({"role": "user", "content": turn})
        try:
            stream = lm.stream(messages, continued=True, **settings)
        except UsageError as error:
            messages.pop()
            print(f"hispec: {error} Or /reset.", file=sys.stderr)
            continue
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        print("\n" if interactive else "", flush=True)
        messages.append({"role": "assistant", "content": stream.result.text})
        if args.stats:
            options.print_stats(stream.result)
        if advice := outgrown(lm, stream.result):
            print(f"hispec: {advice}", file=sys.stderr)
    return 0


def _read(interactive: bool) -> str | None:
    """Returns the next turn, or None when there is none.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        with options.utf8("stdin"):
            turn = input("> " if interactive else "")
            turn.encode()  # bytes that are no text may come as lone surrogates
        return turn
    except (EOFError, KeyboardInterrupt):
        if interactive:
            print()
        return None
