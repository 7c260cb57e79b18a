"""A member of a team on a machine of the cluster: works in a thread, and says so when asked.

Of Ray this module knows nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from rldecoder.executors.far_worker import Answer, FarProcess, Opening, machine
from rldecoder.executors.teams import TeamTask, take_part

_LISTEN_SECONDS = 0.02


class FarMember(FarProcess):
    """Is opened, started once, and heard until it is killed.

    Args:
        address: of this machine in the cluster: over its interface tensors are exchanged.
        device_ids: as in `FarProcess`.
    """

    def __init__(
        self, address: Callable[[], str], device_ids: Callable[[], Sequence[str]] | None = None
    ) -> None:
        super().__init__(device_ids)
        self._address = address
        self._opening: Opening[TeamTask] | None = None
        self._lines = _Lines()

    def open(self, opening: str, wait_seconds: float) -> str:
        """Get ready for a task (an `Opening`, as JSON).

        Args:
            wait_seconds: how long to wait for a device that another process holds.
        """
        return self._answer(
            lambda: self._open(Opening[TeamTask].model_validate_json(opening), wait_seconds)
        )

    def start(self, rank: int, size: int, meeting: str) -> str:
        """Begin.

        Args:
            meeting: a file in the task's folder, of this attempt.
        """
        return self._answer(lambda: self._start(rank, size, Path(meeting)))

    def hear(self, seconds: float) -> str:
        """The lines that were said since; waits for a first one."""
        return "".join(self._lines.take(seconds))

    def _open(self, opening: Opening[TeamTask], wait_seconds: float) -> Answer:
        busy = self._prepare(opening, wait_seconds)
        if busy is not None:
            return busy
        opening.job.function()  # imported before the team's clock runs
        self._opening = opening
        return Answer(machine=machine())

    def _start(self, rank: int, size: int, meeting: Path) -> Answer:
        import torch

        if self._opening is None:
            raise RuntimeError("no task was opened")
        if (name := interface(self._address())) is not None:
            for setting in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(setting, name)
        device, threads = torch.device(self._device or "cpu"), self._opening.threads
        task, lines = self._opening.job, self._lines

        def work() -> None:
            torch.set_num_threads(threads)  # which is each thread's own
            take_part(task, rank, size, device, meeting, lines)

        threading.Thread(target=work, name="member", daemon=True).start()
        return Answer()


class _Lines:
    """A stream that another thread reads."""

    def __init__(self) -> None:
        self._said: deque[str] = deque()

    def write(self, text: str) -> None:
        self._said.append(text)

    def flush(self) -> None:
        """Nothing is kept back."""

    def take(self, seconds: float) -> list[str]:
        deadline = time.monotonic() + seconds
        while not self._said and time.monotonic() < deadline:
            time.sleep(_LISTEN_SECONDS)
        found = []
        while self._said:
            found.append(self._said.popleft())
        return found


def interface(address: str) -> str | None:
    """The network interface of this machine that has an address; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in [known.address for known in addresses]:
            return name
    return None
