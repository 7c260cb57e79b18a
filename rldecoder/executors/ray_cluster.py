"""Shards by the workers of a Ray cluster: bounded in flight, done again where a worker is lost.

Ray places the workers, counts cores and accelerators, and carries calls. What is computed, where
it is kept and what is done again is decided here, from the sealed files alone: a killed worker,
machine or run costs the shards in flight and no more.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rldecoder import interrupts
from rldecoder.config.executor import ExecutorConfig
from rldecoder.errors import (
    DamagedFileError,
    InterruptedRunError,
    NoResourceError,
    RlDecoderError,
    UnexpectedError,
)
from rldecoder.executors import ray_session
from rldecoder.executors.far_worker import Answer, Opening, machine
from rldecoder.executors.jobs import AnyWorker, Job, Measured
from rldecoder.executors.local import Crew, Executor
from rldecoder.executors.ray_team import RayAttempt
from rldecoder.executors.teams import TeamTask, supervise
from rldecoder.far_failures import Failure
from rldecoder.reporting import Bar, Reporter

if TYPE_CHECKING:
    import torch

CALLS = 2
"""Shards that a worker is told of at once: one is computed, the next one waits at its door. One
more may be on its way to the disk when a worker is lost."""
POLL_SECONDS = 0.5
HIRE_SECONDS = 5.0
"""How often the cluster is looked at for room."""
TOLD_SECONDS = 30.0
"""After which the user hears that no worker is ready; one begins within ten seconds or so."""
DEVICE_SECONDS = 1.0
"""How long a worker waits for a device before it says that it is taken."""


class RayExecutor(Executor):
    """Workers of a Ray cluster; connects when it is first needed.

    Args:
        threads: of torch in each worker.
        timeout_seconds: how long nothing may be finished while no worker is ready.
    """

    def __init__(self, config: ExecutorConfig, *, threads: int, timeout_seconds: float) -> None:
        self.config, self.threads, self.timeout_seconds = config, threads, timeout_seconds
        self._free: list[Any] = []

    @contextmanager
    def open(
        self, job: Job, *, device: torch.device, report: Reporter, here: AnyWorker | None = None
    ) -> Iterator[Crew]:
        """See `Executor.open`; this process's own device and worker are not used."""
        ray_session.connect(self.config.address)
        opening = Opening[Job].of(job, self.threads)
        crew = _RayCrew(self.config, opening, self.timeout_seconds, report)
        try:
            crew.take_on(self._free)
            yield crew
        except BaseException:
            crew.dismiss()
            raise
        # A process with its imports is worth ten seconds: the stage's next job takes it on.
        self._free = crew.release()

    def team(self, task: TeamTask, size: int, *, device: torch.device, report: Reporter) -> str:
        """See `Executor.team`; this process's own device is not used."""
        ray_session.connect(self.config.address)
        self.close()  # workers of an earlier job stand where the team is to be
        opening = Opening[TeamTask].of(task, self.threads)
        return supervise(
            lambda: RayAttempt(self.config, opening, size, self.timeout_seconds, report),
            self.config.retries,
            report,
        )

    def close(self) -> None:
        """See `Executor.close`."""
        for actor in self._free:
            ray_session.kill(actor)
        self._free = []


@dataclass(eq=False)
class _Hand:
    """A worker, as the driver knows it."""

    actor: Any
    ready: bool = False
    busy: str = ""
    given: list[int] = field(default_factory=list)
    """Shards that it has and has not finished."""
    calls: int = 0
    """Calls for shards that it has not answered."""
    settling: bool = False
    measured: Measured = field(default_factory=dict)


Call = Literal["open", "do", "settle"]


