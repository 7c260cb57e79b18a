"""What is done when workers are lost, slow, busy or wrong: with a pretended Ray, in one process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rldecoder.config.executor import ExecutorConfig
from rldecoder.errors import BadInputError, DamagedFileError, NoResourceError, UnexpectedError
from rldecoder.executors import ray_cluster
from rldecoder.executors.far_worker import FarWorker
from rldecoder.executors.jobs import Job
from rldecoder.executors.local import Crew
from rldecoder.executors.ray_cluster import CALLS, RayExecutor
from rldecoder.executors.ray_session import Gone
from rldecoder.reporting import SilentReporter
from tests.executors.counting import counting_job, products
from tests.executors.test_local import Counted

CPU = torch.device("cpu")


class Method:
    """A method of a pretended actor."""

    def __init__(self, ray: PretendedRay, actor: Actor, name: str) -> None:
        self.ray, self.actor, self.name = ray, actor, name

    def remote(self, *arguments: object) -> int:
        """Queue a call; its number stands for the answer to come."""
        return self.ray.ask(self.actor, self.name, arguments)


class Actor:
    """A worker in this process."""

    def __init__(self, ray: PretendedRay, number: int) -> None:
        self.number, self.worker, self.killed = number, FarWorker(), False
        self.open, self.do, self.settle = (Method(ray, self, n) for n in ("open", "do", "settle"))


class PretendedRay:
    """In place of `ray_session`: answers one call at a time, the oldest first.

    Args:
        places: workers that fit.
        dies: whether a worker dies at a call, by its number and the call.
    """

    def __init__(
        self, places: int = 2, dies: Callable[[int, str, Any], bool] = lambda *_: False
    ) -> None:
        self.places, self.dies = places, dies
        self.actors: list[Actor] = []
        self.calls: deque[tuple[int, Actor, str, tuple[object, ...]]] = deque()
        self.answers: dict[int, str | Gone] = {}
        self.asked, self.most_waiting = 0, 0

    def connect(self, address: str) -> None:
        """Nothing to do."""

    def room(self, cpus: int, gpus: int) -> int:
        """Places in all."""
        return self.places

    def what_is_there(self, cpus: int, gpus: int) -> str:
        """For errors."""
        return "nothing is there"

    def hire(self, cpus: int, gpus: int) -> Actor:
        """A new worker."""
        self.actors.append(Actor(self, len(self.actors)))
        return self.actors[-1]

    def kill(self, actor: Actor) -> None:
        """It answers no more."""
        actor.killed = True

    def ask(self, actor: Actor, name: str, arguments: tuple[object, ...]) -> int:
        """Queue a call."""
        self.asked += 1
        self.calls.append((self.asked, actor, name, arguments))
        waiting = sum(call[1] is actor and call[2] == "do" for call in self.calls)
        self.most_waiting = max(self.most_waiting, waiting)
        return self.asked

    def answered(self, calls: Sequence[int], timeout_seconds: float) -> Sequence[int]:
        """The oldest call that can be answered."""
        for call in list(self.calls):
            number, actor, name, arguments = call
            before = sum(not a.killed for a in self.actors[: actor.number])
            if before >= self.places and name == "open" and not actor.killed:
                continue  # no room for it
            self.calls.remove(call)
            if actor.killed or self.dies(actor.number, name, arguments):
                actor.killed = True
                self.answers[number] = Gone("ActorDiedError: it died.")
            else:
                self.answers[number] = getattr(actor.worker, name)(*arguments)
            return [number] if number in calls else []
        return []

    def answer(self, call: int) -> str | Gone:
        """What `answered` found."""
        return self.answers.pop(call)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Job, Any]]:
    """Does a counting job with a pretended Ray; gives the job and what the user was told."""

    def done(ray: PretendedRay, *, timeout: float = 60.0, retries: int = 3, **settings: object):
        monkeypatch.setattr(ray_cluster, "ray_session", ray)
        job = counting_job(tmp_path / "shards", monkeypatch, **settings)  # type: ignore[arg-type]
        executor = RayExecutor(
            ExecutorConfig(type="ray", retries=retries), threads=1, timeout_seconds=timeout
        )
        report, bar = SilentReporter(), Counted()
        with executor.open(job, device=CPU, report=report) as crew:
            assert isinstance(crew, Crew)
            assert crew.facts == {"factor": 3}
            crew.run(job.unfinished(lambda note: None), bar)
        executor.close()
        assert bar.total == len(job.files)
        return job, report.notes

    return done


def test_all_workers_do_a_part_and_go_home(run: Any) -> None:
    ray = PretendedRay(places=3)
    job, notes = run(ray, count=30)
    assert products(job) == [3 * n for n in range(30)]
    done = [actor.worker._ready.worker.done for actor in ray.actors]
    assert len(done) == 3
    assert sum(done) == 30
    assert min(done) >= 5
    assert notes == []
    assert ray.most_waiting == CALLS
    assert all(actor.killed for actor in ray.actors)


def test_a_lost_worker_costs_its_shards_in_flight(run: Any) -> None:
    calls = []

    def dies(worker: int, name: str, arguments: Any) -> bool:
        calls.append((worker, name, *arguments))
        return worker == 1 and name == "do" and sum(c[:2] == (1, "do") for c in calls) == 4

    ray = PretendedRay(places=2, dies=dies)
    job, notes = run(ray, count=20)
    assert products(job) == [3 * n for n in range(20)]
    done = [call[2] for call in calls if call[1] == "do"]
    again = [number for number in set(done) if done.count(number) > 1]
    assert 1 <= len(again) <= CALLS + 1
    assert len(ray.actors) == 3  # another one was hired in its place
    # A shard that was written and not yet sealed when its worker died is told of, too.
    (note,) = [note for note in notes if "A worker of the cluster was lost" in note]
    assert "done again: number-" in note


def test_a_shard_that_was_finished_and_not_told_of_is_not_done_again(run: Any) -> None:
    calls = []

    def dies(worker: int, name: str, arguments: Any) -> bool:
        calls.append((name, *arguments))
        if worker == 0 and name == "settle":
            ray.actors[0].worker.settle()  # written, and dead before the answer
            return True
        return False

    ray = PretendedRay(places=1, dies=dies)
    _, notes = run(ray, count=3)
    done = [call[1] for call in calls if call[0] == "do"]
    assert sorted(done) == [0, 1, 2]
    assert any("done again: nothing" in note for note in notes)


@pytest.mark.parametrize("times", [1, 9])
def test_a_shard_that_does_not_arrive_whole_is_done_again(
    run: Any, tmp_path: Path, times: int
) -> None:
    """A worker seals what it wrote; what is read here may be something else."""
    path = tmp_path / "shards" / "number-1"
    spoilt = []

    def dies(worker: int, name: str, arguments: Any) -> bool:
        if name == "settle" and len(spoilt) < times:  # the last call before all are there
            for actor in ray.actors:
                if (written := actor.worker._ready._written) is not None:
                    written[1].result()
            path.write_bytes(b"4")
            spoilt.append(1)
        return False

    ray = PretendedRay(places=1, dies=dies)
    if times == 1:
        job, notes = run(ray, count=3)
        assert products(job) == [0, 3, 6]
        assert "number-1 cannot be trusted" in notes[0]
    else:
        with pytest.raises(DamagedFileError, match="number-1 is not what a worker"):
            run(ray, count=3)


def test_a_shard_that_kills_its_workers_ends_the_run(run: Any, tmp_path: Path) -> None:
    ray = PretendedRay(dies=lambda worker, name, arguments: name == "do" and arguments[0] == 4)
    with pytest.raises(NoResourceError, match="3 workers of the cluster were lost over the same"):
        run(ray, retries=2)
    assert (tmp_path / "shards" / "number-0.seal").exists()
    assert all(actor.killed for actor in ray.actors)


def test_workers_that_never_open_end_the_run(run: Any) -> None:
    ray = PretendedRay(dies=lambda worker, name, arguments: name == "open")
    with pytest.raises(NoResourceError, match="4 workers"):
        run(ray)


def test_bad_input_is_told_at_once_and_lack_of_memory_is_tried_elsewhere(run: Any) -> None:
    ray = PretendedRay()
    with pytest.raises(BadInputError, match="Shard of bad input"):
        run(ray, bad_input=(2,))
    assert len(ray.actors) == 2
    ray = PretendedRay()
    with pytest.raises(NoResourceError, match="No memory for a shard"):
        run(ray, no_memory=(2,))
    assert len(ray.actors) > 2
    with pytest.raises(UnexpectedError, match="KeyError") as raised:
        run(PretendedRay(), fault=(2,))
    assert "counting.py" in raised.value.__notes__[0]


def test_no_room_is_told_and_given_up(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoResourceError, match="nothing is there") as raised:
        run(PretendedRay(places=0), timeout=0.05)
    assert "executor.gpus" in raised.value.mend


def test_an_interruption_lets_all_workers_go(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks = []

    def interrupted() -> None:
        checks.append(1)
        if len(checks) == 12:
            raise KeyboardInterrupt

    monkeypatch.setattr(ray_cluster.interrupts, "check", interrupted)
    ray = PretendedRay()
    with pytest.raises(KeyboardInterrupt):
        run(ray, count=30)
    assert all(actor.killed for actor in ray.actors)
    kept = len(list((tmp_path / "shards").glob("*.seal")))
    assert kept >= 3
    monkeypatch.undo()


def test_the_next_job_takes_on_the_same_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = PretendedRay()
    monkeypatch.setattr(ray_cluster, "ray_session", ray)
    executor = RayExecutor(ExecutorConfig(type="ray"), threads=1, timeout_seconds=60)
    for name, factor in (("first", 3), ("second", 5)):
        job = counting_job(tmp_path / name, monkeypatch, factor=factor)
        with executor.open(job, device=CPU, report=SilentReporter()) as crew:
            assert crew.facts == {"factor": factor}
            crew.run(job.unfinished(lambda note: None), Counted())
        assert products(job) == [factor * n for n in range(6)]
        assert not any(actor.killed for actor in ray.actors)
    assert len(ray.actors) == 2
    executor.close()
    assert all(actor.killed for actor in ray.actors)
