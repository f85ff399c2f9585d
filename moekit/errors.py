"""The errors a user can cause.

Every one is a :class:`MoekitError` whose message says what was given, what is wanted and what to
do. The command line prints that message alone and ends with exit code 2; a library user can catch
the base class, or the builtin that each also is.
"""

from __future__ import annotations


class MoekitError(Exception):
    """Base of every error that moekit raises for a mistake that its user can mend."""


class SpecError(MoekitError, ValueError):
    """A design, router, bank or loss that contradicts itself or names something unknown."""


class SignalError(MoekitError, ValueError):
    """A router needs a signal that the call did not pass, or that has the wrong shape."""


class DataError(MoekitError, ValueError):
    """A file, folder or hub name that cannot be read as text, or that holds none."""


class CheckpointError(MoekitError, ValueError):
    """A checkpoint that is missing, incomplete, corrupt or of another kind."""


class OutputError(MoekitError, OSError):
    """A result that cannot be written where it was asked for."""


class DivergedError(MoekitError, ArithmeticError):
    """Training whose loss stopped being a finite number."""


class ProcessError(MoekitError, RuntimeError):
    """A process that did part of the work and ended without a result."""


class MissingExtraError(MoekitError, ImportError):
    """A feature whose optional dependency is not installed."""


def first_line(error: Exception) -> str:
    """What a foreign error says, in a line."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
