"""The targets of the original plan, each beside its measured value: met, missed or unknown.

Thresholds are the plan's and are fixed here; a run's config cannot change them. Where a profile
gates on another threshold, both are shown. A value that was not measured makes the target
unknown: never met, never left out.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import RootModel

from rldecoder.schemas import JsonFile, JsonRecord, Scalar

Source = Literal["comparison", "sae", "labels", "importance", "controls", "claims"]
"""What a target is measured with; who publishes that, the caller knows."""


class Measurement(NamedTuple):
    """What was found for one target."""

    value: float | None
    """None when it was not, or could not be, measured."""
    note: str = ""
    """What a reader must know about it."""
    profile: float | tuple[float, float] | None = None
    """The threshold that this run's own gate used, if it has one."""


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    key: str
    name: str
    relation: str
    """`<`, `<=`, `>`, `>=` or `within`."""
    threshold: float | tuple[float, float]
    unit: str
    source: Source
    """Whose measurement counts."""
    measured_on: str
    """Split and model."""

    def text(self, threshold: float | tuple[float, float] | None = None) -> str:
        """The target in words, such as `< 1.5`; with another threshold if one is given."""
        bound = self.threshold if threshold is None else threshold
        if isinstance(bound, tuple):
            return f"{bound[0]:g} to {bound[1]:g}"
        return f"{_SYMBOLS.get(self.relation, self.relation)} {bound:g}"

    def holds(self, value: float | None) -> bool | None:
        """Whether a value meets the plan; None when there is none."""
        if value is None or not math.isfinite(value):
            return None
        if isinstance(self.threshold, tuple):
            return self.threshold[0] <= value <= self.threshold[1]
        return _COMPARE[self.relation](value, self.threshold)


_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_SYMBOLS = {">=": "≥", "<=": "≤"}

TARGETS: tuple[Target, ...] = (
    Target(
        "kl_supervised", "KL of the supervised decoder", "<", 1.5, "nats/token",
        "comparison", "test text, KL(frozen || supervised decoder)",
    ),
    Target(
        "kl_rl", "KL of the decoder after RL", "<", 0.5, "nats/token",
        "comparison", "test text, KL(frozen || RL decoder)",
    ),
    Target(
        "task_drop", "Task accuracy drop after RL", "<", 0.03, "share",
        "comparison", "test prompts, frozen model minus RL decoder, mean over tasks",
    ),
    Target(
        "l0", "SAE: mean L0", "within", (50.0, 100.0), "latents/token",
        "sae", "test text",
    ),
    Target(
        "mse", "SAE: normalised MSE", "<", 0.01, "share",
        "sae", "test text, squared error over squared norm",
    ),
    Target(
        "explained_variance", "SAE: explained variance", ">", 0.95, "share",
        "sae", "test text, 1 - fvu",
    ),
    Target(
        "dead_fraction", "SAE: dead latents", "<", 0.05, "share",
        "sae", "test text",
    ),
    Target(
        "splice_kl", "SAE: splice KL", "<", 0.5, "nats/token",
        "sae", "test text, KL(frozen || spliced)",
    ),
    Target(
        "near_duplicates", "SAE: near-duplicate latents", "<", 0.05, "share",
        "sae", "decoder rows",
    ),
    Target(
        "label_coverage", "Labels of high confidence", ">", 0.85, "share",
        "labels", "labelled latents, failures included",
    ),
    Target(
        "top10_mass", "Importance mass of the top 10 features", ">=", 0.30, "share",
        "importance", "per position, of all |importance| and the SAE error's",
    ),
    Target(
        "ood_ratio", "Out-of-domain over in-domain accuracy", ">", 0.80, "ratio",
        "comparison", "next-token accuracy of the final decoder, ood over test text",
    ),
    Target(
        "agreement", "Agreement with the frozen model", ">", 0.75, "share",
        "comparison", "test text, same first choice, final decoder",
    ),
    Target(
        "controls", "RL decoder clearly ahead of its controls", ">=", 1.0, "1 = yes",
        "controls", "test prompts and test text",
    ),
    Target(
        "claims", "Claims of Method B true more often than Method A's", ">", 0.0, "share",
        "claims", "held-out positions, difference of precision",
    ),
    Target(
        "claim_precision", "Claims of Method B that hold in the frozen model", ">=", 0.8, "share",
        "claims", "held-out positions, right sign above the noise floor",
    ),
    Target(
        "simulatability", "Method B simulates better than every baseline", "<", 0.05, "p",
        "claims",
        "held-out positions, AUROC over unseen and seen interventions; the largest p of all",
    ),
)  # fmt: skip


class TargetRow(JsonRecord):
    """A target beside what was measured."""

    key: str
    """`Target.key`."""
    name: str
    """For people."""
    target: str
    """The plan's threshold in words."""
    profile_target: str | None
    """This run's own threshold in words, where it differs from the plan's."""
    value: float | None
    """What was measured; None where nothing was, or nothing finite."""
    met: bool | None
    """Whether the plan's target is met; None without a value."""
    unit: str
    """Of the value."""
    source_stage: str
    """The stage whose measurement counts."""
    measured_on: str
    """Split and model."""
    note: str
    """What a reader must know about the value."""


class Targets(JsonFile, RootModel[tuple[TargetRow, ...]]):
    """All targets, in the plan's order."""

    def __getitem__(self, key: str) -> TargetRow:
        return next(row for row in self.root if row.key == key)

    @property
    def headline(self) -> dict[str, Scalar]:
        """How many are met, missed and unknown."""
        verdicts = [row.met for row in self.root]
        return {
            "targets_met": verdicts.count(True),
            "targets_missed": verdicts.count(False),
            "targets_unknown": verdicts.count(None),
        }


def fill_targets(measured: Mapping[str, Measurement], stages: Mapping[Source, str]) -> Targets:
    """All targets; those without a measurement are unknown.

    Args:
        measured: by `Target.key`.
        stages: the name of the stage that publishes each source.

    Raises:
        KeyError: a measurement that belongs to no target.
    """
    unknown_keys = set(measured) - {target.key for target in TARGETS}
    if unknown_keys:
        raise KeyError(f"no such targets: {sorted(unknown_keys)}")

    rows = []
    for target in TARGETS:
        missing = Measurement(None, "not measured in this run")
        value, note, profile = measured.get(target.key, missing)
        if value is not None and not math.isfinite(value):
            value, note = None, f"{note}; the measured value was not a finite number".lstrip("; ")

        # A profile that asks for the same is not worth a word.
        differs = profile is not None and profile != target.threshold
        rows.append(
            TargetRow(
                key=target.key,
                name=target.name,
                target=target.text(),
                profile_target=target.text(profile) if differs else None,
                value=value,
                met=target.holds(value),
                unit=target.unit,
                source_stage=stages[target.source],
                measured_on=target.measured_on,
                note=note,
            )
        )
    return Targets(tuple(rows))