class _RayCrew(Crew):
    def __init__(
        self,
        config: ExecutorConfig,
        opening: Opening[Job],
        timeout_seconds: float,
        report: Reporter,
    ) -> None:
        self.config, self.job, self.report = config, opening.job, report
        self._opening, self._timeout = opening.model_dump_json(), timeout_seconds
        self._hands: list[_Hand] = []
        self._asked: dict[Any, tuple[_Hand, Call]] = {}
        self._todo: deque[int] = deque()
        self._left: set[int] = set()
        self._shown: set[int] = set()
        self._lost: Counter[int] = Counter()
        self._lost_opening = 0
        self._facts: Mapping[str, int] | None = None
        self._measured: Counter[str] = Counter()
        self._told: set[str] = set()
        self._stopped = False
        self._bar: Bar | None = None
        self._hired_at = -HIRE_SECONDS
        self._moved_at = time.monotonic()

    @property
    def facts(self) -> Mapping[str, int]:
        """See `Crew.facts`."""
        while self._facts is None:
            self._step(wanted=1)
        return self._facts

    @property
    def num_ready(self) -> int:
        """See `Crew.num_ready`."""
        return sum(hand.ready for hand in self._hands)

    def run(self, todo: Sequence[int], bar: Bar) -> Measured:
        """See `Crew.run`."""
        self._todo, self._left, self._bar = deque(todo), set(todo), bar
        self._shown = set()
        self._hired_at = -HIRE_SECONDS
        self._moved_at = time.monotonic()
        for hand in self._hands:
            self._feed(hand)
        while self._left:
            self._step(wanted=len(self._left))
            if not self._left:
                self._check(todo)
        for hand in self._hands:
            self._measured.update(hand.measured)
        return dict(self._measured)

    def stop(self) -> None:
        """See `Crew.stop`."""
        self._stopped = True

    def take_on(self, actors: Sequence[Any]) -> None:
        """Use workers of an earlier job."""
        for actor in actors:
            hand = _Hand(actor)
            self._hands.append(hand)
            self._open(hand)

    def release(self) -> list[Any]:
        """The workers that have nothing to do; the others are let go."""
        free = [hand for hand in self._hands if hand.ready and not hand.given]
        self._hands = [hand for hand in self._hands if hand not in free]
        self.dismiss()
        return [hand.actor for hand in free]

    def dismiss(self) -> None:
        """Let the workers go, whatever they are doing."""
        for hand in self._hands:
            ray_session.kill(hand.actor)
        self._hands.clear()
        self._asked.clear()

    def _step(self, wanted: int) -> None:
        """Hire where there is room, and take in the next answers."""
        interrupts.check()
        if self._stopped:
            raise InterruptedRunError("The work of the cluster was stopped.")
        self._hire(wanted)
        for ref in ray_session.answered(list(self._asked), POLL_SECONDS):
            if ref not in self._asked:
                continue  # its worker was let go meanwhile
            hand, call = self._asked.pop(ref)
            answer = ray_session.answer(ref)
            if isinstance(answer, str):
                self._take(hand, call, Answer.model_validate_json(answer))
            else:
                self._lose(hand, answer.why)
        self._check_patience()

    def _hire(self, wanted: int) -> None:
        """As many workers as there is work for, and room."""
        now = time.monotonic()
        if now - self._hired_at < HIRE_SECONDS and self._hands:
            return
        self._hired_at = now
        config = self.config
        # At least one is asked for, so that Ray knows what is wanted.
        most = config.workers or max(1, ray_session.room(config.cpus, config.gpus))
        for _ in range(min(wanted, most) - len(self._hands)):
            hand = _Hand(ray_session.hire(config.cpus, config.gpus))
            self._hands.append(hand)
            self._open(hand)

    def _open(self, hand: _Hand) -> None:
        self._asked[hand.actor.open.remote(self._opening, DEVICE_SECONDS)] = hand, "open"

    def _take(self, hand: _Hand, call: Call, answer: Answer) -> None:
        """What a worker said."""
        for note in answer.notes:
            self.report.note(note)
        if answer.failure is not None:
            self._fail(hand, answer.failure)
            return

        # Which of its calls it answers says what it can be told next.
        match call:
            case "open" if answer.busy:
                hand.busy = answer.busy
                self._tell(f"Waiting for a device of the cluster ({answer.busy})")
                self._open(hand)
                return
            case "open":
                hand.ready, hand.busy = True, ""
                self._facts = answer.facts
                self._compare(answer.machine)
            case "do":
                hand.calls -= 1
            case "settle":
                hand.settling = False

        # A shard counts when its file is sealed, which may be a call later than its own.
        hand.measured = answer.measured
        for number in answer.finished:
            hand.given.remove(number)
            self._finish(number)
        self._moved_at = time.monotonic()
        self._feed(hand)

    def _check(self, todo: Sequence[int]) -> None:
        """Whether the files are here what the workers wrote there; one that is not is done again.

        Between them lie a network, other disks and caches, and stages read without a look at seals.
        """
        damaged = []
        for number in todo:
            interrupts.check()
            if not self.job.is_finished(number, self.report.note):
                damaged.append(number)
        self._lost.update(damaged)
        if damaged and max(self._lost[n] for n in damaged) > self.config.retries:
            raise DamagedFileError(
                f"{self.job.path(damaged[0])} is not what a worker of the cluster wrote.",
                "It was done again and again, and never arrived whole.",
                "Look at the disks and the shared file system of the cluster, and run again.",
            )
        self._left.update(damaged)
        self._todo.extend(damaged)
        for hand in self._hands:
            self._feed(hand)

    def _finish(self, number: int) -> None:
        if number in self._left and self._bar is not None:
            self._left.discard(number)
            if number not in self._shown:
                self._shown.add(number)
                self._bar.advance(self.job.files[number].size)

    def _feed(self, hand: _Hand) -> None:
        """Give a worker shards, a bounded number; without any, let it finish what it wrote."""
        if not hand.ready:
            return
        while self._todo and hand.calls < CALLS:
            number = self._todo.popleft()
            hand.given.append(number)
            hand.calls += 1
            self._asked[hand.actor.do.remote(number)] = hand, "do"
        if hand.given and not hand.calls and not hand.settling:
            hand.settling = True
            self._asked[hand.actor.settle.remote()] = hand, "settle"

    def _fail(self, hand: _Hand, failure: Failure) -> None:
        """An error of a worker: a full disk or memory may not be there on another machine."""
        known = failure.known()
        if isinstance(known, NoResourceError):
            self._lose(hand, str(known), known)
        elif known is not None:
            raise known
        else:
            error = UnexpectedError(f"A shard failed on the cluster: {failure.message}")
            error.add_note(failure.traceback)
            raise error

    def _lose(self, hand: _Hand, why: str, error: RlDecoderError | None = None) -> None:
        """A worker is gone: what it had in flight is done by others, unless it is on disk."""
        self._hands.remove(hand)
        for ref in [ref for ref, (asked, _) in self._asked.items() if asked is hand]:
            del self._asked[ref]
        ray_session.kill(hand.actor)
        self._measured.update(hand.measured)
        self._hired_at = -HIRE_SECONDS

        # It may have finished a shard and not come to say so.
        again = [n for n in hand.given if not self.job.is_finished(n, self.report.note)]
        for number in hand.given:
            if number not in again:
                self._finish(number)
        self._lost.update(again)
        if not hand.ready:
            self._lost_opening += 1
        worst = max([self._lost_opening, *(self._lost[number] for number in again)])
        if worst > self.config.retries:
            raise error or NoResourceError(
                f"{worst} workers of the cluster were lost over the same work.",
                f"The last one: {why}",
                "Look at Ray's logs on that machine (most often memory ran out), give a worker "
                "more, or raise executor.retries. Finished shards are kept.",
            )
        self._todo.extendleft(sorted(again, reverse=True))
        names = ", ".join(self.job.files[n].name for n in again) or "nothing"
        self.report.note(f"A worker of the cluster was lost; done again: {names}. {why}")
        for other in self._hands:
            self._feed(other)

    def _compare(self, far: str) -> None:
        if far != machine():
            self._tell(
                f"A worker computes by {far}, this machine by {machine()}: "
                "what it computes may differ in the last bits."
            )

    def _check_patience(self) -> None:
        """Give up when nothing moves and nobody is ready."""
        if any(hand.ready for hand in self._hands):
            return
        waited = time.monotonic() - self._moved_at
        busy = "; ".join(hand.busy for hand in self._hands if hand.busy)
        why = busy or ray_session.what_is_there(self.config.cpus, self.config.gpus)
        if waited > self._timeout:
            raise NoResourceError(
                f"No worker of the Ray cluster became ready within {self._timeout:g} s.",
                why,
                "Add machines, lower executor.cpus or executor.gpus, or raise "
                "device_timeout_seconds.",
            )
        if waited > TOLD_SECONDS:
            self._tell(f"Still waiting for a first worker of the Ray cluster. {why}")

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self.report.note(message)
