"""Labels of others, scored as ours are: on the same unseen text, beside the same controls.

A label in free words needs a reader. The one here is deterministic and reads only what leaves no
doubt: explanations that do nothing but list tokens in quotes ("the words 'cat' and 'dog'"), as
tokens on which the latent fires, and `say "cat"`, as tokens that it makes the model say. The former
are scored as input labels, the latter as output labels. All others are kept and counted as
unscored; they have neither failed nor passed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.imported_outputs import OutputScorer, Said, of_others
from rldecoder.interp.neuronpedia_labels import Explanation, Explanations
from rldecoder.interp.predicate import NgramIn, Predicate, TokenIn, disjunction
from rldecoder.interp.records import OutputScores, Scores
from rldecoder.interp.scores import ScoringText, means, score_all
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row
from rldecoder.schemas import JsonRecord, Scalar

Encode = Callable[[str], Sequence[int]]
"""A text's own tokens, without any around it."""

SCORES = ("detection", "detection_hard", "precision", "recall", "f1", "fuzzing", "intruder")
OUTPUT_SCORES = ("auroc", "auroc_places", "drop", "margin")
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
        ("accepted", pa.bool_()),
        ("our_label", pa.string()),
        ("our_detection", pa.float64()),
        ("our_output_auroc", pa.float64()),
    ]
)
"""Labels of others: one row a (latent, explanation). `reading` is `input`, `output` or null,
`unscored` why there are no scores (then null all of them), `tokens` what was read. Scores of the
other kind are null."""

_QUOTED = re.compile(
    r'"([^"]{1,60})"|“([^”]{1,60})”|`([^`]{1,60})`|‘([^’]{1,60})’|«([^»]{1,60})»'
    r"|(?<!\w)'((?:[^']|'(?=\w)){1,60})'(?!\w)"
)
_SAY = re.compile(r"^\s*(?:say|says|saying|predicts?|predicting|outputs?)\b", re.IGNORECASE)
# Words that may stand around the quotes of a mere list.
_LISTING = frozenset(
    {"a", "an", "and", "or", "of", "the", "this", "these", "is", "are", "exact", "exactly",
     "word", "words", "token", "tokens", "term", "terms", "phrase", "phrases", "string", "strings",
     "character", "characters", "letter", "letters", "symbol", "symbols", "text", "subword",
     "subwords", "fragment", "fragments", "occurrence", "occurrences", "instance", "instances",
     "mention", "mentions", "appearance", "appearances"}
)  # fmt: skip
_MOST = 64
"""Quoted texts of one explanation that are read."""


class Reading(NamedTuple):
    """What the deterministic reader makes of an explanation."""

    kind: Literal["input", "output"] | None
    """Tokens on which it fires, tokens that it makes the model say, or not to be read."""
    texts: tuple[str, ...]
    """The tokens, as they are quoted."""
    why_not: str | None
    """Why there is no reading."""


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

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        kinds = [kind["imported"] for kind in (self.methods, self.outputs) if kind]
        out: dict[str, Scalar] = {
            "imported_covered": self.covered,
            "imported_scored": sum(summary.latents for summary in kinds),
            "imported_unscored": sum(self.unscored.values()),
        }
        for name, summary in self.methods.items():
            out[f"imported_{name}_detection"] = summary.means["detection"]
        for name, summary in self.outputs.items():
            out[f"imported_{name}_output_auroc"] = summary.means["auroc"]
        return out


class Ours(NamedTuple):
    """This run's label of a latent."""

    text: str | None
    scores: Scores
    output: OutputScores | None = None
    """Of its output label."""


def read_label(text: str) -> Reading:
    """Read an explanation, if it does nothing but list tokens."""
    quoted = [next(part for part in found if part) for found in _QUOTED.findall(text)]
    if not quoted:
        return Reading(None, (), "in free words")
    if len(quoted) > _MOST:
        return Reading(None, (), "too many tokens")
    says = _SAY.match(text)
    rest = _QUOTED.sub(" ", text[says.end() :] if says else text)
    if not set(re.findall(r"\w+", rest.lower())) <= _LISTING:
        return Reading(None, (), "in free words")
    return Reading("output" if says else "input", tuple(dict.fromkeys(quoted)), None)


