from __future__ import annotations

import pytest

from rldecoder.interp.llm.parsing import (
    MalformedAnswerError,
    parse_activations,
    parse_answers,
    parse_choice,
    parse_label,
)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ('{"label": "numbers"}', "numbers"),
        ('Sure!\n```json\n{"label": " a\\n  b "}\n```\nHope it helps', "a b"),
        ('I think {"label": "x"} fits', "x"),
        ('{"label": null}', None),
        ('{"label": "a\\u202eb\\u0007"}', "a\\u202eb\\u0007"),
    ],
)
def test_labels_are_read(text: str, label: str | None) -> None:
    assert parse_label(text) == label


@pytest.mark.parametrize(
    "text",
    [
        "", "numbers", "{", '{"label": ', '{"label": 3}', '{"label": ""}', '{"label": " \\n"}',
        '["label"]', '{"Label": "x"}', '{"label": "x", "score": 1}', '"label"', "null",
        '{"label": "' + "x" * 301 + '"}', "[" * 100_000, '{"a":' * 50_000,
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_other_answers_are_no_labels(text: str) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_label(text)


def test_answers_are_read() -> None:
    assert parse_answers('{"answers": [true, false, 1, 0]}', 4) == [True, False, True, False]


@pytest.mark.parametrize(
    "values", ["[true]", "[true, false, true]", '[true, "false"]', "[true, 2]", "[true, null]",
               "[1.0, 0.0]", "true", "{}", "null"],
)  # fmt: skip
def test_other_answers_are_not_guessed(values: str) -> None:
    with pytest.raises(MalformedAnswerError) as caught:
        parse_answers(f'{{"answers": {values}}}', 2)
    assert "true" not in str(caught.value)  # the problem is told in our words


def test_a_choice_is_read_and_counted_from_0() -> None:
    assert [parse_choice(f'{{"answer": {n}}}', 5) for n in (1, 5)] == [0, 4]


@pytest.mark.parametrize(
    "value", ["0", "6", "-1", "2.0", '"2"', "true", "null", "[2]", "1e400", "9" * 5000]
)
def test_other_choices_are_not_guessed(value: str) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_choice(f'{{"answer": {value}}}', 5)


def test_activations_are_read() -> None:
    assert parse_activations('```json\n{"answers": [0, 10, 3]}\n```', 3) == [0, 10, 3]


@pytest.mark.parametrize(
    "values", ["[]", "[0]", "[0, 1, 2]", "[0, 11]", "[0, -1]", "[0, 0.5]", '[0, "1"]',
               "[0, true]", "[0, null]", "[0, NaN]", "[[0], [1]]", "7", "null"],
)  # fmt: skip
def test_other_activations_are_not_guessed(values: str) -> None:
    with pytest.raises(MalformedAnswerError):
        parse_activations(f'{{"answers": {values}}}', 2)
