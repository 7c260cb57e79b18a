"""Labels by a language model from start to end: estimate, judge's gate, labels, scores, control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from rldecoder.config.llm import LlmConfig
from rldecoder.errors import BudgetExceededError
from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import Firings, SplitFirings
from rldecoder.interp.labelers import Evidence, LabelDraft
from rldecoder.interp.llm.backends import ChatModel
from rldecoder.interp.llm.confidence import WordConfidences, word_confidences
from rldecoder.interp.llm.estimate import Estimate, add_up
from rldecoder.interp.llm.gate import Planted, num_questions, plant, try_judge
from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.judge import Case, Judge, JudgeScores, make_cases
from rldecoder.interp.llm.labeler import LlmLabeler
from rldecoder.interp.llm.session import Purse, Session
from rldecoder.interp.llm.storage import AnswerCache, Ledger, Spent
from rldecoder.interp.records import JudgedScores, JudgeTrust, OtherLabel
from rldecoder.interp.scores import ScoringText, derangement, mean_or_none
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.lm.user_cache import user_cache
from rldecoder.seeds import derive_seed

STAND_IN = "tokens that belong to a kind of word, in some context or other"
"""Stands for labels that are not known yet when questions about them are counted."""


class Bar(Protocol):
    """A progress bar."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Move on."""
        ...


Track = Callable[[str, float, str], AbstractContextManager[Bar]]
"""Opens a bar: description, total, unit."""


class LlmLabels(NamedTuple):
    """What the language model said, and what its judge thinks of it."""

    drafts: list[LabelDraft]
    scores: list[JudgeScores]
    trust: JudgeTrust
    control: list[JudgeScores]
    """Of labels against other latents."""
    models: tuple[str, str]
    """Names of the labeler's and of the judge's model."""
    ledger: dict[str, list[Any]]
    """Columns of storage.LEDGER."""
    confidences: WordConfidences


class LlmRun:
    """One stage's dealings with its models. Use as a context manager: it holds two databases.

    Args:
        fit: where labels come from; rows most important first.
        scored: where they are judged; the same latents, other documents.
        acceptance: scores of a label that counts as accepted.
        progress: a folder that outlives a killed run, for the ledger.
    """

    def __init__(
        self,
        config: LlmConfig,
        models: tuple[ChatModel, ChatModel],
        fit: SplitFirings,
        scored: SplitFirings,
        vocabulary: Vocabulary,
        *,
        window_tokens: int,
        min_firings: int,
        acceptance: Acceptance,
        seed: int,
        progress: Path,
    ) -> None:
        self._acceptance = acceptance
        self.config, self.models, self._seed = config, models, seed
        rows = np.arange(fit.firings.latents.size)[: config.max_features]
        self._evidence = Evidence(fit.grid, fit.firings.select(rows), vocabulary)
        self._firings: Firings = scored.firings.select(rows)
        text = ScoringText(scored.grid, vocabulary, window_tokens)
        self._sampler = ItemSampler(text, config.judge_windows)
        # For confidence: what the judge says on the text that the labels come from.
        self._seen = ItemSampler(
            ScoringText(fit.grid, vocabulary, window_tokens), config.judge_windows
        )
        self._planted: Planted = plant(text, self._sampler, config, derive_seed(seed, "planted"))
        self._cache = AnswerCache(config.cache or user_cache() / "llm_answers.sqlite")
        self._ledger = Ledger(progress / "ledger.sqlite")
        self._purse = Purse(self._ledger, config.budget)
        first = Session(models[0], self._cache, self._purse)
        second = first if models[1] is models[0] else Session(models[1], self._cache, self._purse)
        self._sessions = (first, second)
        self._window_tokens, self._min_firings = window_tokens, min_firings

    def __enter__(self) -> LlmRun:
        return self

    def __exit__(self, *error: object) -> None:
        self._cache.close()
        self._ledger.close()

    def estimate(self) -> Estimate:
        """What is still to be sent, without sending anything.

        Answers in the cache are used: after an interrupted run only the rest is counted. Questions
        about labels that are not known yet are counted with a stand-in.
        """
        labeler, judge = self._labeler(lambda: None), self._judge(lambda: None)
        questions = labeler.questions(self._evidence)
        labels: list[str | None] = []
        for latent in map(int, self._evidence.firings.latents):
            known = self._sessions[0].peek(questions[latent]) if latent in questions else None
            unknown = latent in questions and known is None
            labels.append(STAND_IN if unknown else known.value if known else None)
        cases = [
            *self._cases(labels),
            *self._control_cases(labels),
            *self._planted.cases,
            *self._planted.wrong,
        ]
        asked = [q for case in cases for q in judge.questions(self._sampler, case).values()]
        for case in self._seen_cases(labels):
            asked += judge.questions(self._seen, case).values()
        return add_up(self._sessions[0], list(questions.values())) + add_up(
            self._sessions[1], asked
        )

    def spent(self) -> Spent:
        """What the ledger holds: of this artifact's earlier, interrupted runs at first."""
        return self._ledger.spent()

    def label(self, track: Track) -> LlmLabels:
        """Try the judge, label, score, and score against other latents.

        Raises:
            BudgetExceededError: it is expected to cost more than is left (nothing was sent), or
                the budget was used up on the way. Also what `Session.ask_all` raises.
        """
        self._refuse_if_too_dear()
        with track("judge's gate", num_questions(self._planted), "answers") as bar:
            trust = try_judge(
                self._judge(bar.advance), self.models[1].name, self._sampler, self._planted,
                self.config,
            )  # fmt: skip
        count = len(self._labeler(lambda: None).questions(self._evidence))
        with track("labels by model", count, "answers") as bar:
            drafts = self._labeler(bar.advance).label(self._evidence)
        labels = [draft.text for draft in drafts]
        cases, control = self._cases(labels), self._control_cases(labels)
        seen_cases = self._seen_cases(labels)
        every = (*cases, *control, *seen_cases)
        asked = sum(bool(items) for c in every if c.label for items in c.items.values())
        with track("judge", asked, "answers") as bar:
            judge = self._judge(bar.advance)
            scores = judge.score(self._sampler, cases)
            shuffled = judge.score(self._sampler, control, "shuffled_")
            seen = judge.score(self._seen, seen_cases, "seen_")
        names = (self.models[0].name, self.models[1].name)
        sure = self._confidences(drafts, seen, scores, trust)
        return LlmLabels(drafts, scores, trust, shuffled, names, self._ledger.columns(), sure)

    def _confidences(
        self,
        drafts: list[LabelDraft],
        seen: list[JudgeScores],
        scores: list[JudgeScores],
        trust: JudgeTrust,
    ) -> WordConfidences:
        if not self.config.confidence:
            reason = "not asked for (`label_features.llm.confidence`)"
            nothing = {"reason": reason, "ece": None, "brier": None}
            return WordConfidences([None] * len(drafts), [reason] * len(drafts), nothing)
        seed = derive_seed(self._seed, "confidence")
        return word_confidences(drafts, seen, scores, trust, self._acceptance, seed)

    def _refuse_if_too_dear(self) -> None:
        needed, spent, budget = self.estimate(), self.spent(), self.config.budget
        for name, limit, used, more in (
            ("max_requests", budget.max_requests, spent.requests, needed.requests),
            ("max_tokens", budget.max_tokens, spent.tokens, needed.tokens),
            ("max_cost", budget.max_cost, spent.cost, needed.cost),
        ):
            if limit is not None and used + more > limit:
                raise BudgetExceededError(
                    f"The budget {name} = {limit:,.8g} will not do: {used:,.8g} used, and about "
                    f"{more:,.8g} still needed.",
                    "Nothing was sent now.",
                    f"Raise `label_features.llm.budget.{name}`, or ask less: `max_features`, "
                    "`control_features`, `planted_features`.",
                )

    def _labeler(self, on_answer: Callable[[], None]) -> LlmLabeler:
        return LlmLabeler(
            self._sessions[0], self.config, self._window_tokens, self._min_firings, on_answer
        )

    def _judge(self, on_answer: Callable[[], None]) -> Judge:
        return Judge(self._sessions[1], self.config, on_answer)

    def _cases(self, labels: Sequence[str | None]) -> list[Case]:
        seed = derive_seed(self._seed, "windows")
        return make_cases(self._sampler, self._firings, labels, seed)

    def _seen_cases(self, labels: Sequence[str | None]) -> list[Case]:
        """Detection on the text that the labels come from."""
        if not self.config.confidence:
            return []
        seed = derive_seed(self._seed, "seen")
        return make_cases(self._seen, self._evidence.firings, labels, seed, ("detection",))

    def _control_cases(self, labels: Sequence[str | None]) -> list[Case]:
        """The most important labelled latents, each with another one's label."""
        rows = np.flatnonzero([label is not None for label in labels])
        rows = rows[: self.config.control_features]
        if rows.size < 2:
            return []
        order = derangement(rows.size, np.random.default_rng(derive_seed(self._seed, "control")))
        swapped = [labels[int(rows[other])] for other in order]
        seed = derive_seed(self._seed, "windows")
        return make_cases(self._sampler, self._firings.select(rows), swapped, seed)


