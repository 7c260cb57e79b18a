"""Processes that compute one thing together: all live, or all begin again.

A `Job` has shards that know nothing of each other. The members of a team exchange tensors at every
step (`torch.distributed`), so that the loss of one is the loss of all: the others are ended, too,
and a new team goes on from what the work itself has kept, its last checkpoint. torch's elastic
agent does the same, but listens on the network, takes the signals and carries results by pickle.
"""

from __future__ import annotations

import datetime
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict

from rldecoder import interrupts
from rldecoder.errors import NoResourceError, UnexpectedError
from rldecoder.executors.jobs import named
from rldecoder.far_failures import Failure
from rldecoder.far_reports import FarReporter, Lines, Replay
from rldecoder.reporting import Reporter, SilentReporter

if TYPE_CHECKING:
    import torch

POLL_SECONDS = 0.2
SETTLE_SECONDS = 3.0
"""How long the others of a lost member are listened to: one of them may know the true reason."""
PATIENCE = datetime.timedelta(minutes=10)
"""How long a member waits for the others in one exchange; one that hangs is noticed by then."""


class TeamTask(BaseModel):
    """Work for a team, as one process tells it another."""

    model_config = ConfigDict(frozen=True)

    work: str
    """`module:function` of this package; see `Work`."""
    settings: str
    """What the function is given, as JSON."""
    folder: Path
    """Every member can read and write it."""
    owner: str
    """Whose work it is (`StageContext.owner`)."""
    reads: tuple[Path, ...] = ()
    """Folders that a member must be able to read."""

    @property
    def module(self) -> str:
        """The module of the function."""
        return self.work.partition(":")[0]

    def function(self) -> Work:
        """What members run.

        Raises:
            ValueError: it is no function of this package.
        """
        work = named(self.work)
        if not callable(work):
            raise ValueError(f"{self.work!r} is no function of this package")
        found: Work = work
        return found


class Member(NamedTuple):
    """What a process of a team is told of itself."""

    rank: int
    """From 0; what the first one reports and returns is what counts."""
    size: int
    device: torch.device
    report: Reporter
    kept: Callable[[], None]
    """To be called by the first one when it has saved from where a new team would go on."""


Work = Callable[[str, Member], str]
"""Given the settings; returns a text, for which the first member's counts. All members make the
same exchanges, and the process group is there already."""


class Heard(NamedTuple):
    """A line of a member, or that it is gone."""

    rank: int
    line: str | None
    why: str = ""
    """Of one that is gone."""


class Attempt(ABC):
    """A team at work."""

    @abstractmethod
    def heard(self) -> Sequence[Heard]:
        """What members said since; waits a little where that is nothing."""

    @abstractmethod
    def close(self) -> None:
        """End all members, whatever they are doing."""


class LostError(Exception):
    """A team is no longer whole.

    Args:
        error: for the user, should it be the last time.
        kept: whether it had saved something.
    """

    def __init__(self, error: NoResourceError, *, kept: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.kept = error, kept


def supervise(start: Callable[[], Attempt], retries: int, report: Reporter) -> str:
    """Have a team do its work, and another one where it is lost.

    Args:
        start: makes an attempt; may raise LostError.
        retries: how many teams in a row may be lost without having saved anything.

    Returns:
        What the first member returned.

    Raises:
        RlDecoderError: a member's error, or that teams were lost too often.
    """
    losses = 0
    while True:
        interrupts.check()
        try:
            with closing(start()) as attempt, closing(Replay(report)) as replay:
                return _follow(attempt, replay)
        except LostError as end:
            losses = 1 if end.kept else losses + 1
            if losses > retries:
                raise end.error from None
            report.note(f"{end.error.what} All begin again where the last checkpoint is.")


def _follow(attempt: Attempt, replay: Replay) -> str:
    """Listen until the first member is done, which had to hear all others for it."""
    gone: NoResourceError | None = None
    refused: NoResourceError | None = None
    kept, until = False, 0.0
    excused: set[int] = set()
    while True:
        interrupts.check()
        for heard in attempt.heard():
            if heard.line is None:
                # Who has done its part may go while the first one still measures and saves, and
                # who has told its error goes because of that: neither is the one that was lost.
                if heard.rank not in excused:
                    gone = gone or lost(heard.rank, heard.why)
                continue
            word = replay.take(heard.line)
            match word and word["event"]:
                case "kept":
                    kept = True
                case "result" if word and heard.rank == 0:
                    return str(word["text"])
                case "result":
                    excused.add(heard.rank)
                case "error":
                    told = no_resource(Failure.model_validate(word))
                    refused = refused or told
                    excused.add(heard.rank)

        # A member's own error explains why others lost it, and is heard after theirs now and then.
        error = gone or refused
        if error is not None:
            until = until or time.monotonic() + SETTLE_SECONDS
            if time.monotonic() >= until:
                raise LostError(error, kept=kept)


def lost(rank: int, why: str) -> NoResourceError:
    """The error for a member that is gone."""
    return NoResourceError(
        f"Process {rank} of a training was lost: {why}.",
        "Most often memory ran out, or a machine went away.",
        "Look at the system's log, and run again: it goes on from its last checkpoint.",
    )


def no_resource(failure: Failure) -> NoResourceError:
    """A member's error that another team may be spared (a lost peer, no memory).

    Raises:
        RlDecoderError: it is of another kind, and another team would meet it, too.
    """
    known = failure.known()
    if isinstance(known, NoResourceError):
        return known
    if known is not None:
        raise known
    error = UnexpectedError(f"A process of a training failed: {failure.message}")
    error.add_note(failure.traceback)
    raise error


def take_part(
    task: TeamTask, rank: int, size: int, device: torch.device, meeting: Path, stream: Lines
) -> None:
    """Be a member: meet the others, do the work, and say what came of it.

    Args:
        device: of this process.
        meeting: a file of this attempt that all members see; made by the first to come.
        stream: where the supervisor listens.
    """
    import torch
    import torch.distributed as dist

    teller = FarReporter(stream)
    report: Reporter = teller if rank == 0 else SilentReporter()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        member = Member(rank, size, device, report, lambda: teller.send("kept"))
        text = task.function()(task.settings, member)
    except Exception as error:  # whatever it is, who supervises says what it means
        teller.send("error", **Failure.of(error).model_dump())
    else:
        teller.send("result", text=text)


def loopback() -> str | None:
    """The name of the network interface that leads nowhere else; None where it is not found."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def make_task(
    work: Callable[[str, Member], str],
    settings: BaseModel,
    *,
    folder: Path,
    owner: str,
    reads: Sequence[Path] = (),
) -> TeamTask:
    """Say what the work is; paths are made absolute, for other processes stand elsewhere."""
    return TeamTask(
        work=f"{work.__module__}:{work.__qualname__}",
        settings=settings.model_dump_json(),
        folder=folder.absolute(),
        owner=owner,
        reads=tuple(path.absolute() for path in reads),
    )
