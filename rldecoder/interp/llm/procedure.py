"""Labels by a language model from start to end: judge's gate, labels, scores, control; and dry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from rldecoder.config.llm import LlmConfig
from rldecoder.errors import BudgetExceededError
from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.control_latents import ControlLatents
from rldecoder.interp.corpus import Firings, SplitFirings
from rldecoder.interp.labelers import Evidence, LabelDraft
from rldecoder.interp.llm.backends import ChatModel
from rldecoder.interp.llm.client import ChatClient
from rldecoder.interp.llm.confidence import WordCalibration, WordConfidences, word_confidences
from rldecoder.interp.llm.estimate import DryClient, Estimate
from rldecoder.interp.llm.gate import Planted, num_questions, plant, try_judge
from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.judge import Case, Judge, make_cases
from rldecoder.interp.llm.labeler import LlmLabeler
from rldecoder.interp.llm.others import CasesOfOthers, InWords
from rldecoder.interp.llm.results import Judged, LlmLabels
from rldecoder.interp.llm.storage import Database, Ledger, Spent
from rldecoder.interp.llm.tasks import task_counts
from rldecoder.interp.records import JudgedScores, JudgeTrust
from rldecoder.interp.scores import ScoringText, derangement
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.lm.user_cache import user_cache
from rldecoder.reporting import Bar, SilentReporter
from rldecoder.seeds import derive_seed

Track = Callable[[str, float, str], AbstractContextManager[Bar]]
"""Opens a bar: description, total, unit."""


class Condition(NamedTuple):
    """Latents to label in words, and the unseen text on which their labels are judged."""

    name: str
    """Which control they are; empty for the run's own latents."""
    evidence: Evidence
    """Where labels come from."""
    firings: Firings
    """Of the same latents on the unseen text."""
    sampler: ItemSampler

    @property
    def purpose(self) -> str:
        """Stands before what requests are for, in the ledger."""
        return f"{self.name}_" if self.name else ""


