"""Ctrl-C and SIGTERM, kept until the program has obeyed.

Python turns a signal into an exception at whatever line is running then. In a `__del__`, in the
callback of a weakref, in C code that calls back, or under some library's `except BaseException`,
the exception is dropped, and the run would go on as if nobody had asked. So the signal is
remembered here, too: every progress step and every stage boundary raises it again (`check`), and
so does a timer each second, for computations without such steps. Nothing is raised a second time
while the first is on its way up: clean-up is left in peace, unless it takes very long or the user
asks again.

Keep the imports few: the entry points listen before they import anything that is slow.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_REPEAT_SECONDS = 1.0
_CLEANUP_SECONDS = 60.0
"""Longer than any clean-up here takes: the Prefect server and its log are given 35 seconds."""


class _State:
    """What this process was asked, if anything."""

    listening = False
    asked = False
    asked_at = 0.0
    exit_code: int | None = None
    """Set when the program's work and its exit code are decided."""


def listen() -> None:
    """From now on SIGINT and SIGTERM raise KeyboardInterrupt, and are remembered.

    Call it from the main thread. A shell starts background commands with SIGINT ignored; both
    signals must leave a resumable run.
    """
    forget()
    _State.listening, _State.exit_code = True, None
    handle_signals()
    sys.unraisablehook = _unraisable
    sys.excepthook = _uncaught


def handle_signals() -> None:
    """Take the signals back, after a library has put handlers of its own.

    Does nothing in programs that never called `listen`, and outside of the main thread.
    """
    if not _State.listening or threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, _ask)
    signal.signal(signal.SIGALRM, _ask_again)


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _State.asked


def check() -> None:
    """Raise KeyboardInterrupt if the process was asked to stop and has not begun to.

    Other threads go on: what they compute is collected, or dropped, by the main one.
    """
    if _State.asked and threading.current_thread() is threading.main_thread() and not _stopping():
        raise KeyboardInterrupt


def forget() -> None:
    """The request was obeyed, by a server that has shut down, say."""
    _State.asked = False
    obey()


def obey() -> None:
    """The program ends; nothing is raised again unless the user asks again."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def settle(exit_code: int) -> None:
    """The work is done and told of; a signal after this ends the process at once, with the code."""
    _State.exit_code = exit_code
    obey()


def _ask(number: int, frame: FrameType | None) -> None:
    if _State.exit_code is not None:
        os._exit(_State.exit_code)
    _State.asked, _State.asked_at = True, time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, _REPEAT_SECONDS, _REPEAT_SECONDS)
    raise KeyboardInterrupt


def _ask_again(number: int, frame: FrameType | None) -> None:
    if _State.asked and _State.exit_code is None and not _stopping():
        raise KeyboardInterrupt


def _stopping() -> bool:
    """Whether a KeyboardInterrupt is on its way up: `finally`, `with` and `except` blocks run."""
    if time.monotonic() - _State.asked_at > _CLEANUP_SECONDS:
        return False
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def _unraisable(dropped: Any) -> None:
    """A dropped interruption needs no words: it is raised again."""
    if not (_State.asked and isinstance(dropped.exc_value, KeyboardInterrupt)):
        sys.__unraisablehook__(dropped)


def _uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """The same for C code that prints what it drops."""
    if not (_State.asked and isinstance(error, KeyboardInterrupt)):
        sys.__excepthook__(kind, error, trace)
