"""A team on a Ray cluster: an actor a member, each where Ray has room, all at once or none."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rldecoder import files, interrupts
from rldecoder.config.executor import ExecutorConfig
from rldecoder.errors import NoResourceError
from rldecoder.executors import ray_session
from rldecoder.executors.far_worker import Answer, Opening
from rldecoder.executors.ray_session import Gone
from rldecoder.executors.teams import (
    POLL_SECONDS,
    Attempt,
    Heard,
    LostError,
    TeamTask,
    lost,
    no_resource,
)
from rldecoder.reporting import Reporter

DEVICE_SECONDS = 1.0
"""How long a member waits for a device before it says that it is taken."""
HEAR_SECONDS = 1.0
"""How long a member is listened to that says nothing."""
TOLD_SECONDS = 30.0
"""After which the user hears that there is no room yet."""


class RayAttempt(Attempt):
    """Members on a cluster, ready and at work when this is made.

    Args:
        config: what each member needs.
        opening: what each is told first.
        timeout_seconds: how long to wait for room and for devices.
        report: told why it waits.

    Raises:
        LostError: a member was lost before it could begin.
        NoResourceError: there is no room for all.
        RlDecoderError: a member cannot do such work.
    """

    def __init__(
        self, config: ExecutorConfig, opening: Opening[TeamTask], size: int,
        timeout_seconds: float, report: Reporter,
    ) -> None:  # fmt: skip
        self._meeting = opening.job.folder / f"meeting-{uuid.uuid4().hex}"
        self._places, self._actors = ray_session.hire_together(size, config.cpus, config.gpus)
        self._asked: dict[Any, int] = {}
        try:
            self._wait_for_room(config, size, timeout_seconds, report)
            self._open(opening.model_dump_json(), timeout_seconds, report)
            # They wait for each other, so all are told before any is heard.
            self._call("start", range(size), lambda rank: (rank, size, str(self._meeting)))
            for rank in range(size):
                self._ask(rank)
        except BaseException:
            self.close()
            raise

    def heard(self) -> Sequence[Heard]:
        """See `Attempt.heard`."""
        found: list[Heard] = []
        for ref in ray_session.answered(list(self._asked), POLL_SECONDS):
            rank = self._asked.pop(ref)
            text = ray_session.answer(ref)
            if isinstance(text, Gone):
                found.append(Heard(rank, None, text.why.rstrip(".")))
            else:
                found += [Heard(rank, line) for line in text.splitlines()]
                self._ask(rank)
        return found

    def close(self) -> None:
        """See `Attempt.close`."""
        for actor in self._actors:
            ray_session.kill(actor)
        ray_session.give_back(self._places)
        files.remove(self._meeting)

    def _ask(self, rank: int) -> None:
        self._asked[self._actors[rank].hear.remote(HEAR_SECONDS)] = rank

    def _wait_for_room(
        self, config: ExecutorConfig, size: int, timeout_seconds: float, report: Reporter
    ) -> None:
        began, told = time.monotonic(), False
        while not ray_session.room_is_kept(self._places, POLL_SECONDS):
            interrupts.check()
            waited = time.monotonic() - began
            there = ray_session.what_is_there(config.cpus, config.gpus)
            if waited > timeout_seconds:
                raise NoResourceError(
                    f"The Ray cluster had no room for {size} processes at once within "
                    f"{timeout_seconds:g} s.",
                    there,
                    "Add machines, lower train_sae.processes, executor.cpus or executor.gpus, or "
                    "raise device_timeout_seconds.",
                )
            if waited > TOLD_SECONDS and not told:
                report.note(f"Waiting for room for {size} processes at once. {there}")
                told = True

    def _open(self, opening: str, timeout_seconds: float, report: Reporter) -> None:
        """Have all members get ready; some may have to wait for devices."""
        began = time.monotonic()
        left, told = list(range(len(self._actors))), False
        while left:
            answers = self._call("open", left, lambda rank: (opening, DEVICE_SECONDS))
            busy = {rank: answer.busy for rank, answer in answers.items() if answer.busy}
            why = "; ".join(busy.values())
            if busy and time.monotonic() - began > timeout_seconds:
                raise NoResourceError(
                    f"Devices of the cluster stayed taken for {timeout_seconds:g} s.",
                    why,
                    "Wait for them, or raise device_timeout_seconds.",
                )
            if busy and not told:
                report.note(f"Waiting for a device of the cluster ({why})")
                told = True
            left = list(busy)

    def _call(
        self, name: str, ranks: Iterable[int], arguments: Callable[[int], tuple[object, ...]]
    ) -> dict[int, Answer]:
        """Have members do something at once; their answers."""
        calls = {getattr(self._actors[rank], name).remote(*arguments(rank)): rank for rank in ranks}
        answers: dict[int, Answer] = {}
        while calls:
            interrupts.check()
            for ref in ray_session.answered(list(calls), POLL_SECONDS):
                rank, text = calls.pop(ref), ray_session.answer(ref)
                if isinstance(text, Gone):
                    raise LostError(lost(rank, text.why.rstrip(".")))
                answers[rank] = Answer.model_validate_json(text)
                failure = answers[rank].failure
                if failure is not None:
                    raise LostError(no_resource(failure))
        return answers
