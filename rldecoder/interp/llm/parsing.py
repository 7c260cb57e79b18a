"""Reading answers: a model's text is believed only if it has exactly the form asked for."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, TypedDict, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
)

from rldecoder.interp.vocabulary import visible

MAX_LABEL_CHARS = 300
MAX_ACTIVATION = 10
"""A guessed activation is a whole number from 0 to this (Bills et al. 2023)."""
_BLOCK = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class MalformedAnswerError(Exception):
    """The answer is not of the form asked for; the text says how, in words of ours alone."""


def _bit(value: Any) -> Any:
    """0 and 1 are common ways to say false and true; nothing else is guessed."""
    return bool(value) if type(value) is int and value in (0, 1) else value


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


Form = TypeVar("Form", bound=_Answer)


class _Label(_Answer):
    label: str | None


class _Answers(_Answer):
    answers: list[Annotated[StrictBool, BeforeValidator(_bit)]]


class _Choice(_Answer):
    answer: StrictInt


class _Activations(_Answer):
    answers: list[Annotated[StrictInt, Field(ge=0, le=MAX_ACTIVATION)]]


class FieldSchema(TypedDict, total=False):
    """What one field of an answer may hold, as JSON schema says it."""

    type: str | list[str]
    items: FieldSchema


class AnswerSchema(TypedDict):
    """JSON schema of an answer."""

    type: str
    properties: dict[str, FieldSchema]
    required: list[str]
    additionalProperties: bool


def _schema(name: str, field: FieldSchema) -> AnswerSchema:
    return {
        "type": "object",
        "properties": {name: field},
        "required": [name],
        "additionalProperties": False,
    }


LABEL_SCHEMA = _schema("label", {"type": ["string", "null"]})
ANSWERS_SCHEMA = _schema("answers", {"type": "array", "items": {"type": "boolean"}})
# Bounds are checked here alone: not every server knows them in a schema.
CHOICE_SCHEMA = _schema("answer", {"type": "integer"})
ACTIVATIONS_SCHEMA = _schema("answers", {"type": "array", "items": {"type": "integer"}})


def parse_label(text: str) -> str | None:
    """The label, one line of visible characters; None if the model found nothing.

    Raises:
        MalformedAnswerError: not JSON, another form, empty or too long.
    """
    label = _read(text, _Label).label
    if label is None:
        return None
    label = visible(" ".join(label.split()))
    if not label:
        raise MalformedAnswerError("the label is empty")
    if len(label) > MAX_LABEL_CHARS:
        raise MalformedAnswerError(f"the label is longer than {MAX_LABEL_CHARS} characters")
    return label


def parse_answers(text: str, count: int) -> list[bool]:
    """Exactly `count` yes/no answers.

    Raises:
        MalformedAnswerError: not JSON, another form, or another number of answers.
    """
    answers = _read(text, _Answers).answers
    if len(answers) != count:
        raise MalformedAnswerError(f"{len(answers)} answers instead of {count}")
    return answers


def parse_choice(text: str, count: int) -> int:
    """The index, from 0, of one of `count` pieces; they are numbered from 1.

    Raises:
        MalformedAnswerError: not JSON, another form, or no piece has that number.
    """
    number = _read(text, _Choice).answer
    if not 1 <= number <= count:
        raise MalformedAnswerError(f"the number is not one of 1 to {count}")
    return number - 1


def parse_activations(text: str, count: int) -> list[int]:
    """Exactly `count` activations from 0 to MAX_ACTIVATION.

    Raises:
        MalformedAnswerError: not JSON, another form, out of range, or another number of them.
    """
    answers = _read(text, _Activations).answers
    if len(answers) != count:
        raise MalformedAnswerError(f"{len(answers)} answers instead of {count}")
    return answers


def _read(text: str, form: type[Form]) -> Form:
    """The one JSON object of an answer: the whole of it, in a code block, or amid words."""
    value = _json_object(text)
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join("item" if isinstance(p, int) else str(p) for p in first["loc"])[:40]
        raise MalformedAnswerError(f"the JSON object has another form ({place})") from None


def _json_object(text: str) -> dict[str, Any]:
    block = _BLOCK.search(text)
    for candidate in (text, block[1] if block else "", text[max(text.find("{"), 0) :]):
        try:
            value, _ = json.JSONDecoder().raw_decode(candidate.strip())
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    raise MalformedAnswerError("there is no JSON object in it")
