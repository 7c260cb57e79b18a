"""Labels of others, scored as ours are: on the same unseen text, beside the same controls.

A label in free words needs a reader. The one here is deterministic and reads only what leaves no
doubt: explanations that do nothing but list tokens in quotes ("the words 'cat' and 'dog'") or what
tokens begin or end with ("words ending in 'ing'"), as tokens on which the latent fires, and `say
"cat"`, as tokens that it makes the model say. The former are scored as input labels, the latter as
output labels. All others go to the judge of labels in words, where a run has one; without, they are
kept as not judged, and have neither failed nor passed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import Firings, SplitFirings
from rldecoder.interp.imported_outputs import OutputScorer, Said, of_others
from rldecoder.interp.imported_reader import FREE, Reading, TokenReader, read_label
from rldecoder.interp.llm.others import InWords, JudgedOthers
from rldecoder.interp.neuronpedia_labels import Explanation, Explanations
from rldecoder.interp.predicate import Predicate
from rldecoder.interp.records import (
    FeatureLabel,
    JudgedScores,
    JudgeTrust,
    OutputScores,
    Scores,
)
from rldecoder.interp.scores import ScoringText, means, score_all
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row
from rldecoder.schemas import JsonRecord, Scalar

SCORES = ("detection", "detection_hard", "precision", "recall", "f1", "fuzzing", "intruder")
OUTPUT_SCORES = ("auroc", "auroc_places", "drop", "margin")
JUDGED = ("detection", "fuzzing", "window_f1", "intruder", "simulation")
IMPORTED = pa.schema(
    [
        ("latent", pa.int32()),
        ("text", pa.string()),
        ("method", pa.string()),
        ("explainer", pa.string()),
        ("reading", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("unscored", pa.string()),
        ("firings", pa.int64()),
        *((name, pa.float64()) for name in SCORES),
        *((f"output_{name}", pa.float64()) for name in OUTPUT_SCORES),
        *((f"judged_{name}", pa.float64()) for name in JUDGED),
        ("judge", pa.string()),
        ("judge_trusted", pa.bool_()),
        ("accepted", pa.bool_()),
        ("our_label", pa.string()),
        ("our_detection", pa.float64()),
        ("our_output_auroc", pa.float64()),
    ]
)
"""Labels of others: one row a (latent, explanation). `reading` is `input`, `output`, `words` (by
the judge) or null, `unscored` why there are no scores (then null all of them), `tokens` what was
read. Scores of other kinds are null; so is `accepted` where the judge is not trusted."""


class OthersSummary(JsonRecord):
    """One method's mean scores over the labels that were scored."""

    latents: int
    """Labels scored."""
    accepted: int
    """Of these pass the bars that our labels pass."""
    means: dict[str, float | None]
    """Means of their scores."""


class ImportedLabels(JsonRecord):
    """How labels of others do on the latents that this run labels."""

    source: str
    """Neuronpedia's name of the SAE."""
    model: str
    """Neuronpedia's name of the model."""
    explanations: int
    """In the files, all latents."""
    empty: int
    """Lines without a description."""
    latents: int
    """That this run labels."""
    covered: int
    """Of these have an explanation."""
    rows: int
    """Explanations of these."""
    read_as_input: int
    """Explanations that list tokens on which the latent fires."""
    read_as_output: int
    """Explanations that list tokens that it makes the model say."""
    unscored: dict[str, int]
    """Explanations without scores, by reason."""
    methods: dict[str, OthersSummary]
    """Of input labels. `imported`: the labels; `shuffled`: each with the label of another latent;
    `random_sae`: on latents of an untrained SAE; `ours`: this run's labels of the same latents."""
    outputs: dict[str, OthersSummary] = Field(default_factory=dict)
    """The same of output labels, with their scores; empty in files of older programs."""
    words: dict[str, OthersSummary] = Field(default_factory=dict)
    """The same of labels in free words, by a judge; `ours`: this run's labels in words. Empty
    where there is no judge."""
    judge: JudgeTrust | None = None
    """Who that is, and whether it is to be believed; if not, none of them is accepted."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        kinds = [kind["imported"] for kind in (self.methods, self.outputs, self.words) if kind]
        out: dict[str, Scalar] = {
            "imported_covered": self.covered,
            "imported_scored": sum(summary.latents for summary in kinds),
            "imported_unscored": sum(self.unscored.values()),
        }
        for name, summary in self.methods.items():
            out[f"imported_{name}_detection"] = summary.means["detection"]
        for name, summary in self.outputs.items():
            out[f"imported_{name}_output_auroc"] = summary.means["auroc"]
        for name, summary in self.words.items():
            out[f"imported_{name}_judged_detection"] = summary.means["detection"]
        return out


class Ours(NamedTuple):
    """This run's label of a latent."""

    text: str | None
    scores: Scores
    output: OutputScores | None = None
    """Of its output label."""

    @classmethod
    def of(cls, feature: FeatureLabel) -> Ours:
        """What is published of it."""
        output = None if feature.output is None else feature.output.scores
        return cls(feature.label, feature.scores, output)


