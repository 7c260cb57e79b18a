"""A team on this machine: one process a device, or all on the CPU."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING

from rldecoder.errors import NoResourceError
from rldecoder.executors.teams import (
    POLL_SECONDS,
    Attempt,
    Heard,
    TeamTask,
    loopback,
    take_part,
)

if TYPE_CHECKING:
    import torch

_END_SECONDS = 10.0
"""How long the kernel may take to end a process that was killed."""
_PR_SET_PDEATHSIG = 1


def require_devices(size: int, device: torch.device) -> None:
    """Raises NoResourceError where there are fewer CUDA devices than processes."""
    import torch

    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise NoResourceError(
            f"{size} processes were asked for; {torch.cuda.device_count()} devices are visible.",
            "Every process needs a device of its own.",
            "Lower `train_sae.processes`, or make more devices visible.",
        )


class LocalAttempt(Attempt):
    """Processes of this machine, which end when this one does.

    Each is forked from a server that has imported the work and done nothing else: one import for
    all, and no CUDA or thread that a fork would break.

    Args:
        device: of the first one; the others take the next ones, or the CPU as well.
        threads: of torch in each.
    """

    def __init__(self, task: TeamTask, size: int, device: torch.device, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="rldecoder-team-")
        meeting = Path(self._folder.name) / "meeting"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([task.module])
        self._processes: list[ForkServerProcess] = []
        self._pipes: dict[connection.Connection, int] = {}
        try:
            for rank in range(size):
                reading, writing = context.Pipe(duplex=False)
                self._pipes[reading] = rank
                # The words of the task, for a model would be pickled.
                process = context.Process(
                    target=_join,
                    args=(task.model_dump_json(), rank, size, device.type, threads,
                          os.fspath(meeting), writing),
                    daemon=True,
                )  # fmt: skip
                process.start()
                self._processes.append(process)
                writing.close()  # else its end is never heard
        except BaseException:
            self.close()
            raise

    def heard(self) -> Sequence[Heard]:
        """See `Attempt.heard`."""
        found: list[Heard] = []
        for pipe in connection.wait(list(self._pipes), POLL_SECONDS):
            assert isinstance(pipe, connection.Connection)
            rank = self._pipes[pipe]
            try:
                while pipe.poll():
                    found.append(Heard(rank, pipe.recv_bytes().decode()))
            except (EOFError, OSError):
                del self._pipes[pipe]
                pipe.close()
                found.append(Heard(rank, None, self._ended(rank)))
        return found

    def _ended(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(_END_SECONDS)
        code = process.exitcode
        with suppress(ValueError, TypeError):
            return f"it was ended by {signal.Signals(-(code or 0)).name}"
        return f"it ended with exit status {code}"

    def close(self) -> None:
        """See `Attempt.close`."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_END_SECONDS)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


class _PipeLines:
    """A pipe as a stream of lines."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe

    def write(self, text: str) -> None:
        self._pipe.send_bytes(text.encode())

    def flush(self) -> None:
        """A pipe keeps nothing back."""


def _join(
    task: str, rank: int, size: int, kind: str, threads: int, meeting: str,
    pipe: connection.Connection,
) -> None:  # fmt: skip
    """What each of the processes runs."""
    # The parent decides what an interruption ends; where it dies itself, its server does, too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    import torch

    torch.set_num_threads(threads)
    if (name := loopback()) is not None:
        for setting in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(setting, name)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    take_part(
        TeamTask.model_validate_json(task), rank, size, device, Path(meeting), _PipeLines(pipe)
    )
    pipe.close()

    # Gloo's threads may still free tensors; while the interpreter is torn down that aborts the
    # process (pytorch/pytorch#179291), and a training that is done would count as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
