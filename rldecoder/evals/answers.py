"""Is an answer right? Parsers of free text; what cannot be parsed is wrong."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from rldecoder.config.tasks import Metric

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)%])[-\u2212])?[$\u00a3\u20ac\u00a5]?"
    r"(?P<size>\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|(?<![\w.])\.\d+)"
)
"""A minus after a word or number is no sign: 10-2 ends in 2."""
_ARTICLES = ("a", "an", "the")


def score_answer(metric: Metric, completion: str, answers: Sequence[str]) -> float:
    """The best score over the answers that count, 0 to 1.

    `exact_match` and `f1` compare the first line after SQuAD's normalisation (lower case,
    no punctuation and articles; Rajpurkar et al. 2016, arXiv 1606.05250); `first_word` only its
    first word (yes/no questions); `number` the last number of the whole completion with the one
    number of the answer, both without unit, currency and thousands separators.
    """
    if metric == "number":
        numbers = _numbers(completion)
        return float(bool(numbers) and any([numbers[-1]] == _numbers(gold) for gold in answers))
    line = completion.strip().split("\n", 1)[0]
    compare = {"exact_match": _exact, "first_word": _first_word, "f1": _token_f1}[metric]
    return max((compare(line, answer) for answer in answers), default=0.0)


def stated_sum(completion: str, answer: str) -> float:
    """1 when the number after "answer is" on the first line is the answer, else 0."""
    found = re.search(r"answer is\s*(\d+)", _first_line(completion))
    return float(found is not None and found.group(1) == answer)


def stated_place(completion: str, answer: str) -> float:
    """1 when the first word of the first line is the answer, else 0."""
    words = re.findall(r"[A-Za-z]+", _first_line(completion))
    return float(bool(words) and words[0].lower() == answer)


def _first_line(completion: str) -> str:
    return completion.lstrip("\n").split("\n", 1)[0]


def _numbers(text: str) -> list[float]:
    return [
        float(match["size"].replace(",", "")) * (-1 if match["sign"] else 1)
        for match in _NUMBER.finditer(text)
    ]


def _words(text: str) -> list[str]:
    return "".join(char for char in text.lower() if char not in string.punctuation).split()


def _normalise(text: str) -> list[str]:
    """Words without articles; all there is, if there is nothing else: "A" is an answer, too, and
    an empty one is not the same."""
    words = _words(text)
    return [word for word in words if word not in _ARTICLES] or words or text.split()


def _exact(found: str, expected: str) -> float:
    return float(_normalise(found) == _normalise(expected))


def _first_word(found: str, expected: str) -> float:
    first = _normalise(expected)[:1]
    read = _words if first and first[0] in _ARTICLES else _normalise
    return float(read(found)[:1] == first != [])


def _token_f1(found: str, expected: str) -> float:
    first, second = _normalise(found), _normalise(expected)
    if not first or not second:
        return float(first == second)
    common = sum((Counter(first) & Counter(second)).values())
    if not common:
        return 0.0
    precision, recall = common / len(first), common / len(second)
    return 2 * precision * recall / (precision + recall)
