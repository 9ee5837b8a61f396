"""What can go wrong on the user's side, as exceptions.

Every message is one sentence that names what was given and what to do about it; the command line
prints it as it stands and ends with ``exit_code``. Anything else that escapes is a bug of ours.
"""

from __future__ import annotations


class HispecError(Exception):
    """Something outside this program's control failed: the message says what and what to do."""

    exit_code = 1


class UsageError(HispecError, ValueError):
    """The caller asked for something that does not exist or makes no sense."""

    exit_code = 2


class CheckpointError(HispecError):
    """A model could not be found, read, understood or converted."""