def as_records(found: LlmLabels) -> dict[int, OtherLabel]:
    """What `feature_labels.json` says of each latent."""
    return {
        draft.latent: OtherLabel(
            labeler=LlmLabeler.name,
            model=found.models[0],
            label=draft.text,
            failure=draft.failure,
            judge=found.models[1],
            judge_trusted=found.trust.trusted,
            scores=JudgedScores(**scores._asdict()),
            confidence=confidence,
            no_confidence=reason,
        )
        for draft, scores, confidence, reason in zip(
            found.drafts,
            found.scores,
            found.confidences.found,
            found.confidences.reasons,
            strict=True,
        )
    }


def llm_summary(found: LlmLabels) -> dict[str, Any]:
    """Counts and means, over all latents (a failure scores 0) and over those with a label."""
    good = [s for d, s in zip(found.drafts, found.scores, strict=True) if d.text is not None]
    live = [i for i, cached in enumerate(found.ledger["cached"]) if not cached]
    out: dict[str, Any] = {
        "labeler": found.models[0],
        "judge": found.trust.model_dump(mode="json"),
        "latents": len(found.drafts),
        "labelled": len(good),
        "failed": len(found.drafts) - len(good),
        "judge_questions": sum(s.questions for s in found.scores),
        "judge_failures": sum(s.failures for s in found.scores),
        "control_latents": len(found.control),
        "confidence": found.confidences.report,
        "attempts": len(live),
        "cached_answers": len(found.ledger["cached"]) - len(live),
    }
    for name in ("tokens_in", "tokens_out", "cost"):
        out[name] = sum(found.ledger[name][i] for i in live)
    for name in ("detection", "fuzzing", "window_precision", "window_recall", "window_f1"):
        out[f"mean_{name}"] = mean_or_none([getattr(s, name) for s in found.scores])
        out[f"mean_{name}_labelled"] = mean_or_none([getattr(s, name) for s in good])
        out[f"mean_{name}_shuffled"] = mean_or_none([getattr(s, name) for s in found.control])
    return out
