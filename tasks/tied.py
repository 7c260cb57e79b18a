"""Child processes that never outlive their parent.

Each of these measures alone left orphans when tried: a session of its own, so that
the whole group can be killed; the kernel's parent-death signal, for a parent that dies by
kill -9; and a group kill on every exception. This module does the first two, and `stop` the third.

It doubles as the launcher: run as a script it asks for the signal and then becomes the command.
That is safer than `preexec_fn`, which runs Python between fork and exec of a threaded process.
Keep its imports few: they are paid by every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    death_signal: signal.Signals = signal.SIGKILL,
    **popen: Any,
) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, tied to this process.

    The tie is to the calling *thread*: the kernel sends `death_signal` when that thread ends, so
    call this from one that outlives the child. On systems other than Linux there is no such
    signal, and only `stop` ends the child.

    Args:
        pass_fds: descriptors that the child inherits, such as a device lease's.
        popen: further arguments of `subprocess.Popen`.
    """
    launcher = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(death_signal))]
    return subprocess.Popen(
        [*launcher, *command],
        env=None if env is None else dict(env),
        pass_fds=tuple(pass_fds),
        start_new_session=True,
        **popen,
    )


def stop(process: subprocess.Popen[bytes], grace_seconds: float = 5.0) -> None:
    """End the child and everything in its session: SIGTERM, then SIGKILL after the grace.

    The child is collected last: until then its number cannot be given to another process, so
    the signals reach its group and no other. A child that was collected before is left alone.
    """
    if process.returncode is not None:
        return
    _signal_group(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while not _has_ended(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    # Also when the leader has gone: its own children may still be in the group.
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _has_ended(pid: int) -> bool:
    """Whether our own child has ended, without collecting it."""
    import psutil  # not at the top: the launcher must stay light (os.waitid is not everywhere)

    return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(group, number)


def _become(parent: int, death_signal: int, command: list[str]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, death_signal, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # the parent died before the signal was asked for
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
