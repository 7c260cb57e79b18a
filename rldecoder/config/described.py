"""What every setting is, read from the config classes: name, kind, default, meaning and unit.

So a setting is described once, under its field, and no message has to send people to the source.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from rldecoder.config.base import Config, StageConfig
from rldecoder.config.run import RunConfig

_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


class Setting(NamedTuple):
    """One setting of a run."""

    name: str
    """As `--set` takes it: `train_sae.k`; `ingest.sources[].paths` is of each source."""
    kind: str
    """What it takes, in words: `whole number, above 0`."""
    default: str
    """As YAML writes it; `required` where there is none."""
    meaning: str
    """The text under its field, with the unit; one line."""


class Section(NamedTuple):
    """Settings that belong together."""

    name: str
    """`train_sae`, `ingest.sources[] {type: local}`; empty for those of the run itself."""
    meaning: str
    settings: tuple[Setting, ...]


def stages() -> dict[str, str]:
    """What each stage's section is for, by name, in the order of the pipeline."""
    return {
        name: _line(info.annotation.__doc__)
        for name, info in RunConfig.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, StageConfig)
    }


@lru_cache
def sections() -> tuple[Section, ...]:
    """Every setting of a run, stage by stage; those of the run itself first."""
    return tuple(_sections("", RunConfig, RunConfig.__doc__, set()))


def _sections(
    name: str, config: type[Config], meaning: str | None, told: set[type[Config]]
) -> Iterator[Section]:
    """The section of a config class, then those of the classes within it."""
    own: list[Setting] = []
    inner: list[tuple[str, type[Config], str | None]] = []
    for field, info in config.model_fields.items():
        path = f"{name.split(' {')[0]}.{info.alias or field}".lstrip(".")
        classes = list(_configs(info.annotation))
        if not classes:
            own.append(_setting(path, info))
            continue

        # A list of several kinds of things (text sources) has a section for each kind.
        many = "[]" if get_origin(info.annotation) is tuple else ""
        for one in classes:
            tag = one.model_fields.get("type")
            of_kind = f" {{type: {tag.default}}}" if tag is not None and len(classes) > 1 else ""
            if of_kind and one in told:
                continue  # text sources stand in two lists
            told |= {one} if of_kind else set()
            about = one.__doc__ if of_kind else info.description or one.__doc__
            inner.append((path + many + of_kind, one, about))
        if many or type(None) in get_args(info.annotation):
            own.append(_setting(path, info))
    yield Section(name, _line(meaning), tuple(own))
    for part in inner:
        yield from _sections(*part, told)


def _configs(annotation: Any) -> Iterator[type[Config]]:
    """The config classes that a type mentions, in order."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _configs(part)


def _setting(path: str, info: FieldInfo) -> Setting:
    bounds = [
        f"{words} {getattr(limit, name):g}"
        for limit in info.metadata
        for name, words in _BOUNDS.items()
        if isinstance(getattr(limit, name, None), int | float)
    ]
    kind = ", ".join([_kind(info.annotation), *bounds])
    default = (
        "required" if info.is_required() else _yaml(info.get_default(call_default_factory=True))
    )
    return Setting(path, kind, default, _line(info.description))


def _kind(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        words = ["null" if part is type(None) else _kind(part) for part in parts]
        return " or ".join(dict.fromkeys(words))
    if origin is tuple:
        inner = dict.fromkeys(_kind(part) for part in parts if part is not Ellipsis)
        return f"list of: {', '.join(inner)}"
    if origin is dict:
        return "mapping"
    if parts and hasattr(annotation, "__metadata__"):
        return _kind(parts[0])
    if isinstance(annotation, type) and issubclass(annotation, Config):
        kind = annotation.model_fields.get("type")
        return f"{{type: {kind.default}}}" if kind is not None else "section"
    return _NAMES.get(annotation, "path or text")


def _yaml(value: Any) -> str:
    """A default as a config would write it, on one line."""
    if isinstance(value, Config):
        names = [
            name
            for name in type(value).model_fields
            if name in value.model_fields_set or name == "type"
        ]
        return _yaml({name: getattr(value, name) for name in names})
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:,}".replace(",", "_") if isinstance(value, int) else str(value) or '""'


def _line(text: str | None) -> str:
    return " ".join((text or "").split())
