"""How long a run still takes, and a line every half minute for logs that show no bars."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

from rldecoder.errors import RlDecoderError
from rldecoder.run import Run

HEARTBEAT_SECONDS = 30.0


class RunClock:
    """What is done of a run, and what is left of it in all.

    Args:
        expected: seconds of the stages that are to be built, in order; empty where nothing is
            known of the model.
        now: the time in seconds.
    """

    def __init__(
        self, expected: Mapping[str, float], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._expected, self._now = dict(expected), now
        self._took: dict[str, float] = {}
        self._began = self._stage_began = now()
        self.doing, self.share, self.note = "", 0.0, ""
        """The present bar's description, its share from 0 to 1, and its note."""

    def done(self, stage: str) -> None:
        """A stage is over: built now, or found."""
        if stage in self._expected:
            self._took[stage] = self._now() - self._stage_began
        self._stage_began, self.share, self.note = self._now(), 0.0, ""

    @property
    def stage(self) -> str | None:
        """The first stage that is not there yet."""
        return next((name for name in self._expected if name not in self._took), None)

    def left(self) -> float | None:
        """Seconds until the end of the run; None where nothing is known."""
        from rldecoder.planning.durations import seconds_left

        if not self._expected:
            return None
        if self.stage is None:
            return 0.0
        took = {**self._took, self.stage: self._now() - self._stage_began}
        return seconds_left(self._expected, took, self.share)

    def line(self) -> str:
        """What is going on, in one line."""
        parts = [self.stage or self.doing or "starting"]
        if self.share > 0:
            parts[0] += f" {self.share:.0%}"
        if self.note:
            parts.append(self.note)
        parts.append(f"{spoken(self._now() - self._began)} so far")
        left = self.left()
        if left is not None:
            parts.append(f"about {spoken(left)} left in all")
        return ", ".join(parts)


def spoken(seconds: float) -> str:
    """`40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def expected_of(run: Run, until: str | None) -> dict[str, float]:
    """Expected seconds of the stages that a run has still to build; empty where none are known."""
    from rldecoder.planning.durations import REFERENCE_RATE, expected_seconds
    from rldecoder.planning.sizes import model_sizes
    from rldecoder.planning.throughput import rate_for

    settings = run.config.sync_tokenizer
    try:
        constants = model_sizes(settings).constants
        rate = rate_for(settings.repo or settings.path or settings.model, None, None)
        missing = run.missing()
    except RlDecoderError:
        return {}  # a model or a file that is not here: its own stage says what is wrong with it
    # Without a measurement a middling machine is assumed; the first stages correct that.
    speed = REFERENCE_RATE / 3 if rate is None else rate.flops_per_second
    seconds = expected_seconds(run.config, constants, speed)
    names = list(seconds)
    wanted = names if until is None else names[: names.index(until) + 1]
    return {name: seconds[name] for name in wanted if name in missing}


@contextmanager
def heartbeat(
    console: Console, clock: RunClock, every: float = HEARTBEAT_SECONDS
) -> Iterator[None]:
    """Print the clock's line now and then while the block runs; on a terminal there are bars."""
    if console.is_terminal:
        yield
        return
    over = threading.Event()

    def beat() -> None:
        while not over.wait(every):
            console.print(f"  {escape(clock.line())}", soft_wrap=True)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
