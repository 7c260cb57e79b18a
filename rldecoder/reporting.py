"""Where progress, metrics and messages go: the terminal, Prefect, wandb, or nowhere.

Ground floor: everything above may use it, and nothing here knows who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from rldecoder import interrupts

Note = Callable[[str], None]
"""Takes a line for the user."""
Advance = Callable[[float], None]
"""Takes how much was done, in the unit of a bar."""


class Bar(Protocol):
    """One progress bar."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on by `amount` units; `note` is a short text shown beside the bar."""
        ...


class Reporter(Protocol):
    """Where a stage's progress, metrics and messages go (terminal, Prefect, wandb, nowhere)."""

    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> AbstractContextManager[Bar]:
        """Show a progress bar; `done` is what an earlier, interrupted run had finished."""
        ...

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Live metrics at a step (wandb, Prefect). Curves on disk are the stage's own work."""
        ...

    def note(self, message: str) -> None:
        """One line for the user."""
        ...

    def alert(self, message: str) -> None:
        """Something drifts (NaN, dead latents, collapse): shown, logged, raised to Prefect."""
        ...


class SilentBar:
    """A bar that shows nothing."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Do nothing."""


class SilentReporter:
    """A reporter for tests and for library use; it keeps alerts so that tests can read them."""

    def __init__(self) -> None:
        self.alerts: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield SilentBar()

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Drop them."""

    def note(self, message: str) -> None:
        """Keep the message."""
        self.notes.append(message)

    def alert(self, message: str) -> None:
        """Keep the message."""
        self.alerts.append(message)


class TeeReporter:
    """Passes everything on to several reporters."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self.reporters = tuple(reporters)

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """One bar a reporter, moved together."""
        with ExitStack() as stack:
            yield _TeeBar(
                [
                    stack.enter_context(reporter.track(description, total, unit, done))
                    for reporter in self.reporters
                ]
            )

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.metrics(stage, step, values)

    def note(self, message: str) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.note(message)

    def alert(self, message: str) -> None:
        """To all."""
        for reporter in self.reporters:
            reporter.alert(message)


class _TeeBar:
    def __init__(self, bars: Sequence[Bar]) -> None:
        self._bars = bars

    def advance(self, amount: float = 1, note: str = "") -> None:
        for bar in self._bars:
            bar.advance(amount, note)


class _Checking:
    """A reporter and its bar, which raise at each call if the process was asked to stop."""

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        interrupts.check()
        yield self

    def advance(self, amount: float = 1, note: str = "") -> None:
        interrupts.check()

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        interrupts.check()

    def note(self, message: str) -> None:
        interrupts.check()

    def alert(self, message: str) -> None:
        interrupts.check()


def interruptible(reporter: Reporter) -> Reporter:
    """A reporter whose every call stops first if the process was asked to stop.

    An interruption may be dropped where no exception can pass (`rldecoder.interrupts`).
    """
    return TeeReporter([_Checking(), reporter])
