"""Is the judge to be believed? It is asked about planted features, whose labels are known.

A planted feature fires exactly where a known predicate holds in the scored text; its right label
is the predicate in words, its wrong label that of another planted feature. A trusted judge scores
the right labels high and the wrong ones near 0.5, with missing answers counted as wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rldecoder.config.llm import LlmConfig
from rldecoder.evals.statistics import bootstrap_mean_ci
from rldecoder.interp.corpus import Firings
from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.judge import Case, Judge, make_cases
from rldecoder.interp.llm.tasks import KINDS, TASKS
from rldecoder.interp.predicate import Affix, Predicate, TokenClass, TokenIn, describe
from rldecoder.interp.records import JudgedScores, JudgeTrust, KindTrust
from rldecoder.interp.scores import ScoringText, derangement
from rldecoder.interp.vocabulary import TOKEN_CLASSES

FREQUENT_TOKENS = 300
"""Most frequent word tokens of the text, from which token and affix predicates are drawn."""
AFFIX_LENGTHS = (2, 3)
MAX_OVERLAP = 0.5
"""Planted features share at most this part of their windows (Jaccard): else another's label would
be right too."""
DERANGEMENTS = 30
"""Pairings with wrong labels that are tried; the one least right by accident is taken."""


class Planted(NamedTuple):
    """Planted features of one text."""

    cases: list[Case]
    """With their right labels."""
    wrong: list[Case]
    """The same windows with another one's label."""
    exact_right: dict[str, float]
    """By kind: what a reader without error scores with the right labels."""
    exact_wrong: dict[str, float]


def plant(text: ScoringText, sampler: ItemSampler, config: LlmConfig, seed: int) -> Planted:
    """Planted features with enough windows of every kind; fewer than asked for if need be."""
    rng = np.random.default_rng(seed)
    chosen: list[tuple[Case, NDArray[np.bool_]]] = []
    windows: list[NDArray[np.int64]] = []
    counts = dict.fromkeys(KINDS, config.judge_windows)
    for predicate in _candidates(text, rng):
        if len(chosen) == config.planted_features:
            break
        held = text.holds(predicate)
        mine = np.unique(text.window_of[held])
        if any(_jaccard(mine, other) > MAX_OVERLAP for other in windows):
            continue
        label = describe(predicate, text.vocabulary)
        [case] = make_cases(sampler, _firings(held, -1 - len(chosen)), [label], seed, counts)
        if all(case.questions.values()):
            chosen.append((case, held))
            windows.append(mine)

    # The least right of many pairings: wrong labels must not be right by accident.
    cases, masks = [case for case, _ in chosen], [held for _, held in chosen]
    order = _least_right(cases, masks, rng)
    wrong = [
        case._replace(label=cases[other].label) for case, other in zip(cases, order, strict=True)
    ]
    return Planted(
        cases, wrong, _exact(cases, masks, range(len(cases))), _exact(cases, masks, order)
    )


def try_judge(
    judge: Judge, model: str, sampler: ItemSampler, planted: Planted, config: LlmConfig
) -> JudgeTrust:
    """Ask the judge about all planted features, with right and wrong labels, and decide."""
    right = judge.score(sampler, planted.cases, "planted_")
    wrong = judge.score(sampler, planted.wrong, "planted_wrong_")
    kinds = {kind: _kind_trust(kind, right, wrong, planted) for kind in KINDS if planted.cases}
    reason = _objection(kinds, len(planted.cases), config)
    return JudgeTrust(
        model=model,
        trusted=reason is None,
        reason=reason,
        planted=len(planted.cases),
        bar=config.judge_bar,
        tolerance=config.control_tolerance,
        questions=sum(s.questions for s in (*right, *wrong)),
        failures=sum(s.failures for s in (*right, *wrong)),
        **kinds,
    )


def num_questions(planted: Planted) -> int:
    """Questions that `try_judge` asks."""
    return len(KINDS) * (len(planted.cases) + len(planted.wrong))


