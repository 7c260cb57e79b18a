"""What a supervisor makes of what members say, and a member of what happens to it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rldecoder.errors import BadInputError, NoResourceError, UnexpectedError
from rldecoder.executors import teams
from rldecoder.executors.teams import Attempt, Heard, TeamTask, supervise, take_part
from rldecoder.far_failures import Failure
from rldecoder.reporting import SilentReporter


class Played(Attempt):
    """Members whose words are written beforehand."""

    def __init__(self, *rounds: Sequence[Heard]) -> None:
        self.rounds, self.closed = list(rounds), False

    def heard(self) -> Sequence[Heard]:
        """The next of them; in the end nothing more."""
        return self.rounds.pop(0) if self.rounds else []

    def close(self) -> None:
        """Note it."""
        self.closed = True


def says(rank: int, event: str, **values: object) -> Heard:
    return Heard(rank, json.dumps({"event": event, **values}) + "\n")


def fails(rank: int, error: Exception) -> Heard:
    return says(rank, "error", **Failure.of(error).model_dump())


DONE, KEPT, GONE = says(0, "result", text="well"), says(0, "kept"), Heard(1, None, "it fell over")
PEERS_GONE = fails(0, NoResourceError("A process of the training lost the others."))


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[str]]]:
    """Plays attempts in turn; gives the result, and what the user was told."""
    monkeypatch.setattr(teams, "SETTLE_SECONDS", 0.0)

    def play(*attempts: Played, retries: int = 0) -> tuple[str, list[str]]:
        left, report = list(attempts), SilentReporter()
        try:
            return supervise(lambda: left.pop(0), retries, report), report.notes
        finally:
            assert all(attempt.closed for attempt in attempts[: len(attempts) - len(left)])

    return play


def test_what_the_first_member_reports_is_said_and_its_result_counts(
    supervised: Callable[..., tuple[str, list[str]]],
) -> None:
    other = says(1, "result", text="unheard")
    assert supervised(Played([other], [], [says(0, "note", message="hm"), DONE])) == (
        "well",
        ["hm"],
    )


def test_a_lost_team_begins_again(supervised: Callable[..., tuple[str, list[str]]]) -> None:
    text, notes = supervised(Played([PEERS_GONE, GONE]), Played([DONE]), retries=1)
    assert text == "well"
    assert notes == [
        "Process 1 of a training was lost: it fell over. "
        "All begin again where the last checkpoint is."
    ]


def test_who_is_named_is_who_fell_silent(
    supervised: Callable[..., tuple[str, list[str]]],
) -> None:
    """Its peer, which says that it lost it and ends, may be noticed first."""
    left = [fails(1, NoResourceError("I lost the others.")), Heard(1, None, "it ended")]
    _, notes = supervised(Played([*left, Heard(0, None, "killed")]), Played([DONE]), retries=1)
    assert notes == [
        "Process 0 of a training was lost: killed. All begin again where the last checkpoint is."
    ]
    with pytest.raises(NoResourceError, match="I lost the others"):
        supervised(Played(left))


def test_teams_that_save_something_may_be_lost_more_often(
    supervised: Callable[..., tuple[str, list[str]]],
) -> None:
    moving = [Played([KEPT], [GONE]) for _ in range(4)]
    assert supervised(*moving, Played([DONE]), retries=1)[0] == "well"
    with pytest.raises(NoResourceError, match="Process 1 of a training was lost: it fell over"):
        supervised(Played([KEPT], [GONE]), Played([GONE]), Played([DONE]), retries=1)


def test_a_members_own_error_counts_more_than_its_loss(
    supervised: Callable[..., tuple[str, list[str]]],
) -> None:
    error = fails(1, BadInputError("The text is empty.", "why", "mend"))
    with pytest.raises(BadInputError, match=r"The text is empty\. why mend"):
        supervised(Played([PEERS_GONE, error, GONE]), Played([DONE]), retries=3)
    with pytest.raises(UnexpectedError, match="KeyError") as caught:
        supervised(Played([fails(1, KeyError("k"))]), Played([DONE]), retries=3)
    assert "KeyError" in caught.value.__notes__[0]


def refused(tmp_path: Path, work: str) -> dict[str, object]:
    task = TeamTask(work=work, settings="{}", folder=tmp_path, owner="test/01")
    stream = io.StringIO()
    try:
        take_part(task, 0, 1, torch.device("cpu"), tmp_path / "meeting", stream)
    finally:
        dist.destroy_process_group()
    (line,) = stream.getvalue().splitlines()
    event: dict[str, object] = json.loads(line)
    return event


@pytest.mark.parametrize(
    ("work", "what"),
    [
        ("os:system", "no function of this package"),
        ("rldecoder.executors.teams:POLL_SECONDS", "no function of this package"),
        ("rldecoder.stages.train_sae:train_together", "6 validation errors"),
    ],
)
def test_a_member_says_why_it_cannot_work(work: str, what: str, tmp_path: Path) -> None:
    event = refused(tmp_path, work)
    assert event["event"] == "error"
    assert what in str(event["message"])


def test_who_is_done_may_go_before_the_first_one(supervised: Callable[..., object]) -> None:
    """Which still measures and saves, for longer than a loss is waited for."""
    ended = Heard(1, None, "it ended with exit status 0")
    found = supervised(Played([says(1, "result", text="")], [ended], [], [DONE]))
    assert found == ("well", [])
