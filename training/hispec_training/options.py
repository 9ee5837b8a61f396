"""What the training commands share: checks of options, and how they speak and end."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence

from hispec.errors import HispecError, UsageError


def say(line: str) -> None:
    """The line is on stderr."""
    print(line, file=sys.stderr, flush=True)


def require(packages: Iterable[str]) -> None:
    """Raises ``UsageError`` if one of these packages, which training needs, is not installed."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UsageError(
                f"training needs the package {error.name or name}: pip install 'hispec[train]'."
            ) from error


def check_at_least_one(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ``UsageError`` if one of these options is given and below 1."""
    _check(args, names, lambda value: value >= 1, "be at least 1")


def check_above_zero(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ``UsageError`` if one of these options is given and not above 0."""
    _check(args, names, lambda value: value > 0, "be above 0")


def check_not_negative(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ``UsageError`` if one of these options is given and below 0."""
    _check(args, names, lambda value: value >= 0, "not be negative")


def check_share(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ``UsageError`` if one of these options is given and not in [0, 1]."""
    _check(args, names, lambda value: 0 <= value <= 1, "lie in [0, 1]")


def check_exits(exits: Sequence[int], num_layers: int) -> None:
    """Raises ``UsageError`` if there is no exit, or one that is no layer of the model."""
    if not exits:
        raise UsageError("At least one exit layer is needed.")
    for e in exits:
        if not 0 <= e < num_layers:
            raise UsageError(
                f"exit_layer must be in [0, {num_layers - 1}] for this {num_layers}-layer model, "
                f"got {e}."
            )


def exit_layers(text: str | None, num_layers: int, *, own: bool = False) -> list[int]:
    """Returns the exits asked for, ascending.

    If none are: before the first layer, which costs least, and a quarter of the depth; or, where
    the model's ``own`` head is to work there, an eighth and a quarter.

    Raises:
        UsageError: One is not a layer of this model.
    """
    if text is None:
        eighth, quarter = (max(1, int(num_layers / part + 0.5)) for part in (8, 4))
        return sorted({eighth if own else 0, quarter})
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f"--exits takes layers such as 4,8, got {text!r}.") from None
    check_exits(layers, num_layers)
    return layers


def run(
    program: str,
    about: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    main: Callable[[argparse.Namespace], int],
) -> None:
    """The program has run and ends with its exit code; our errors are one sentence on stderr."""
    parser = argparse.ArgumentParser(prog=program, description=about)
    add_arguments(parser)
    try:
        sys.exit(main(parser.parse_args()))
    except HispecError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)


def _check(
    args: argparse.Namespace, names: Iterable[str], fine: Callable[[float], bool], must: str
) -> None:
    for name in names:
        value = getattr(args, name)
        if value is not None and not fine(value):
            raise UsageError(f"--{name.replace('_', '-')} must {must}, got {value}.")