def _objection(kinds: dict[str, KindTrust], planted: int, config: LlmConfig) -> str | None:
    """Why the judge is not trusted; None if it is."""
    if planted < config.min_planted:
        return f"the text has room for {planted} planted features, fewer than {config.min_planted}"
    for kind, found in kinds.items():
        if found.right < config.judge_bar:
            return f"{kind} of right labels is {found.right:.3f}, below {config.judge_bar:g}"
        if abs(found.wrong - 0.5) > config.control_tolerance:
            return (
                f"{kind} of wrong labels is {found.wrong:.3f}, further than "
                f"{config.control_tolerance:g} from 0.5"
            )
    return None


def _kind_trust(
    kind: str, right: Sequence[JudgedScores], wrong: Sequence[JudgedScores], planted: Planted
) -> KindTrust:
    means = [bootstrap_mean_ci([getattr(s, kind) for s in part]) for part in (right, wrong)]
    return KindTrust(
        right=means[0].mean, right_low=means[0].low, right_high=means[0].high, wrong=means[1].mean,
        wrong_low=means[1].low, wrong_high=means[1].high, exact_right=planted.exact_right[kind],
        exact_wrong=planted.exact_wrong[kind],
    )  # fmt: skip


def _candidates(text: ScoringText, rng: np.random.Generator) -> list[Predicate]:
    """Predicates whose words a reader can apply to a window's text alone, kinds interleaved."""
    vocabulary = text.vocabulary
    tokens = text.grid.tokens.reshape(-1)[text.valid]
    counts = np.bincount(tokens[tokens >= 0], minlength=vocabulary.size)
    frequent = [int(t) for t in np.argsort(-counts, kind="stable")[:FREQUENT_TOKENS] if counts[t]]
    words = [t for t in frequent if vocabulary.texts[t].strip().isalpha()]
    affixes = {
        (side, affix)
        for token in words
        for side, affix in vocabulary.affixes(token, max(AFFIX_LENGTHS))
        if len(affix) in AFFIX_LENGTHS
    }
    # What a class of TOKEN_CLASSES means must be plain from its words: not so for word pieces.
    readable = [
        name for name in TOKEN_CLASSES if name not in ("special", "word_start", "word_piece")
    ]
    kinds: list[list[Predicate]] = [
        [TokenClass(name=name) for name in readable],
        [TokenIn(tokens=(token,)) for token in frequent],
        [Affix(side=side, text=affix) for side, affix in sorted(affixes)],
        [TokenIn(tokens=pair) for pair in zip(words[::2], words[1::2], strict=False)],
    ]
    shuffled = [[kind[i] for i in rng.permutation(len(kind))] for kind in kinds]
    longest = max(len(kind) for kind in shuffled)
    return [kind[i] for i in range(longest) for kind in shuffled if i < len(kind)]


def _firings(held: NDArray[np.bool_], latent: int) -> Firings:
    cells = np.flatnonzero(held)
    ones = np.ones(cells.size, np.float32)
    matrix = sparse.csr_array((ones, (np.zeros(cells.size, int), cells)), shape=(1, held.size))
    return Firings(np.array([latent], np.int64), matrix)


def _jaccard(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    both = np.intersect1d(a, b, assume_unique=True).size
    return both / max(a.size + b.size - both, 1)


def _exact(
    cases: list[Case], masks: list[NDArray[np.bool_]], order: Sequence[int] | NDArray[np.int64]
) -> dict[str, float]:
    """Mean scores of a reader without error when case i has the label of case order[i]."""
    out = {}
    for kind in KINDS:
        scores = []
        for case, other in zip(cases, order, strict=True):
            asked, task = case.questions[kind], TASKS[kind]
            scores.append(
                task.score(asked, [task.read(question, masks[other]) for question in asked])
            )
        out[kind] = float(np.mean([s for s in scores if s is not None])) if scores else 0.0
    return out


def _least_right(
    cases: list[Case], masks: list[NDArray[np.bool_]], rng: np.random.Generator
) -> NDArray[np.int64]:
    tries = [derangement(len(cases), rng) for _ in range(DERANGEMENTS)]
    return min(tries, key=lambda order: max(_exact(cases, masks, order).values(), default=0.0))