def words_of_others(found: Explanations, firings: Firings, untrained: SplitFirings) -> InWords:
    """Explanations of the run's latents that only a judge can read, most important latents first.

    Args:
        firings: of the run's latents, most important first.
        untrained: firings of latents of an untrained SAE, for the control.
    """
    row_of = _rows(firings)
    covered = [row for row in found.rows if row.latent in row_of]
    free = [covered[n] for n in _in_words(covered, [read_label(r.text) for r in covered], row_of)]
    rows, texts = (row_of[row.latent] for row in free), (row.text for row in free)
    return InWords(tuple(rows), tuple(texts), untrained)


def _in_words(
    covered: Sequence[Explanation], readings: Sequence[Reading], row_of: Mapping[int, int]
) -> list[int]:
    """Numbers of the explanations that a judge is asked about, by the rows of their latents."""
    free = [number for number, reading in enumerate(readings) if reading.why_not == FREE]
    return sorted(free, key=lambda number: row_of[covered[number].latent])


def _rows(firings: Firings) -> dict[int, int]:
    return {int(latent): row for row, latent in enumerate(firings.latents)}


class _Scored(NamedTuple):
    """A row of the firings, and what is held against it."""

    row: int
    explanation: int
    predicate: Predicate


def score_imported(
    found: Explanations,
    scored: SplitFirings,
    untrained: SplitFirings,
    ours: Mapping[int, Ours],
    reader: TokenReader,
    vocabulary: Vocabulary,
    score_outputs: OutputScorer,
    *,
    window_tokens: int,
    acceptance: Acceptance,
    rng: np.random.Generator,
    judged: JudgedOthers | None = None,
) -> tuple[list[Row], ImportedLabels]:
    """Score the explanations of the run's labelled latents; rows of `IMPORTED`, and the summary.

    Args:
        scored: firings of the labelled latents on text that no label was made from.
        untrained: firings of latents of an untrained SAE, for the control.
        ours: this run's labels, by latent.
        score_outputs: scores tokens that a latent is said to raise.
        judged: what a judge says of `words_of_others`; None: there is none.
    """
    row_of = _rows(scored.firings)
    covered = [row for row in found.rows if row.latent in row_of]
    readings = [read_label(row.text) for row in covered]
    why_not = [reading.why_not for reading in readings]
    pairs: list[_Scored] = []
    said: dict[int, Said] = {}
    for number, (row, reading) in enumerate(zip(covered, readings, strict=True)):
        if reading.kind == "input":
            predicate = reader.predicate(reading.texts, reading.form)
            if predicate is not None:
                pairs.append(_Scored(row_of[row.latent], number, predicate))
                continue
        elif reading.kind == "output":
            tokens = reader.starts(reading.texts)
            if tokens:
                said[number] = Said(row_of[row.latent], tokens)
                continue
        else:
            why_not[number] = f"not judged: {reading.why_not}"
            continue
        why_not[number] = "its tokens are not the model's"

    methods = _score_inputs(pairs, scored, untrained, vocabulary, window_tokens, rng)
    latents = sorted({covered[pair.explanation].latent for pair in pairs} & ours.keys())
    methods["ours"] = [ours[latent].scores for latent in latents]
    outputs = score_outputs(list(said.values()), rng)
    own = [
        ours[latent].output for latent in sorted({covered[n].latent for n in said} & ours.keys())
    ]
    outputs["ours"] = [scores for scores in own if scores is not None]

    by_number: dict[int, Scores] = {
        pair.explanation: scores for pair, scores in zip(pairs, methods["imported"], strict=True)
    }
    says_by_number = dict(zip(said, outputs["imported"], strict=True))

    # Those beyond the judge's `max_features` were not asked about, some have too few windows.
    in_words = _in_words(covered, readings, row_of)
    answers = () if judged is None else judged.imported
    by_judge = dict(zip(in_words, answers, strict=False))
    for number, answer in by_judge.items():
        why_not[number] = None
        if answer.detection is None:
            why_not[number] = "not judged: too few windows"
    rows = [
        _table_row(
            row, reading, why_not[number], by_number.get(number), says_by_number.get(number),
            by_judge.get(number), judged, ours.get(row.latent), acceptance,
        )
        for number, (row, reading) in enumerate(zip(covered, readings, strict=True))
    ]  # fmt: skip
    summary = ImportedLabels(
        source=found.source,
        model=found.model,
        explanations=len(found.rows),
        empty=found.empty,
        latents=len(row_of),
        covered=len({row.latent for row in covered}),
        rows=len(covered),
        read_as_input=sum(reading.kind == "input" for reading in readings),
        read_as_output=sum(reading.kind == "output" for reading in readings),
        unscored=dict(Counter(why for why in why_not if why is not None)),
        methods=_summaries(methods, acceptance.accepts, SCORES),
        outputs=_summaries(outputs, acceptance.accepts_output, OUTPUT_SCORES),
        words=_words(judged, [covered[number].latent for number in by_judge], acceptance),
        judge=None if judged is None else judged.trust,
    )
    return rows, summary


