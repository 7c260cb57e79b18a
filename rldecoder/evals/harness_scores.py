"""What lm-evaluation-harness found, as it is published; read without the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rldecoder.schemas import JsonFile, JsonRecord


class Score(JsonRecord):
    """A system on a task, as the harness counts it."""

    task: str
    system: str
    metric: str
    filter: str
    """Where the harness looked for the answer in what was said: a task may have several."""
    n: int
    """Documents."""
    value: float
    stderr: float | None
    """The harness's own; None where it gives none."""
    delta: float | None = None
    """`value` less the frozen model's."""
    delta_stderr: float | None = None
    """Of the mean of the paired differences, document by document; None for corpus metrics."""
    ours: float | None = None
    """What the stage `evaluate` published for this task and system, on the same prompts."""

    @property
    def counted(self) -> str:
        """The metric, and the filter where the task has one."""
        return self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"


class HarnessScores(JsonFile):
    """All scores of one call."""

    harness: str
    """Version of lm_eval."""
    scores: tuple[Score, ...]


def beside_ours(scores: Iterable[Score], ours: Mapping[tuple[str, str], float]) -> list[Score]:
    """The scores with our own of the same (task, system), where there are some."""
    return [one.model_copy(update={"ours": ours.get((one.task, one.system))}) for one in scores]
