"""Progress in the terminal, and reporters that pass on to others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rldecoder import interrupts
from rldecoder.stages.context import Bar, Reporter
from rldecoder.terminal import Terminal


class RichBar:
    """A bar in the terminal that shows its speed in its own unit."""

    def __init__(self, progress: Progress, task: TaskID, unit: str) -> None:
        self._progress, self._task, self._unit = progress, task, unit

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on and refresh the speed."""
        self._progress.update(self._task, advance=amount)
        task = self._progress.tasks[self._progress.task_ids.index(self._task)]
        speed = f"{task.speed:,.0f} {self._unit}/s" if task.speed else ""
        self._progress.update(self._task, speed=speed, note=escape(note))


class RichReporter:
    """Bars (stage, speed, time left), notes and alerts in the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Terminal(stderr=True)
        self.stage = ""

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """Show one bar until the block ends."""
        with Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("[cyan]{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,  # a log file wants no bars
        ) as progress:
            task = progress.add_task(
                escape(description), total=total, completed=int(done), speed="", note=""
            )
            yield RichBar(progress, task, unit)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Not shown here: bars carry a note, wandb and Parquet carry the curves."""

    def note(self, message: str) -> None:
        """One dim line."""
        self.console.print(f"  [dim]{escape(message)}[/dim]", highlight=False)

    def alert(self, message: str) -> None:
        """One yellow line."""
        self.console.print(f"  [yellow]alert:[/yellow] {escape(message)}", highlight=False)


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


class Interruptible:
    """Passes everything on, and stops at each step if the process was asked to stop.

    An interruption may be dropped where no exception can pass (`rldecoder.interrupts`).
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """The other's bar, whose steps can stop."""
        interrupts.check()
        with self._reporter.track(description, total, unit, done) as bar:
            yield _InterruptibleBar(bar)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Pass on."""
        interrupts.check()
        self._reporter.metrics(stage, step, values)

    def note(self, message: str) -> None:
        """Pass on."""
        interrupts.check()
        self._reporter.note(message)

    def alert(self, message: str) -> None:
        """Pass on."""
        interrupts.check()
        self._reporter.alert(message)


class _InterruptibleBar:
    def __init__(self, bar: Bar) -> None:
        self._bar = bar

    def advance(self, amount: float = 1, note: str = "") -> None:
        interrupts.check()
        self._bar.advance(amount, note)