def _words(
    judged: JudgedOthers | None, latents: Sequence[int], acceptance: Acceptance
) -> dict[str, OthersSummary]:
    """Summaries of what was judged; of ours those of the same latents."""
    if judged is None:
        return {}
    ours = [judged.ours[latent] for latent in dict.fromkeys(latents) if latent in judged.ours]
    methods = {"imported": judged.imported, **judged.controls, "ours": ours}

    return {
        name: OthersSummary(
            latents=sum(scores.detection is not None for scores in values),
            accepted=sum(bool(judged.accepts(scores, acceptance)) for scores in values),
            means=means(values, JUDGED),
        )
        for name, values in methods.items()
    }


def _summaries(
    methods: Mapping[str, Sequence[Any]], accepts: Callable[[Any], bool], names: Sequence[str]
) -> dict[str, OthersSummary]:
    return {
        name: OthersSummary(
            latents=len(values), accepted=sum(map(accepts, values)), means=means(values, names)
        )
        for name, values in methods.items()
    }


def _score_inputs(
    pairs: Sequence[_Scored],
    scored: SplitFirings,
    untrained: SplitFirings,
    vocabulary: Vocabulary,
    window_tokens: int,
    rng: np.random.Generator,
) -> dict[str, Sequence[Scores]]:
    """Scores of the labels, of the same ones on other latents, and on ones that mean nothing."""
    text = ScoringText(scored.grid, vocabulary, window_tokens)
    predicates: list[Predicate | None] = [pair.predicate for pair in pairs]
    rows = np.array([pair.row for pair in pairs], np.int64)
    methods: dict[str, Sequence[Scores]] = {}
    methods["imported"] = score_all(text, predicates, scored.firings.select(rows), rng)

    methods["shuffled"] = []
    others = of_others(rows.tolist(), rng)
    if others:
        places = scored.firings.select(rows[[place for place, _ in others]])
        methods["shuffled"] = score_all(text, [predicates[i] for _, i in others], places, rng)

    methods["random_sae"] = []
    if untrained.firings.latents.size:
        turns = np.arange(len(pairs)) % untrained.firings.latents.size
        other_text = ScoringText(untrained.grid, vocabulary, window_tokens)
        methods["random_sae"] = score_all(
            other_text, predicates, untrained.firings.select(turns), rng
        )
    return methods


def _table_row(
    row: Explanation,
    reading: Reading,
    why_not: str | None,
    scores: Scores | None,
    says: OutputScores | None,
    answer: JudgedScores | None,
    judged: JudgedOthers | None,
    own: Ours | None,
    acceptance: Acceptance,
) -> Row:
    # By what it says: of the text before, of what the latent raises, or in words for a judge.
    accepted = None if scores is None else acceptance.accepts(scores)
    if says is not None:
        accepted = acceptance.accepts_output(says)
    trust = None
    if answer is not None and judged is not None:
        accepted, trust = judged.accepts(answer, acceptance), judged.trust

    return {
        "latent": row.latent,
        "text": row.text,
        "method": row.method,
        "explainer": row.explainer,
        "reading": reading.kind if answer is None else "words",
        "tokens": list(reading.texts),
        "unscored": why_not,
        "firings": None if scores is None else scores.firings,
        **{name: None if scores is None else getattr(scores, name) for name in SCORES},
        **{
            f"output_{name}": None if says is None else getattr(says, name)
            for name in OUTPUT_SCORES
        },
        **{f"judged_{name}": None if answer is None else getattr(answer, name) for name in JUDGED},
        "judge": None if trust is None else trust.model,
        "judge_trusted": None if trust is None else trust.trusted,
        "accepted": accepted,
        "our_label": None if own is None else own.text,
        "our_detection": None if own is None else own.scores.detection,
        "our_output_auroc": None if own is None or own.output is None else own.output.auroc,
    }
