"""The command line: ``hispec COMMAND …``.

stdout is the result, stderr everything else. A command's module is imported when the command is
given, and torch when it does something, so that help and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from hispec import __version__
from hispec.errors import HispecError, UsageError
from hispec.files import FULL, unwritable

#: command → (what it does, the module with ``add_arguments(parser)`` and ``main(args) -> int``)
COMMANDS = {
    "generate": ("answer a prompt", "hispec.commands.generate"),
    "chat": ("talk to the model", "hispec.commands.chat"),
    "bench": ("compare methods on prompts", "hispec.commands.bench"),
    "bench report": (
        "rebuild a benchmark's report or compare runs",
        "hispec.commands.bench_report",
    ),
    "bench sweep": ("find the best exits and windows", "hispec.commands.bench_sweep"),
    "plan": ("find the fastest hierarchy for this model here", "hispec.commands.plan"),
    "ngrams build": (
        "count text or answers into a database that drafts",
        "hispec.commands.ngrams_build",
    ),
    "ngrams info": ("show what a database holds", "hispec.commands.ngrams_info"),
    "ngrams merge": ("make one database of several", "hispec.commands.ngrams_merge"),
    "distill": ("let the model continue prompts: training data", "hispec_training.distill"),
    "train": ("add exits to a model", "hispec_training.trainer"),
    "export": ("write a hub folder whose generate is hispec's", "hispec.commands.export"),
    "doctor": ("show what is installed and what would be used", "hispec.commands.doctor"),
}


class Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` instead of printing usage, and suggests the option that was meant."""

    def error(self, message: str) -> NoReturn:
        """Raises ``UsageError`` with argparse's message."""
        raise UsageError(f"{message}. See {self.prog} --help.")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Returns the parsed arguments; unknown options are errors with the nearest known one."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        # Before argparse, which would rather miss --model than see a misspelt --modle.
        for argument in arguments:
            if argument == "--":
                break
            name = argument.split("=")[0]
            known = any(option.startswith(name) for option in options)
            if name.startswith("--") and " " not in argument and not known:
                self._unknown(name, options)
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            self._unknown(unknown[0], options)
        return args

    def _unknown(self, name: str, options: Sequence[str]) -> NoReturn:
        hint = _nearest(name, options)
        raise UsageError(f"unknown argument {name}.{hint} See {self.prog} --help.")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0, 1 (failed), 2 (usage), 130 (Ctrl-C); SIGTERM raises ``SystemExit(143)``.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    verbose = "-v" in arguments or "--verbose" in arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        with _terminated_as_exit():
            code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that went away shows here at the latest
        return code
    except HispecError as error:
        if verbose:
            traceback.print_exc()
        print(f"hispec: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nhispec: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (head, less): not our error. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if verbose:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in FULL:
            print(f"hispec: {unwritable(error.filename or 'the output', error)}", file=sys.stderr)
            return 1
        text = str(error).strip().split("\n")[0]
        print(f"hispec: {type(error).__name__}: {text} (-v shows where)", file=sys.stderr)
        return 1


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Inside, SIGTERM raises ``SystemExit`` with its usual code, so that files end in order."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hispec {__version__}")
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name = " ".join(arguments[:words])
    group = {key: value for key, value in COMMANDS.items() if key.startswith(f"{name} ")}
    if name not in COMMANDS and group:
        if arguments[1:] and arguments[1] not in ("-h", "--help"):
            hint = _nearest(" ".join(arguments[:2]), group)
            raise UsageError(f"unknown command {' '.join(arguments[:2])!r}.{hint}")
        print(f"usage: hispec {name} COMMAND [options]\n\ncommands:\n{_listed(group)}")
        return 0
    if name not in COMMANDS:
        hint = _nearest(name, [*COMMANDS, "--help", "--version"])
        raise UsageError(f"unknown command {name!r}.{hint} See hispec --help.")
    summary, module_name = COMMANDS[name]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        extra = {"bench": "bench", "distill": "train", "train": "train"}.get(arguments[0])
        if extra is None or (error.name or "").startswith("hispec"):
            raise
        raise HispecError(
            f"hispec {name} needs the package {error.name}: pip install 'hispec[{extra}]'."
        ) from None
    parser = Parser(prog=f"hispec {name}", description=summary.capitalize() + ".")
    module.add_arguments(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")
    return module.main(parser.parse_all(arguments[words:]))


def _overview() -> str:
    return (
        "usage: hispec COMMAND [options]\n\n"
        "Lossless, faster text generation from one Llama checkpoint.\n\n"
        f"commands:\n{_listed(COMMANDS)}\n\n"
        "hispec COMMAND --help shows a command's options.\n"
        'Start with: hispec generate --model smollm2-135m --prompt "Why is the sky blue?" --stats'
    )


def _listed(commands: Mapping[str, tuple[str, str]]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in commands.items())


if __name__ == "__main__":
    sys.exit(main())
