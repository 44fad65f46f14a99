"""The errors a user may see. Each says what is wrong, where, with which numbers, and carries a hint."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable


class LowRankError(Exception):
    """Something failed: bad data, a broken file, a non-finite number. Exit code 1.

    Args:
        message: what is wrong, where, with the numbers.
        hint: what to do about it, if possible a command that can be run.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class NonFiniteError(LowRankError):
    """A loss, gradient or weight that became NaN or Inf in training."""


class UsageError(LowRankError):
    """Wrong usage or configuration: another call would work. Exit code 2."""

    exit_code = 2


class DoesNotFitError(LowRankError):
    """A budget that cannot be met. Exit code 3."""

    exit_code = 3


class CheckFailedError(LowRankError):
    """A check ran and its verdict is no. Exit code 4."""

    exit_code = 4


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """One sentence for a hint: the closest of `choices` to `word`, or all of them when none is close."""
    known = sorted(choices)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f'did you mean "{close[0]}"?'
    return "choose from: " + ", ".join(known)


def need_packages(names: Iterable[str], *, extra: str, wanted_by: str) -> None:
    """Refuse what takes packages that are not installed.

    Args:
        names: of packages, as they are imported.
        extra: of lowrank-kit, that brings them.
        wanted_by: what asks for them, as the user wrote it.

    Raises:
        UsageError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"{wanted_by} needs the package {name}, which is not installed",
                hint=f"pip install 'lowrank-kit[{extra}]'",
            )