class TokenReader:
    """Quoted texts to predicates, where one of them has just been read, and to sets of tokens.

    A text that is a token of its own, in any case, with a space in front or not, stands for that
    token; another one for the tokens that spell it. Spaces and line breaks mean themselves.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Encode) -> None:
        self._encode = encode
        self._texts = vocabulary.texts
        self._tokens: dict[str, list[int]] = {}
        for token, text in enumerate(vocabulary.texts):
            self._tokens.setdefault(_word(text), []).append(token)

    def predicate(self, texts: Sequence[str]) -> Predicate | None:
        """None where no text can be written with tokens."""
        tokens: set[int] = set()
        ngrams: set[tuple[int, ...]] = set()
        for text in texts:
            found = self._tokens.get(_word(text), [])
            tokens.update(found)
            if not found:
                ngrams |= self._spelled(text.strip())
        parts: list[Predicate] = [TokenIn(tokens=tuple(tokens))] if tokens else []
        for length in sorted({len(ngram) for ngram in ngrams}):
            parts.append(NgramIn(ngrams=tuple(n for n in ngrams if len(n) == length)))
        return reduce(disjunction, parts) if parts else None

    def starts(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of the tokens that a model says first when it says one of the texts.

        A text that is no token of its own stands for the first token of its spelling, with a space
        in front and without: no more is said in one step. Empty where no text can be written.
        """
        tokens: set[int] = set()
        for text in texts:
            found = self._tokens.get(_word(text), [])
            tokens.update(found or self._first(text.strip()))
        return tuple(sorted(tokens))

    def _first(self, text: str) -> set[int]:
        ways = [self._encode(spelled) for spelled in (text, f" {text}")] if text else []
        # A space that is a token of its own begins every word.
        words = ([int(token) for token in way if self._word_at(int(token))] for way in ways)
        return {way[0] for way in words if way}

    def _word_at(self, token: int) -> bool:
        return token < len(self._texts) and bool(self._texts[token].strip())

    def _spelled(self, text: str) -> set[tuple[int, ...]]:
        """Token ids of a text that is no single token, as it is and as it may begin a sentence."""
        forms = {text, text.lower(), text.capitalize()} if text else set()
        ways = {
            tuple(int(token) for token in self._encode(spelled))
            for form in forms
            for spelled in (form, f" {form}")
        }
        return {ids for ids in ways if len(ids) >= 2}


def _word(text: str) -> str:
    return text.strip().lower() if text.strip() else text


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
) -> tuple[list[Row], ImportedLabels]:
    """Score the explanations of the run's labelled latents; rows of `IMPORTED`, and the summary.

    Args:
        scored: firings of the labelled latents on text that no label was made from.
        untrained: firings of latents of an untrained SAE, for the control.
        ours: this run's labels, by latent.
        score_outputs: scores tokens that a latent is said to raise.
    """
    row_of = {int(latent): row for row, latent in enumerate(scored.firings.latents)}
    covered = [row for row in found.rows if row.latent in row_of]
    readings = [read_label(row.text) for row in covered]
    why_not = [reading.why_not for reading in readings]
    pairs: list[_Scored] = []
    said: dict[int, Said] = {}
    for number, (row, reading) in enumerate(zip(covered, readings, strict=True)):
        if reading.kind == "input":
            predicate = reader.predicate(reading.texts)
            if predicate is not None:
                pairs.append(_Scored(row_of[row.latent], number, predicate))
                continue
        elif reading.kind == "output":
            tokens = reader.starts(reading.texts)
            if tokens:
                said[number] = Said(row_of[row.latent], tokens)
                continue
        else:
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
    rows = [
        _table_row(
            row, reading, why_not[number], by_number.get(number), says_by_number.get(number),
            ours.get(row.latent), acceptance,
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
        methods={
            name: OthersSummary(
                latents=len(values),
                accepted=sum(_passes(scores, acceptance) for scores in values),
                means=means(values, SCORES),
            )
            for name, values in methods.items()
        },
        outputs={
            name: OthersSummary(
                latents=len(values),
                accepted=sum(acceptance.accepts_output(scores) for scores in values),
                means=means(values, OUTPUT_SCORES),
            )
            for name, values in outputs.items()
        },
    )
    return rows, summary


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


def _passes(scores: Scores, acceptance: Acceptance) -> bool:
    """The bars that labels read as predicates must reach."""
    if scores.detection is None or scores.precision is None:
        return False
    return scores.detection >= acceptance.detection and scores.precision >= acceptance.precision


def _table_row(
    row: Explanation,
    reading: Reading,
    why_not: str | None,
    scores: Scores | None,
    says: OutputScores | None,
    own: Ours | None,
    acceptance: Acceptance,
) -> Row:
    accepted = None if scores is None else _passes(scores, acceptance)
    if says is not None:
        accepted = acceptance.accepts_output(says)
    return {
        "latent": row.latent,
        "text": row.text,
        "method": row.method,
        "explainer": row.explainer,
        "reading": reading.kind,
        "tokens": list(reading.texts),
        "unscored": why_not,
        "firings": None if scores is None else scores.firings,
        **{name: None if scores is None else getattr(scores, name) for name in SCORES},
        **{
            f"output_{name}": None if says is None else getattr(says, name)
            for name in OUTPUT_SCORES
        },
        "accepted": accepted,
        "our_label": None if own is None else own.text,
        "our_detection": None if own is None else own.scores.detection,
        "our_output_auroc": None if own is None or own.output is None else own.output.auroc,
    }
