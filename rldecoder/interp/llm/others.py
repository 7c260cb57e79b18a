"""Labels of others in free words, put to the judge that reads ours in words, with their controls.

The same questions about windows of the same unseen text. `shuffled` asks about each label on the
latent of another one, `random_sae` about each on a latent of an untrained SAE: what a judge says of
these is what words that mean nothing are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import Firings, SplitFirings
from rldecoder.interp.imported_outputs import of_others
from rldecoder.interp.llm.confidence import accepted
from rldecoder.interp.llm.items import ItemSampler
from rldecoder.interp.llm.judge import Case, Judge
from rldecoder.interp.records import JudgedScores, JudgeTrust
from rldecoder.interp.scores import ScoringText
from rldecoder.interp.vocabulary import Vocabulary

PURPOSE = "imported_"
"""Stands before what requests about them are for, in the ledger."""

MakeCases = Callable[[ItemSampler, Firings, Sequence[str]], list[Case]]
"""All that is asked about labels, one a row of the firings."""


class InWords(NamedTuple):
    """Labels in free words that somebody else gave to latents of the run."""

    rows: tuple[int, ...]
    """Of the latents, in the run's firings; one may have several labels."""
    texts: tuple[str, ...]
    """The labels."""
    untrained: SplitFirings
    """Latents of an untrained SAE on text that no label was made from."""

    def first(self, latents: int | None) -> InWords:
        """Those of the first latents; None: all."""
        kept = [(row, text) for row, text in zip(self.rows, self.texts, strict=True)
                if latents is None or row < latents]  # fmt: skip
        return self._replace(
            rows=tuple(row for row, _ in kept), texts=tuple(text for _, text in kept)
        )


class JudgedOthers(NamedTuple):
    """What the judge said of them."""

    imported: Sequence[JudgedScores]
    """Of each label, in their order; of those beyond `max_features` nothing."""
    controls: Mapping[str, Sequence[JudgedScores]]
    """`shuffled` and `random_sae`, of the first labels."""
    ours: Mapping[int, JudgedScores]
    """Of this run's own labels in words, by latent."""
    trust: JudgeTrust
    """Whether any of it is to be believed."""

    def accepts(self, scores: JudgedScores, acceptance: Acceptance) -> bool | None:
        """Whether a label passes the bars of our labels in words; None where nobody can say."""
        return accepted(acceptance, scores) if self.trust.trusted else None


class CasesOfOthers(NamedTuple):
    """All that is to be asked about them, method by method."""

    own: tuple[ItemSampler, list[Case]]
    shuffled: tuple[ItemSampler, list[Case]]
    random_sae: tuple[ItemSampler, list[Case]]

    @classmethod
    def of(
        cls,
        words: InWords,
        sampler: ItemSampler,
        firings: Firings,
        make: MakeCases,
        *,
        count: int,
        vocabulary: Vocabulary,
        window_tokens: int,
        rng: np.random.Generator,
    ) -> CasesOfOthers:
        """Draw the windows.

        Args:
            sampler: of the run's unseen text.
            firings: of the run's latents there.
            count: labels whose controls are asked about, at most.
        """
        rows = np.array(words.rows, np.int64)
        own = make(sampler, firings.select(rows), words.texts)

        pairs = of_others(words.rows[:count], rng)
        places = rows[[place for place, _ in pairs]]
        other = make(sampler, firings.select(places), [words.texts[label] for _, label in pairs])

        # The labels take turns on the untrained latents.
        size = words.untrained.firings.latents.size
        texts = words.texts[:count] if size else ()
        turns = np.arange(len(texts)) % max(1, size)
        text = ScoringText(words.untrained.grid, vocabulary, window_tokens)
        untrained = ItemSampler(text)
        drawn = make(untrained, words.untrained.firings.select(turns), texts)
        return cls((sampler, own), (sampler, other), (untrained, drawn))

    @property
    def num_questions(self) -> int:
        """Of all of them."""
        return sum(case.num_questions for _, cases in self for case in cases)

    def ask(
        self, judge: Judge, trust: JudgeTrust, ours: Mapping[int, JudgedScores]
    ) -> JudgedOthers:
        """The judge's scores. Raises what `ChatClient.ask_all` raises."""
        own, shuffled, untrained = (
            judge.score(sampler, cases, PURPOSE + name)
            for (sampler, cases), name in zip(self, ("", "shuffled_", "random_sae_"), strict=True)
        )
        return JudgedOthers(own, {"shuffled": shuffled, "random_sae": untrained}, ours, trust)