class LlmRun:
    """One stage's dealings with its models. Use as a context manager: it holds a database.

    Args:
        fit: where labels come from; rows most important first.
        scored: where they are judged; the same latents, other documents.
        controls: latents labelled and judged alike, by name: `random_sae` and `drawn`.
        others: labels of others to judge beside them.
        acceptance: scores of a label that counts as accepted.
        progress: a folder that outlives a killed run, to know what was spent.
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
        controls: Mapping[str, ControlLatents] = MappingProxyType({}),
        others: InWords | None = None,
    ) -> None:
        self._acceptance = acceptance
        self.config, self.models, self._seed = config, models, seed
        rows = np.arange(fit.firings.latents.size)[: config.max_features]

        def condition(name: str, fit: SplitFirings, scored: SplitFirings) -> Condition:
            text = ScoringText(scored.grid, vocabulary, window_tokens)
            evidence = Evidence(fit.grid, fit.firings, vocabulary)
            return Condition(name, evidence, scored.firings, ItemSampler(text))

        self._own = condition(
            "",
            fit._replace(firings=fit.firings.select(rows)),
            scored._replace(firings=scored.firings.select(rows)),
        )
        self._controls = [condition(name, *drawn) for name, drawn in controls.items()]
        self._others = None if others is None else others.first(config.max_features)
        self._vocabulary = vocabulary
        # For confidence: what the judge says on the text that the labels come from.
        self._seen = ItemSampler(ScoringText(fit.grid, vocabulary, window_tokens))
        self._planted: Planted = plant(
            self._own.sampler.text, self._own.sampler, config, derive_seed(seed, "planted")
        )
        self._database = Database(config.cache or user_cache() / "llm_answers.sqlite")
        self._ledger = Ledger(self._database, progress, config.budget)
        self._clients = [
            ChatClient(model, self._database, self._ledger) for model in dict.fromkeys(models)
        ]
        self._window_tokens, self._min_firings = window_tokens, min_firings

    def __enter__(self) -> LlmRun:
        return self

    def __exit__(self, *error: object) -> None:
        self._database.close()

    def estimate(self) -> Estimate:
        """What is still to be sent, without sending anything.

        A dry run: the same questions, with answers of the cache, so that after an interrupted run
        only the rest is counted, and stand-ins for labels that are not known yet.
        """
        dry = [DryClient(client) for client in self._clients]
        self._label(dry, SilentReporter().track)
        return sum((client.total for client in dry), Estimate())

    def spent(self) -> Spent:
        """What the ledger holds: of this artifact's earlier, interrupted runs at first."""
        return self._ledger.spent()

    def label(self, track: Track) -> LlmLabels:
        """Try the judge, label, score, and score the controls.

        Raises:
            BudgetExceededError: it is expected to cost more than is left (nothing was sent), or
                the budget was used up on the way. Also what `ChatClient.ask_all` raises.
        """
        self._refuse_if_too_dear()
        return self._label(self._clients, track)

    def _label(self, clients: Sequence[ChatClient], track: Track) -> LlmLabels:
        """With the labeler's client first and the judge's last; they may be one."""
        with track("judge's gate", num_questions(self._planted), "answers") as bar:
            trust = try_judge(
                Judge(clients[-1], self.config, bar.advance), self.models[1].name,
                self._own.sampler, self._planted, self.config,
            )  # fmt: skip

        own, *controls = conditions = (self._own, *self._controls)
        count = sum(
            len(self._labeler(clients[0], condition).questions(condition.evidence))
            for condition in conditions
        )
        with track("labels by model", count, "answers") as bar:
            drafts = {
                condition.name: self._labeler(clients[0], condition, bar.advance).label(
                    condition.evidence
                )
                for condition in conditions
            }
        labels = {name: [draft.text for draft in found] for name, found in drafts.items()}
        cases = {
            name: self._cases(sampler, firings, labels[name])
            for name, _, firings, sampler in conditions
        }

        # One bar for all that the judge is asked.
        shuffled, seen = self._shuffled_cases(labels[""]), self._seen_cases(labels[""])
        others = self._cases_of_others()
        every = [*shuffled, *seen, *(case for found in cases.values() for case in found)]
        total = sum(case.num_questions for case in every)
        total += 0 if others is None else others.num_questions
        with track("judge", total, "answers") as bar:
            judge = Judge(clients[-1], self.config, bar.advance)
            scores = judge.score(own.sampler, cases[""])
            shuffled_scores = judge.score(own.sampler, shuffled, "shuffled_")
            seen_scores = judge.score(self._seen, seen, "seen_")
            drawn = {
                condition.name: Judged(
                    drafts[condition.name],
                    judge.score(condition.sampler, cases[condition.name], condition.purpose),
                )
                for condition in controls
            }
            ours = {draft.latent: said for draft, said in zip(drafts[""], scores, strict=True)}
            judged = None if others is None else others.ask(judge, trust, ours)
        return LlmLabels(
            own=Judged(drafts[""], scores),
            trust=trust,
            shuffled=Judged(_swapped(drafts[""], shuffled), shuffled_scores),
            drawn=drawn,
            models=(self.models[0].name, self.models[1].name),
            ledger=self._ledger.columns(),
            confidences=self._confidences(drafts[""], seen_scores, scores, trust),
            others=judged,
        )

    def _confidences(
        self,
        drafts: list[LabelDraft],
        seen: list[JudgedScores],
        scores: list[JudgedScores],
        trust: JudgeTrust,
    ) -> WordConfidences:
        if not self.config.confidence:
            reason = "not asked for (`label_features.llm.confidence`)"
            nothing = WordCalibration(reason=reason, ece=None, brier=None)
            return WordConfidences([None] * len(drafts), [reason] * len(drafts), nothing)
        seed = derive_seed(self._seed, "confidence")
        return word_confidences(drafts, seen, scores, trust, self._acceptance, seed)

    def _refuse_if_too_dear(self) -> None:
        needed, spent, budget = self.estimate(), self.spent(), self.config.budget
        for name, used in spent._asdict().items():
            limit, more = getattr(budget, f"max_{name}"), getattr(needed, name)
            if limit is not None and used + more > limit:
                raise BudgetExceededError(
                    f"The budget max_{name} = {limit:,.8g} will not do: {used:,.8g} used, and "
                    f"about {more:,.8g} still needed.",
                    "Nothing was sent now.",
                    f"Raise `label_features.llm.budget.max_{name}`, or ask less: `max_features`, "
                    "`control_features`, `control_latents`, `planted_features`, "
                    "`intruder_questions`, `simulation_windows`.",
                )

    def _labeler(
        self, client: ChatClient, condition: Condition, on_answer: Callable[[], None] = lambda: None
    ) -> LlmLabeler:
        return LlmLabeler(
            client, self.config, self._window_tokens, self._min_firings, on_answer,
            condition.purpose,
        )  # fmt: skip

    def _cases(
        self, sampler: ItemSampler, firings: Firings, labels: Sequence[str | None]
    ) -> list[Case]:
        """All that is asked about labels, one a row of the firings."""
        seed = derive_seed(self._seed, "windows")
        return make_cases(sampler, firings, labels, seed, task_counts(self.config))

    def _cases_of_others(self) -> CasesOfOthers | None:
        """What is asked about labels of others in words; None where there are none."""
        if self._others is None or not self._others.texts:
            return None
        return CasesOfOthers.of(
            self._others,
            self._own.sampler,
            self._own.firings,
            self._cases,
            count=self.config.control_features,
            vocabulary=self._vocabulary,
            window_tokens=self._window_tokens,
            rng=np.random.default_rng(derive_seed(self._seed, "others")),
        )

    def _seen_cases(self, labels: Sequence[str | None]) -> list[Case]:
        """Detection on the text that the labels come from."""
        if not self.config.confidence:
            return []
        seed, counts = derive_seed(self._seed, "seen"), {"detection": self.config.judge_windows}
        return make_cases(self._seen, self._own.evidence.firings, labels, seed, counts)

    def _shuffled_cases(self, labels: Sequence[str | None]) -> list[Case]:
        """The most important labelled latents, each with another one's label."""
        rows = np.flatnonzero([label is not None for label in labels])
        rows = rows[: self.config.control_features]
        if rows.size < 2:
            return []
        order = derangement(rows.size, np.random.default_rng(derive_seed(self._seed, "control")))
        swapped = [labels[int(rows[other])] for other in order]
        return self._cases(self._own.sampler, self._own.firings.select(rows), swapped)


def _swapped(drafts: Sequence[LabelDraft], cases: Sequence[Case]) -> list[LabelDraft]:
    """The drafts of the cases' latents, with the labels that they were judged by."""
    by_latent = {draft.latent: draft for draft in drafts}
    return [by_latent[case.latent]._replace(text=case.label) for case in cases]
