"""What every program here begins and ends with: signals, one error message, an exit code.

No Python exception ends a program by itself: its exit code would be 1, which is a gate's. Keep the
imports few: Ctrl-C must be caught from the first line on.
"""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from rldecoder import interrupts
from rldecoder.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    GateFailedError,
    InterruptedRunError,
    RlDecoderError,
)

SHOW_TRACEBACK = "RLDECODER_TRACEBACK"
"""Environment variable: any value shows the traceback of every error on the terminal."""


def guarded(command: Callable[[], int | None]) -> int:
    """Run a program's work; the exit code says how it ended, and an error is one message.

    0 done, 1 a gate said no, 2 something foreseeable that the user can mend, 3 interrupted (Ctrl-C,
    SIGTERM, or nobody reads the output any more), 70 a fault of the program. An interruption that
    comes when the work is done but not yet told of still gives 3; the same command then finds all
    of it finished.

    Args:
        command: may give an exit code of its own; None is 0.
    """
    try:
        code = _run(command)
        interrupts.settle(code)
    except KeyboardInterrupt:  # asked again while the first request was told of
        code = EXIT_INTERRUPTED
        interrupts.settle(code)
    return code


def leave(code: int) -> NoReturn:
    """End the program with an exit code of `guarded`.

    Once a KeyboardInterrupt has passed through C code that runs Python (one of 32 interruptions
    while imports ran), CPython ends by SIGINT itself, whatever the exit code is. So an interrupted
    program does what is left to do and goes.
    """
    if code == EXIT_INTERRUPTED:
        # Threads are not waited for: what they write is renamed into place when it is whole, so a
        # file is there or not. Whatever fails here must not change the code.
        try:
            atexit._run_exitfuncs()
            _give_up_output()
        finally:
            os._exit(code)
    sys.exit(code)


def _run(command: Callable[[], int | None]) -> int:
    try:
        interrupts.listen()
        _mend_streams()
        code = command() or EXIT_DONE
        interrupts.check()  # a request that was dropped
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return code
    except BaseException as raised:
        interrupts.obey()
        error = _as_ours(raised)
        if os.environ.get(SHOW_TRACEBACK):
            traceback.print_exception(raised)
        if error is not None:
            print_error(error)
        _give_up_output()
        return EXIT_INTERRUPTED if error is None else error.exit_code


def _as_ours(raised: BaseException) -> RlDecoderError | None:
    """What to say of anything that was raised; None when nobody reads the output any more."""
    if isinstance(raised, GateFailedError):
        return raised
    # Whatever an interruption was turned into on its way up.
    if interrupts.asked() or isinstance(raised, KeyboardInterrupt):
        return InterruptedRunError(
            "Interrupted.",
            "What was published is safe and checkpoints are kept.",
            "The same command goes on from there.",
        )
    # rich and typer answer a closed pipe with SystemExit(1).
    if isinstance(raised, BrokenPipeError) or (
        isinstance(raised, SystemExit) and isinstance(raised.__context__, BrokenPipeError)
    ):
        return None
    from rldecoder import failures

    return failures.foreseen(raised) or failures.unexpected(raised)


def print_error(error: RlDecoderError) -> None:
    """One message on stderr: what, why, and how to mend it."""
    from rich.markup import escape

    from rldecoder.terminal import Terminal

    target = Terminal(stderr=True)
    target.print(f"[bold red]error:[/bold red] {escape(error.what)}")
    for part in (error.why, error.mend):
        if part:
            target.print(f"  {escape(part)}")


def _mend_streams() -> None:
    """Output never fails over a character, such as that of a file name that is not Unicode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _give_up_output() -> None:
    """Throw away what cannot be written: Python would try again at exit, and end with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
