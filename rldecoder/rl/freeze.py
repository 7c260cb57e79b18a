"""Which decoder is final, and whether it may be called frozen."""

from __future__ import annotations

from typing import Literal, NamedTuple

from rldecoder.config.rl import FreezeDecoderConfig
from rldecoder.evals.statistics import Measured
from rldecoder.schemas import JsonRecord, Scalar


class OnTest(NamedTuple):
    """A decoder on the test split."""

    kl: float
    """KL(frozen || decoder), nats per token."""
    task_score: float
    """0 to 1."""
    drop: Measured | None = None
    """Task score of the frozen model minus its own; None in older records."""


class Freeze(JsonRecord):
    """The decision."""

    status: Literal["frozen", "not_frozen"]
    """The same as `frozen`, in a word."""
    which: Literal["ppo", "supervised"]
    """The decoder that is published."""
    frozen: bool
    """Whether it is good enough."""
    kl: float
    """KL(frozen model || published decoder) on test text, nats per token."""
    task_drop: float
    """Frozen model's task score minus that of the published decoder."""
    task_drop_low: float | None = None
    """Of its 95 % interval, over prompts; it decides nothing. None in older records."""
    task_drop_high: float | None = None
    reasons: tuple[str, ...]
    """Why it is not frozen; empty when it is."""
    num_trainings: int | None = None
    """Trainings that were judged each by itself; None where there is one, or no one asked."""
    num_frozen: int | None = None
    """How many of them this rule would call frozen: how far the decision hangs on the seed."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return self.model_dump(include={"frozen", "which", "kl", "task_drop"})

    def drop_in_words(self) -> str:
        """The drop with its interval, of a decoder that "scores ..." on PPO's tasks."""
        low, high = self.task_drop_low, self.task_drop_high
        interval = "" if low is None or high is None else f" [{0 - high:+.2f}, {0 - low:+.2f}]"
        return f"{0 - self.task_drop:+.2f}{interval} more than the frozen model"


def decide(
    ppo: OnTest,
    supervised: OnTest,
    frozen_task_score: float,
    *,
    control_verdict: str | None,
    judged_by: str,
    config: FreezeDecoderConfig,
) -> Freeze:
    """The PPO decoder is final unless its KL is worse than the supervised one's by too much.

    It is frozen when it is the PPO decoder, its KL and task drop are within their bounds, and the
    controls were beaten.
    """
    reasons = []

    # What PPO won on tasks is not worth a decoder that says something else on text.
    excess = ppo.kl - supervised.kl
    which: Literal["ppo", "supervised"] = "ppo"
    if excess > config.max_kl_above_supervised:
        which = "supervised"
        reasons.append(
            f"PPO made held-out KL worse by {excess:.3f} nats (allowed "
            f"{config.max_kl_above_supervised}): the supervised decoder is published instead"
        )

    # The plan's own bounds, for whichever of the two is published.
    chosen = ppo if which == "ppo" else supervised
    drop = frozen_task_score - chosen.task_score
    if chosen.kl >= config.max_kl:
        reasons.append(f"held-out KL {chosen.kl:.3f} nats is not below {config.max_kl}")
    if drop >= config.max_task_drop:
        reasons.append(
            f"task score {chosen.task_score:.3f} is {drop:.3f} below the frozen model's "
            f"{frozen_task_score:.3f} (allowed: less than {config.max_task_drop})"
        )
    if control_verdict != "pass":
        reasons.append(f"the controls were not beaten ({judged_by})")

    return Freeze(
        status="not_frozen" if reasons else "frozen",
        which=which,
        frozen=not reasons,
        kl=chosen.kl,
        task_drop=drop,
        task_drop_low=chosen.drop and chosen.drop.low,
        task_drop_high=chosen.drop and chosen.drop.high,
        reasons=tuple(reasons),
    )
