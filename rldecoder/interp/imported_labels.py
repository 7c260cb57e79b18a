"""Labels of others, scored as ours are: on the same unseen text, beside the same controls.

A label in free words needs a reader. The one here is deterministic and reads only what leaves no
doubt: explanations that do nothing but list tokens in quotes ("the words 'cat' and 'dog'"), as
tokens on which the latent fires, and `say "cat"`, as tokens that it makes the model say. All others
are kept and counted as unscored; they have neither failed nor passed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from rldecoder.interp.calibration import Acceptance
from rldecoder.interp.corpus import SplitFirings
from rldecoder.interp.neuronpedia_labels import Explanation, Explanations
from rldecoder.interp.predicate import NgramIn, Predicate, TokenIn, disjunction
from rldecoder.interp.records import Scores
from rldecoder.interp.scores import ScoringText, derangement, means, score_all
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.schemas import JsonRecord, Scalar

Encode = Callable[[str], Sequence[int]]
"""A text's own tokens, without any around it."""

SCORES = ("detection", "detection_hard", "precision", "recall", "f1", "fuzzing", "intruder")
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
        ("accepted", pa.bool_()),
        ("our_label", pa.string()),
        ("our_detection", pa.float64()),
    ]
)
"""Labels of others: one row a (latent, explanation). `reading` is `input`, `output` or null,
`unscored` why there are no scores (then null all of them), `tokens` what was read."""

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
    """`imported`: the labels; `shuffled`: each with the label of another latent; `random_sae`: on
    latents of an untrained SAE; `ours`: this run's labels of the same latents."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        out: dict[str, Scalar] = {
            "imported_covered": self.covered,
            "imported_scored": self.methods["imported"].latents,
            "imported_unscored": sum(self.unscored.values()),
        }
        for name, summary in self.methods.items():
            out[f"imported_{name}_detection"] = summary.means["detection"]
        return out


class Ours(NamedTuple):
    """This run's label of a latent."""

    text: str | None
    scores: Scores


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
    """Quoted texts to predicates: where one of them has just been read.

    A text that is a token of its own, in any case, with a space in front or not, stands for that
    token; another one for the tokens that spell it. Spaces and line breaks mean themselves.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Encode) -> None:
        self._encode = encode
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
    *,
    window_tokens: int,
    acceptance: Acceptance,
    rng: np.random.Generator,
) -> tuple[list[dict[str, Any]], ImportedLabels]:
    """Score the explanations of the run's labelled latents; rows of `IMPORTED`, and the summary.

    Args:
        scored: firings of the labelled latents on text that no label was made from.
        untrained: firings of latents of an untrained SAE, for the control.
        ours: this run's labels, by latent.
    """
    row_of = {int(latent): row for row, latent in enumerate(scored.firings.latents)}
    covered = [row for row in found.rows if row.latent in row_of]
    readings = [read_label(row.text) for row in covered]
    why_not = [reading.why_not for reading in readings]
    pairs: list[_Scored] = []
    for number, (row, reading) in enumerate(zip(covered, readings, strict=True)):
        if reading.kind == "output":
            why_not[number] = "says what it makes the model say"
        if reading.kind != "input":
            continue
        predicate = reader.predicate(reading.texts)
        if predicate is None:
            why_not[number] = "its tokens are not the model's"
        else:
            pairs.append(_Scored(row_of[row.latent], number, predicate))

    text = ScoringText(scored.grid, vocabulary, window_tokens)
    predicates: list[Predicate | None] = [pair.predicate for pair in pairs]
    of_rows = scored.firings.select(np.array([pair.row for pair in pairs], np.int64))
    scores = score_all(text, predicates, of_rows, rng)
    methods: dict[str, Sequence[Scores]] = {"imported": scores}

    # The same labels on other latents, and on latents that stand for nothing.
    methods["shuffled"] = []
    if len(pairs) > 1:
        order = derangement(len(pairs), rng)
        methods["shuffled"] = score_all(text, [predicates[i] for i in order], of_rows, rng)
    methods["random_sae"] = []
    if untrained.firings.latents.size:
        turns = np.arange(len(pairs)) % untrained.firings.latents.size
        other_text = ScoringText(untrained.grid, vocabulary, window_tokens)
        methods["random_sae"] = score_all(
            other_text, predicates, untrained.firings.select(turns), rng
        )
    latents = {covered[pair.explanation].latent for pair in pairs}
    methods["ours"] = [ours[latent].scores for latent in sorted(latents & ours.keys())]

    by_number = {pair.explanation: score for pair, score in zip(pairs, scores, strict=True)}
    rows = [
        _table_row(row, reading, why_not[number], by_number.get(number), ours, acceptance)
        for number, (row, reading) in enumerate(zip(covered, readings, strict=True))
    ]
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
        methods={name: _summary(values, acceptance) for name, values in methods.items()},
    )
    return rows, summary


def _passes(scores: Scores, acceptance: Acceptance) -> bool:
    """The bars that labels read as predicates must reach."""
    if scores.detection is None or scores.precision is None:
        return False
    return scores.detection >= acceptance.detection and scores.precision >= acceptance.precision


def _summary(scores: Sequence[Scores], acceptance: Acceptance) -> OthersSummary:
    return OthersSummary(
        latents=len(scores),
        accepted=sum(_passes(found, acceptance) for found in scores),
        means=means(scores, SCORES),
    )


def _table_row(
    row: Explanation,
    reading: Reading,
    why_not: str | None,
    scores: Scores | None,
    ours: Mapping[int, Ours],
    acceptance: Acceptance,
) -> dict[str, Any]:
    own = ours.get(row.latent)
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
        "accepted": None if scores is None else _passes(scores, acceptance),
        "our_label": None if own is None else own.text,
        "our_detection": None if own is None else own.scores.detection,
    }
