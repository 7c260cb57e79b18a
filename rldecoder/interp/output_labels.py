"""From two splits to output labels: the procedure, the same for labels and for their controls.

Fitted on the `label` split, scored on the `test` split. For confidence the documents of the
`label` split are dealt into folds, as for input labels (`calibration`): in each of three rotations
sets are fitted on one fold, measured on the second, accepted or not on the third.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rldecoder.checkpoints import Checkpoints
from rldecoder.data.shards import read_token_table
from rldecoder.interp.ablation_pass import Ablations, Places, Texts, choose_places
from rldecoder.interp.ablation_shards import AblationCrew, Asked
from rldecoder.interp.calibration import NUM_ROTATIONS
from rldecoder.interp.control_latents import SplitSource
from rldecoder.interp.corpus import SplitFirings, document_folds
from rldecoder.interp.output_scores import score_outputs
from rldecoder.interp.output_sets import (
    Gains,
    OutputSet,
    SetGroup,
    Trial,
    Tried,
    Trier,
    fit_sets,
)
from rldecoder.interp.records import OutputScores
from rldecoder.interp.scores import derangement
from rldecoder.interp.strong import usual_highs
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Reporter
from rldecoder.sae.model import Sae

CHECKPOINT_SECONDS = 30.0
"""Between checkpoints; a killed run goes on from the last one."""
PLACES_AT_ONCE = 512
"""Places at which sets are tried again at a time."""


class Rotation(NamedTuple):
    """Sets fitted on one fold of the `label` split."""

    sets: list[OutputSet]
    held_out: list[OutputScores]
    """On the second fold."""
    outcome: list[OutputScores]
    """On the third."""


class OutputLabelled(NamedTuple):
    """Output labels of some latents; rows as in the firings."""

    sets: list[OutputSet]
    scores: list[OutputScores]
    """On the `test` split."""
    shuffled: list[OutputScores]
    """Each latent's places with another latent's set."""
    rotations: list[Rotation]
    """Empty where none was asked for."""


class OutputLabeler:
    """Labels latents by what they raise in the frozen model.

    Args:
        share: places are firings of at least this share of the latent's usual high.
        count: places of a latent in a split, or in a fold of it, at most.
        progress: a folder that outlives a killed run.
        crew: who runs the places elsewhere; None runs them here.
    """

    def __init__(
        self,
        lm: FrozenLM,
        source: SplitSource,
        *,
        share: float,
        count: int,
        seed: int,
        report: Reporter,
        progress: Path,
        owner: str,
        crew: AblationCrew | None = None,
    ) -> None:
        self._lm, self._source = lm, source
        self._share, self._count, self._seed = share, count, seed
        self._report, self._progress, self._owner = report, progress, owner
        self._crew = crew
        self._texts: dict[str, Texts] = {}
        self.slow_because: str | None = None
        """Why places had to be run as whole sequences; None if they were not."""

    def label(
        self, name: str, sae: Sae, fit: SplitFirings, scored: SplitFirings, *, rotate: bool
    ) -> OutputLabelled:
        """Label on one split, score on the other; both have the same latents in the same rows.

        Args:
            name: for progress and its files.
            rotate: whether sets of single folds are tried too, for confidence.
        """
        number = len(fit.firings.latents)
        least = self._least(fit)
        # As many as the folds may hold together, with or without rotations: one procedure.
        places = choose_places(fit, least, NUM_ROTATIONS * self._count, self._seed)
        gains = Gains.empty(len(places.row), self._lm.vocab_size, self._lm.d_model if rotate else 0)
        asked = Asked(places, None, again=rotate)
        self._run(f"{name}-fit", "label", sae, asked, gains, gains.put)
        sets = fit_sets(places, gains, number)

        rotations: list[Rotation] = []
        if rotate:
            rotations = self._rotations(fit, places, gains)

        tokens = [found.tokens for found in sets]
        rng = np.random.default_rng(self._seed)
        groups = [SetGroup(tokens, np.arange(number)), SetGroup(tokens, derangement(number, rng))]
        own, shuffled = self.score(name, sae, fit, scored, groups)
        return OutputLabelled(sets, own, shuffled, rotations)

    def score(
        self,
        name: str,
        sae: Sae,
        fit: SplitFirings,
        scored: SplitFirings,
        groups: Sequence[SetGroup],
    ) -> list[list[OutputScores]]:
        """Score given sets on the `test` split: for each group, those of all latents.

        A latent fails without places, or where its set is empty.

        Args:
            name: for progress and its files.
            fit: says how high each latent usually goes.
            groups: of equal size. Latents without a set in the first fail in all of them.
        """
        tried = choose_places(scored, self._least(fit), self._count, self._seed + 1)
        # A failure's places are not run: nothing is asked there.
        first = groups[0]
        asked = np.array([len(first.tokens[own]) > 0 for own in first.own.tolist()], bool)
        tried = tried.of(asked[tried.row])
        whole = np.zeros(len(tried.row), np.int64)
        trial = _room(tried, 1, groups)

        def put(numbers: NDArray[np.int64], found: Tried) -> None:
            trial.put(numbers, found, whole[numbers], tried.row[numbers])

        self._run(f"{name}-test", "test", sae, Asked(tried, groups), trial, put)
        return [
            score_outputs(tried, trial, group, number, whole, 0)
            for number, group in enumerate(groups)
        ]

    def _least(self, fit: SplitFirings) -> NDArray[np.float64]:
        """[K] least activation of each latent's places."""
        return self._share * usual_highs(fit.firings)

    def _rotations(self, fit: SplitFirings, places: Places, gains: Gains) -> list[Rotation]:
        """Sets of each fold, measured on the next one, judged on the one after that; at the places
        that were run to fit them."""
        dealt = document_folds(fit.grid, NUM_ROTATIONS)
        folds = dealt[np.searchsorted(fit.grid.seq_ids, places.seq_id), places.position]
        own = np.arange(len(fit.firings.latents))
        sets, groups = [], []
        for fold in range(NUM_ROTATIONS):
            inside = folds == fold
            part = Gains(*(column[inside] for column in gains))
            sets.append(fit_sets(places.of(inside), part, len(own)))
            groups.append(SetGroup([held.tokens for held in sets[fold]], own))

        # All of them at all places, some at a time: logits are made anew of what was kept.
        trial = _room(places, NUM_ROTATIONS, groups)
        trier = Trier(groups, places.row, self._lm.device)
        for start in range(0, len(folds), PLACES_AT_ONCE):
            numbers = np.arange(start, min(start + PLACES_AT_ONCE, len(folds)))
            found = trier.again(numbers, gains, self._lm)
            trial.put(numbers, found, folds[numbers], places.row[numbers])

        out = []
        for fold in range(NUM_ROTATIONS):
            held_out, outcome = (
                score_outputs(
                    places, trial, groups[fold], fold, folds, (fold + step) % NUM_ROTATIONS
                )
                for step in (1, 2)
            )
            out.append(Rotation(sets[fold], held_out, outcome))
        return out

    def _run(
        self,
        name: str,
        split: str,
        sae: Sae,
        asked: Asked,
        filled: Gains | Trial,
        put: Callable[[NDArray[np.int64], Any], None],
    ) -> None:
        """Run the places that a killed run has not; `put` fills the arrays of `filled`.

        Args:
            put: takes numbers of places, in order, and what they say.
        """
        checkpoints = Checkpoints(
            self._progress / name, keep=1, owner=self._owner, note=self._report.note
        )
        total, done, saved = len(asked.places.row), 0, time.monotonic()
        found = checkpoints.load()
        # A crew's shards begin at the first place: of a pass here only a whole one is taken up.
        if found is not None and (self._crew is None or found.step == total):
            done = found.step
            for field, array in filled._asdict().items():
                array[:] = found.tensors[field].numpy()
            self.slow_because = self.slow_because or found.state.get("slow")

        def save() -> None:
            arrays = {field: torch.from_numpy(a) for field, a in filled._asdict().items()}
            checkpoints.save(done, arrays, {"slow": self.slow_because})

        if self._crew is not None and done < total:
            for numbers, ran in self._crew.run(name, split, sae, asked):
                put(numbers, ran.answer)
                self.slow_because = self.slow_because or ran.slow_because
            done = total
        elif self._crew is None:
            meter = asked.meter(self._lm.device)
            texts = self._texts_of(split, sae.spec.hook_layer)
            ablations = Ablations(texts, sae)
            with self._report.track(f"ablations, {name}", total, "place", done) as bar:
                for part in ablations.run(asked.places, others=asked.others, first=done):
                    put(part.places, meter(part))
                    done += part.places.size
                    bar.advance(part.places.size)
                    self.slow_because = self.slow_because or texts.blocks.slow_because
                    if time.monotonic() - saved > CHECKPOINT_SECONDS:
                        save()
                        saved = time.monotonic()
        if total and (found is None or found.step < total):
            save()
        if self._crew is not None:
            self._crew.forget(name)

    def _texts_of(self, split: str, layer: int) -> Texts:
        """A split's sequences, which one pass after another reads."""
        if split not in self._texts:
            table = read_token_table(self._source.tokens, split)
            self._texts[split] = Texts(self._lm, layer, self._source.reader(split), table)
        texts = self._texts[split]
        assert texts.blocks.layer == layer
        return texts


def _room(places: Places, parts: int, groups: Sequence[SetGroup]) -> Trial:
    """A trial that has not begun: of `parts`, whatever the places, because a short text may leave
    the last fold without any."""
    shape = (len(groups[0].own), len(groups[0].tokens))
    return Trial.empty(len(places.row), len(groups), parts, *shape)
