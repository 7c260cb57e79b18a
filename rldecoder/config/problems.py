"""What may be said of settings that cannot be used: keys, kinds and lengths, hardly a value.

A config may hold a key or a password that was pasted into the wrong place. Errors go to logs, to
flow states and into bug reports, so they name the offending key and at most a short value.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rldecoder.urls import without_credentials

_LONGEST_VALUE = 20
_LONGEST_KEY = 40
_LONGEST_NAME = 200
_MOST_PROBLEMS = 20

_SECRET_KEY = re.compile(
    r"(?i)(?:^|[_-])(?:api_?key(?:_env)?|key|token|secret|passw(?:or)?d|pwd|passphrase|credentials?"
    r"|auth(?:orization)?|cookie|url|uri|dsn|mirror|env)$"
)
# The beginnings that services give their keys, a private key's, a token's of three parts.
_SECRET = re.compile(
    r"(?i)\b(?:sk|pk|rk)[-_][a-z0-9]|\bhf_[a-z0-9]|\bgh[a-z]_[a-z0-9]|\bgithub_pat_|\bglpat-"
    r"|\bxox[a-z]-|\b(?:AKIA|ASIA)[A-Z0-9]{4}|\bAIza|\bya29\.|\beyJ[a-z0-9]|-----BEGIN"
    r"|\b(?:bearer|basic)\s|\$[0-9a-z]+\$|://[^/\s]*@"
)
# The same, long enough that nothing else looks like it: never a value that is meant.
_KEY_OF_A_SERVICE = re.compile(
    r"(?<![A-Za-z0-9])(?:sk[-_](?:[a-z]+[-_])?[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{20,}"
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY)"
)

# What was found where a section or a list belongs is named by its kind alone.
_STRUCTURE = ("model", "dict", "list", "tuple", "set", "mapping", "dataclass", "union", "is_")


def shown(value: Any) -> str:
    """A value for an error: a short plain one as it is, others by kind and size."""
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case int() | float():
            text = str(value) if isinstance(value, float) or abs(value) < 10**30 else ""
            return text or "a number of many digits"
        case str():
            if len(value) > _LONGEST_VALUE:
                return f"a text of {len(value):,} characters"
            return "a text" if _SECRET.search(value) else repr(value)
        case Mapping():
            return f"a mapping with {_count(len(value), 'key')}"
        case list() | tuple():
            return f"a list of {_count(len(value), 'item')}"
        case _:
            return f"a {type(value).__name__}"


def shown_key(key: object) -> str:
    """A key for an error: it is what must be found and mended, so it is shown unless secret."""
    text = str(key)
    if _SECRET.search(text):
        return "(a key that looks like a secret)"
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= _LONGEST_KEY else f"{text[:_LONGEST_KEY]}..."


def shown_name(name: str) -> str:
    """A name or path that somebody gave, for the error that says there is no such thing."""
    if _SECRET.search(name):
        return "(a name that looks like a secret)"
    return repr(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}...")


def problem_lines(error: ValidationError, root: type[BaseModel] | None = None) -> list[str]:
    """Each problem of a validation as a line that repeats no more than a key and a short value.

    Args:
        root: the model that was to be made; unknown keys then come with the nearest known one.
    """
    items = error.errors(include_url=False)
    lines = [_problem(item, root) for item in items[:_MOST_PROBLEMS]]
    if len(items) > _MOST_PROBLEMS:
        lines.append(f"and {len(items) - _MOST_PROBLEMS:,} more")
    return lines


def looks_like_a_key(text: str) -> bool:
    """Whether a text holds what can only be a service's key."""
    return _KEY_OF_A_SERVICE.search(text) is not None


def pasted_keys(values: Any, place: str = "") -> Iterator[str]:
    """Places of a config's values at which a service's key seems to have been pasted."""
    if isinstance(values, str) and looks_like_a_key(values):
        yield place
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from pasted_keys(value, f"{place}.{shown_key(key)}" if place else shown_key(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            yield from pasted_keys(value, f"{place}.{number}")


def _problem(item: Any, root: type[BaseModel] | None) -> str:
    loc, kind = item["loc"], str(item["type"])
    place = ".".join(shown_key(part) for part in loc)
    if kind == "extra_forbidden":
        return f"{place}: unknown key{_hint(loc, root)}"
    message = _message(item, kind)
    if not place:  # a check across sections: its input is the whole file
        return message
    if kind == "missing" or any(_SECRET_KEY.search(str(part)) for part in loc[-1:]):
        return f"{place}: {message}"
    if kind == "union_tag_invalid":
        return f"{place}: {message} (got {shown(item['ctx']['tag'])})"
    value = item["input"]
    misplaced = isinstance(value, str) and kind.startswith(_STRUCTURE)
    return f"{place}: {message} (got {'a text' if misplaced else shown(value)})"


def _message(item: Any, kind: str) -> str:
    """pydantic's own words, where they do not quote the input, or Python's."""
    context = item.get("ctx") or {}
    match kind:
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            return "a section (a mapping of keys) was expected"
        case "union_tag_invalid":
            return f"{context['discriminator']} must be one of {context['expected_tags']}"
        case "union_tag_not_found":
            return f"{context['discriminator']} is missing"
        case "bool_type" | "bool_parsing":
            return "write true or false"
        case "string_type":
            return "a text was expected; write it in quotes"
        case "value_error":
            return without_credentials(str(context.get("error", item["msg"])))
        case _:
            return without_credentials(str(item["msg"]))


def _hint(loc: tuple[int | str, ...], root: type[BaseModel] | None) -> str:
    if _SECRET_KEY.search(str(loc[-1])):
        return "; keys and passwords are read from the environment only"
    known = sorted(_fields(root, loc[:-1]))
    if not known:
        return ""
    near = difflib.get_close_matches(str(loc[-1])[:_LONGEST_KEY], known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(known)}"


def _fields(root: Any, path: tuple[int | str, ...]) -> set[str]:
    """Settings of the models at a place; a list's number and a union's tag are passed over."""
    models = _models(root)
    for part in path:
        below = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if below:
            models = [model for annotation in below for model in _models(annotation)]
        else:
            tagged = [m for m in models if part in _tags(m)]
            models = tagged or models
    return {name for model in models for name in model.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models in an annotation such as `tuple[A | B, ...] | None`."""
    is_type = isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias)
    if is_type and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tags(model: type[BaseModel]) -> set[object]:
    return {field.default for name, field in model.model_fields.items() if name in ("type", "kind")}


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
