"""Errors that say what happened, why, and how to mend it; each knows its exit code."""

from __future__ import annotations

from pathlib import Path

from rldecoder.urls import without_credentials

EXIT_DONE = 0
EXIT_GATE_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 3
EXIT_UNEXPECTED = 70
"""`EX_SOFTWARE` of sysexits.h; Python's own code for uncaught exceptions, 1, is a gate's."""


class RlDecoderError(Exception):
    """Root of every error this project raises on purpose.

    Args:
        what: what happened, with the offending value.
        why: the reason, when it is known.
        mend: what the user can do, naming the setting or the command.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, why: str = "", mend: str = "") -> None:
        # Whatever a library said, a URL in it goes to logs and flow states without its password.
        self.what, self.why, self.mend = map(without_credentials, (what, why, mend))
        super().__init__(" ".join(part for part in (self.what, self.why, self.mend) if part))

    def __reduce__(self) -> tuple[type[RlDecoderError], tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.mend)


class BadInputError(RlDecoderError):
    """The user's file, setting, model or text cannot be used as it is."""


class DamagedFileError(RlDecoderError):
    """A file's content does not match what was published, or cannot be parsed."""


class StoreBusyError(RlDecoderError):
    """Another run is building the same artifact at this moment."""


class NoResourceError(RlDecoderError):
    """Too little disk or memory, or no device that is free."""


class BudgetExceededError(RlDecoderError):
    """The next paid request might use more than the budget allows; it was not sent."""


class NumericalError(RlDecoderError):
    """NaN or infinity where numbers were expected, or training that collapsed."""


class GateFailedError(RlDecoderError):
    """A quality gate said no. The report is published all the same."""

    exit_code = EXIT_GATE_FAILED


class InterruptedRunError(RlDecoderError):
    """The run was stopped by the user; checkpoints are kept and a rerun resumes."""

    exit_code = EXIT_INTERRUPTED


class UnexpectedError(RlDecoderError):
    """A fault of this program: nobody foresaw it, so it is to be reported."""

    exit_code = EXIT_UNEXPECTED


def require_empty(folder: Path, why: str) -> None:
    """Refuse to write into a folder that holds something already.

    Args:
        folder: need not exist.
        why: what would go wrong.

    Raises:
        BadInputError: it is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInputError(
            f"{folder} is not an empty folder.", why, "Name a folder that does not exist yet."
        )
