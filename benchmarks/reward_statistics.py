"""The registered tests of docs/experiments/reward_or_teacher.md, on records of single questions.

Axes: S trainings of an arm (its seeds), P questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table

from benchmarks.reward_answers import FROZEN, Asked
from rldecoder.evals.statistics import PairedTest, crossed_bootstrap, percentiles
from rldecoder.schemas import JsonRecord

Floats = NDArray[np.float64]

RESAMPLES = 10_000
PPO, START = "trained", "supervised"
DISTILLATIONS = ("losses_only", "reverse_distillation")
MAX_RISE = 0.3
"""Nats of KL on test text above the start's, where the registration stops."""


class Records(JsonRecord):
    """What every system did with every question."""

    families: tuple[str, ...]
    """[P] of the test questions."""
    groups: tuple[str, ...]
    """[P] the word or verb that a question is about; resampled whole."""
    samples: dict[str, tuple[float, ...]]
    """System (`arm-number`, or `frozen`) to [P] the share of its samples that are right."""
    greedy: dict[str, tuple[float, ...]]
    """The same of first choices."""
    start_kl: dict[str, float]
    """Mean KL(start || system) of an answer's first token, nats."""
    kl: dict[str, float]
    """Mean KL(frozen || system) on test text, nats per token."""
    validation: dict[str, float]
    """Share of samples right on validation questions; what the better distillation is chosen by."""

    @classmethod
    def of(cls, test: Asked, validation: Asked, kl: Mapping[str, Floats]) -> Records:
        """From what was asked, and KL of each test sequence."""
        return cls(
            families=tuple(prompt.task for prompt in test.prompts),
            groups=tuple(prompt.group for prompt in test.prompts),
            samples={name: tuple(found.samples) for name, found in test.systems.items()},
            greedy={name: tuple(found.greedy) for name, found in test.systems.items()},
            start_kl={n: float(found.start_kl.mean()) for n, found in test.systems.items()},
            kl={name: float(values.mean()) for name, values in kl.items()},
            validation={n: float(found.samples.mean()) for n, found in validation.systems.items()},
        )

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(self.model_dump_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Records:
        """What `save` wrote."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def numbers(self) -> list[int]:
        """Trainings that every arm has: a seed counts when it is whole."""
        of_arms: dict[str, set[int]] = {}
        for name in self.samples:
            arm, _, number = name.partition("-")
            if number and arm != START:
                of_arms.setdefault(arm, set()).add(int(number))
        return sorted(set.intersection(*of_arms.values())) if of_arms else []

    def arms(self) -> list[str]:
        """Names of what was trained."""
        return [*dict.fromkeys(n.partition("-")[0] for n in self.samples if "-" in n)]

    def of_arm(self, arm: str, values: Mapping[str, Sequence[float]]) -> Floats:
        """[S, P] of `samples` or `greedy`."""
        return np.array([values[f"{arm}-{number}"] for number in self.numbers()])

    def better_distillation(self) -> str:
        """The one with more samples right on validation questions, over all seeds."""
        means = {
            arm: np.mean([self.validation[f"{arm}-{number}"] for number in self.numbers()])
            for arm in DISTILLATIONS
        }
        return max(DISTILLATIONS, key=lambda arm: float(means[arm]))


class Slope(NamedTuple):
    """Of a difference on another number, over questions."""

    slope: float
    low: float
    high: float
    pvalue: float
    """One-sided: how likely a slope this large is when there is none."""


def slope(
    differences: Floats,
    on: Floats,
    groups: Sequence[str],
    *,
    families: Sequence[str] | None = None,
    seed: int = 0,
) -> Slope:
    """Least-squares slope of [S, P] differences on a number [P] of each question.

    Crossed bootstrap: seeds, and groups of questions, are drawn independently of each other (Owen
    2007, arXiv 0711.1404). Percentile interval; one-sided p-value.

    Args:
        differences: [S, P].
        on: [P].
        groups: [P] names; what is about one word is drawn together.
        families: [P]; where given, the slope is that within families (their means taken off).
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    trainings, items = differences.shape
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    rows = rng.multinomial(trainings, np.full(trainings, 1 / trainings), size=RESAMPLES)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    kinds = np.zeros(items, int)
    if families is not None:
        kinds = np.unique(np.asarray(families), return_inverse=True)[1]

    def fit(weights: NDArray[np.int64], y: Floats) -> float:
        x, y = on.astype(float).copy(), y.copy()
        for kind in range(kinds.max() + 1):
            inside = kinds == kind
            total = max(1, weights[inside].sum())
            x[inside] -= (weights[inside] * x[inside]).sum() / total
            y[inside] -= (weights[inside] * y[inside]).sum() / total
        return float((weights * x * y).sum() / max(1e-12, (weights * x * x).sum()))

    found = np.array(
        [fit(d[group], r @ differences / trainings) for r, d in zip(rows, drawn, strict=True)]
    )
    whole = fit(np.ones(items, dtype=np.int64), differences.mean(0))
    pvalue = (1 + int((found <= 0).sum())) / (1 + RESAMPLES)
    return Slope(whole, *percentiles(found), pvalue)


class Tested(NamedTuple):
    """A test's name and what came out."""

    name: str
    value: float
    low: float
    high: float
    pvalue: float


def tests(records: Records) -> list[Tested]:
    """The primary test first, then the secondary ones."""
    best = records.better_distillation()
    teacher = np.array(records.samples[FROZEN])
    groups, families = records.groups, records.families
    ppo = records.of_arm(PPO, records.samples)
    lead = ppo - records.of_arm(best, records.samples)
    found = [
        Tested("PRIMARY: slope of (PPO - distillation)", *slope(lead, 1 - teacher, groups)),
        Tested("the same within families", *slope(lead, 1 - teacher, groups, families=families)),
    ]

    def difference(name: str, values: Floats, inside: NDArray[np.bool_]) -> None:
        kept = [group for group, keep in zip(groups, inside, strict=True) if keep]
        if kept:
            test: PairedTest = crossed_bootstrap(
                values[:, inside], groups=kept, resamples=RESAMPLES
            )
            found.append(Tested(name, test.difference, test.low, test.high, test.pvalue))

    everything = np.ones(len(teacher), dtype=bool)
    wrong = teacher < 0.5
    difference("PPO - distillation, teacher right in less than half", lead, wrong)
    difference("PPO - distillation, the other questions", lead, ~wrong)
    difference("PPO - distillation, all", lead, everything)
    for arm in records.arms():
        if arm not in (PPO, START):
            other = records.of_arm(arm, records.samples)
            difference(f"PPO - {arm}, all", ppo - other, everything)
    difference("PPO - frozen model, all", ppo - teacher, everything)
    return found


def judged(records: Records) -> Group:
    """Tables of all systems and all tests."""
    numbers = records.numbers()
    families = [*dict.fromkeys(records.families)]
    inside = {name: np.array(records.families) == name for name in families}
    systems = Table(title=f"{len(records.groups)} questions, seeds {numbers}: share of samples")
    for column in ("system", *families, "all", "greedy", "KL text", "KL to start"):
        systems.add_column(column, justify="left" if column == "system" else "right")

    for arm in [*records.arms(), FROZEN]:
        names = [arm] if arm == FROZEN else [f"{arm}-{number}" for number in numbers]
        names = [f"{START}-0"] if arm == START else names
        samples = np.array([records.samples[name] for name in names])
        greedy = np.array([records.greedy[name] for name in names])
        kl = np.mean([records.kl.get(name, 0.0) for name in names])
        start_kl = np.mean([records.start_kl[name] for name in names])
        shares = [samples[:, rows].mean() for rows in inside.values()]
        cells = [*shares, samples.mean(), greedy.mean(), kl, start_kl]
        systems.add_row(arm, *(f"{cell:.3f}" for cell in cells))

    table = Table(title=f"better distillation by validation: {records.better_distillation()}")
    for column in ("test", "value", "95 %", "p, one-sided"):
        table.add_column(column, justify="left" if column == "test" else "right")
    for test in tests(records):
        interval = f"{test.low:+.3f} to {test.high:+.3f}"
        table.add_row(test.name, f"{test.value:+.3f}", interval, f"{test.pvalue:.4f}")
    start = records.kl[f"{START}-0"]
    risen = [n for n, kl in records.kl.items() if kl > start + MAX_RISE]
    return Group(systems, table, f"KL on text risen by more than {MAX_RISE}: {risen or 'none'}")
