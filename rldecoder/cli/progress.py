"""Progress in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

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

from rldecoder.cli.clock import RunClock
from rldecoder.reporting import Bar
from rldecoder.terminal import Terminal


class RichBar:
    """A bar in the terminal that shows its speed in its own unit."""

    def __init__(
        self, progress: Progress, task: TaskID, unit: str, clock: RunClock | None = None
    ) -> None:
        self._progress, self._task, self._unit, self._clock = progress, task, unit, clock

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on and refresh the speed."""
        self._progress.update(self._task, advance=amount)
        task = self._progress.tasks[self._progress.task_ids.index(self._task)]
        speed = f"{task.speed:,.0f} {self._unit}/s" if task.speed else ""
        self._progress.update(self._task, speed=speed, note=escape(note))
        if self._clock is not None:
            self._clock.share = min(1.0, task.completed / task.total) if task.total else 0.0
            self._clock.note = note


class RichReporter:
    """Bars (stage, speed, time left), notes and alerts in the terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Terminal(stderr=True)
        self.clock: RunClock | None = None
        """Told how far the present bar is, where a run keeps one."""

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
            if self.clock is not None:
                self.clock.doing, self.clock.share, self.clock.note = description, 0.0, ""
            yield RichBar(progress, task, unit, self.clock)

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Not shown here: bars carry a note, wandb and Parquet carry the curves."""

    def note(self, message: str) -> None:
        """One dim line."""
        self.console.print(f"  [dim]{escape(message)}[/dim]")

    def alert(self, message: str) -> None:
        """One yellow line."""
        self.console.print(f"  [yellow]alert:[/yellow] {escape(message)}")
