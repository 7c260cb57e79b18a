"""People compare explanations without knowing whose they are: the files, and what they say.

A judge gets a file with pairs of explanations of the same prediction, one by Method A and one by
Method B, in random order. Which is which stands in a second file, the key, that stays behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, ValidationError
from scipy import stats

from rldecoder.config.base import Config
from rldecoder.config.problems import problem_lines
from rldecoder.errors import BadInputError
from rldecoder.evals.statistics import bootstrap_mean_ci
from rldecoder.user_files import read_text
from rldecoder.visible_text import visible_text, visible_token

if TYPE_CHECKING:
    from rldecoder.explain.explanation import Explanation  # slow: counting answers needs no torch

QUESTION = "Which explanation tells you more about why the model predicts this token: 1, 2 or tie?"
SHOWN_CHARACTERS = 4000
CODES = {"method_a": 0, "tie": 1, "method_b": 2}
Method = Literal["method_a", "method_b"]


class JudgeItem(Config):
    """One line of a judge's file; everything but `answer` must stay as it is."""

    id: str
    """Which pair this is; says nothing about the methods."""
    text: str
    """What the model had read."""
    predicted: str
    """The token that both explanations are about."""
    explanation_1: str
    """One explanation."""
    explanation_2: str
    """The other."""
    question: str = QUESTION
    """What is asked."""
    answer: Literal["1", "2", "tie"] | None = None
    """To be filled in: "1", "2" or "tie"."""

    def fingerprint(self) -> str:
        """SHA-256 of all that a judge must not change."""
        given = self.model_dump(mode="json", exclude={"answer"})
        text = json.dumps(given, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


class KeyItem(Config):
    """What a judge must not know about one pair."""

    first: Method
    """Whose explanation is `explanation_1`."""
    claims: int = Field(ge=0)
    """How many claims Method B made; 0 means that it said so and no more."""
    fingerprint: str
    """Of the judge's item."""


class JudgeKey(Config):
    """The key of a blind file."""

    artifact: str
    """Digest of the explainer whose claims are judged."""
    seed: int
    """Of the order."""
    items: dict[str, KeyItem]
    """By the item's id."""


def blind_pairs(
    explanations: Sequence[Explanation], *, seed: int, artifact: str
) -> tuple[list[JudgeItem], JudgeKey]:
    """Pairs in random order, each with its two explanations in random order, and their key.

    All text is made visible: no control, bidirectional or zero-width character is left in it.
    """
    lot = random.Random(seed)
    order = lot.sample(range(len(explanations)), len(explanations))
    items, key = [], {}
    for number, place in enumerate(order, start=1):
        explanation = explanations[place]
        texts = {"method_a": explanation.method_a, "method_b": explanation.method_b}
        first: Method = lot.choice(("method_a", "method_b"))
        second: Method = "method_b" if first == "method_a" else "method_a"
        item = JudgeItem(
            id=f"{number:04d}",
            text=visible_text(explanation.prompt, SHOWN_CHARACTERS),
            predicted=visible_token(explanation.frozen.token),
            explanation_1=_lines_of(texts[first]),
            explanation_2=_lines_of(texts[second]),
        )
        items.append(item)
        key[item.id] = KeyItem(
            first=first, claims=len(explanation.claims), fingerprint=item.fingerprint()
        )
    return items, JudgeKey(artifact=artifact, seed=seed, items=key)


def _lines_of(text: str) -> str:
    """An explanation made visible, its lines kept: one of them is a table."""
    return "\n".join(visible_text(line, SHOWN_CHARACTERS) for line in text.split("\n"))


def write_blind(items: Sequence[JudgeItem], path: Path) -> None:
    """One JSON object a line, ASCII, so that no editor or terminal acts on a character in it."""
    lines = (json.dumps(item.model_dump(mode="json"), ensure_ascii=True) for item in items)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")


def read_key(path: Path) -> JudgeKey:
    """Read a key file.

    Raises:
        BadInputError: it is not there, or not a key.
    """
    try:
        return JudgeKey.model_validate_json(read_text(path, "Name the key.json of the export."))
    except ValidationError as error:
        raise BadInputError(
            f"{path} is not a key.",
            f"{problem_lines(error)[0]}.",
            "Name the key.json of the export.",
        ) from None


def read_answers(path: Path, key: JudgeKey) -> dict[str, str]:
    """One judge's answers by item: `method_a`, `method_b` or `tie`.

    Raises:
        BadInputError: the file cannot be read, an id is unknown, there twice or left out, an answer
            is missing or another word, or a text was edited. All faults are named.
    """
    answers: dict[str, str] = {}
    faults = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue

        # Every line is looked at, so that a judge can mend all faults at once.
        item = _item(line)
        if isinstance(item, str):
            faults.append(f"line {number}: {item}")
            continue
        known = key.items.get(item.id)
        if known is None:
            faults.append(f"line {number}: there is no item {visible_text(item.id, 20)}")
        elif item.id in answers:
            faults.append(f"line {number}: item {item.id} is there twice")
        elif item.fingerprint() != known.fingerprint:
            faults.append(f"line {number}: the text of item {item.id} was edited")
        elif item.answer is None:
            faults.append(f"line {number}: item {item.id} has no answer")
        else:
            answers[item.id] = _decoded(item.answer, known.first)

    left_out = [name for name in key.items if name not in answers]
    if left_out and not faults:
        faults.append(f"items left out: {', '.join(left_out)}")
    if faults:
        raise BadInputError(
            f"{path} cannot be counted.",
            "; ".join(faults),
            'Change nothing but `answer`, and give every item "1", "2" or "tie".',
        )
    return answers


def _lines(path: Path) -> list[str]:
    return read_text(path, "Name a filled-in copy of the blind file.").split("\n")


def _item(line: str) -> JudgeItem | str:
    """The item of a line, or what is wrong with it."""
    try:
        return JudgeItem.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"])) or "the line"
        return visible_text(f"{field}: {fault['msg']}", 200)


def _decoded(answer: str, first: Method) -> str:
    if answer == "tie":
        return answer
    return first if answer == "1" else ("method_b" if first == "method_a" else "method_a")


def score_judgments(
    judges: Mapping[str, Mapping[str, str]], key: JudgeKey, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """How often people prefer Method B, whether that is chance, and whether they agree.

    - `win_rate`: wins of Method B plus half its ties, averaged over judges, then over items; 95 %
      percentile bootstrap over items. `win_rate_with_claims` leaves out items without any claim.
    - `sign_test`: two-sided exact binomial test of the items that more judges give to B than to A,
      against a half; items that end even are left out.
    - `alpha`: Krippendorff's alpha for nominal data (A, tie, B); None with fewer than two judges,
      or when only one answer was ever given, since there is nothing to agree about then.
    - `first_chosen`: share of the decided answers that name the explanation shown first; far from
      a half, judges looked at the order.

    Args:
        judges: answers by item (`read_answers`), by judge.

    Raises:
        BadInputError: no judges, or no items.
    """
    if not judges or not key.items:
        raise BadInputError("There is nothing to count.", "", "Name at least one filled-in file.")
    names = list(key.items)
    table = np.array([[CODES[judges[judge][name]] for name in names] for judge in judges], float)
    per_item = table.mean(0) / 2

    claimed = np.array([key.items[name].claims > 0 for name in names])
    wins, losses = int((per_item > 0.5).sum()), int((per_item < 0.5).sum())
    test = stats.binomtest(wins, wins + losses, 0.5) if wins + losses else None

    # Whoever takes the first explanation whatever it says has looked at the order.
    first = np.array([CODES[key.items[name].first] for name in names])
    decided = table != CODES["tie"]
    alpha, why = _alpha(table)
    return {
        "num_judges": len(judges),
        "num_items": len(names),
        "answers": {name: int((table == code).sum()) for name, code in CODES.items()},
        "win_rate": _rate(per_item, resamples, seed),
        "win_rate_with_claims": _rate(per_item[claimed], resamples, seed),
        "sign_test": {
            "wins": wins,
            "losses": losses,
            "even": len(names) - wins - losses,
            "pvalue": None if test is None else float(test.pvalue),
        },
        "alpha": alpha,
        "alpha_note": why,
        "first_chosen": float((table == first)[decided].mean()) if decided.any() else None,
    }


def _rate(values: Any, resamples: int, seed: int) -> dict[str, Any] | None:
    if not len(values):
        return None
    found = bootstrap_mean_ci(values, resamples=resamples, seed=seed)
    return {**found._asdict(), "num_items": len(values)}


def _alpha(table: Any) -> tuple[float | None, str]:
    if len(table) < 2:
        return None, "agreement needs two judges"
    if len(np.unique(table)) < 2:
        return None, "every answer is the same: there is nothing to agree about"
    if importlib.util.find_spec("krippendorff") is None:
        return None, "not computed: pip install 'rl-decoder[judge]'"
    import krippendorff

    return float(krippendorff.alpha(table, level_of_measurement="nominal")), ""
