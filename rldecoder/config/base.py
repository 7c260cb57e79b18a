"""The base class of every configuration: frozen, closed, documented."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

OnFail = Literal["stop", "warn"]

_HUB_REPO = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$"
HubRepo = Annotated[str, Field(pattern=_HUB_REPO, max_length=96)]
"""`organisation/name` on the Hugging Face hub."""


def name_on_hub(values: Any) -> Any:
    """Settings whose `model` is a name on the hub, as `model: hub` with that `repo`.

    So both ways to write it are one setting, in digests too. The path of a spec is no such name.
    """
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, str) or not re.match(_HUB_REPO, model) or values.get("repo"):
        return values
    if model.endswith((".yaml", ".yml")):
        return values
    return {**values, "model": "hub", "repo": model}


def _no_escape(revision: str) -> str:
    if ".." in revision or "//" in revision or revision.endswith(("/", ".lock")):
        raise ValueError("a revision is a commit, a branch or a tag, not a path")
    return revision


Revision = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./+-]*$", max_length=200),
    AfterValidator(_no_escape),
]
"""A commit, branch or tag. The cache keeps it as a path, so it must not lead elsewhere."""

_LARGEST = 2**63 - 1  # what counts and seeds are kept in


def free(default: Any, **kwargs: Any) -> Any:
    """A field that cannot change the result (paths, log intervals, ...): not in the digest."""
    return Field(default, json_schema_extra={"digest": False}, **kwargs)


_DEFAULT: Any = object()


def late(default: Any, *, before: Any = _DEFAULT, **kwargs: Any) -> Any:
    """A field that came later: in the digest only where it changes what was there before.

    So what was built before it keeps its address. `before` is the value that says what was done
    then; that is the default where none is given.
    """
    was = default if before is _DEFAULT else before
    return Field(default, json_schema_extra={"digest": "changed", "before": was}, **kwargs)


def _close_scalars(schema: Any) -> None:
    """Make a schema, at any depth, take what people write, and nothing else.

    Numbers and booleans take nothing but their like (pydantic's own strictness would also refuse
    lists for tuples and texts for paths); a list may be one item; a word may be a boolean.
    """
    if isinstance(schema, list | tuple):
        for part in schema:
            _close_scalars(part)
    elif isinstance(schema, dict):
        kind = schema.get("type")
        if kind == "function-before" and isinstance(schema["function"]["function"], _Before):
            return  # of a config within this one, which is closed already
        if kind in ("int", "float"):
            _put_before(_Before(_a_number), schema)
        elif kind == "literal" and len(schema["expected"]) > 1:  # of one: which kind it is
            _put_before(_Before(partial(_a_word, tuple(schema["expected"]))), schema)
        elif kind == "tuple" and "variadic_item_index" in schema:
            _close_scalars(schema["items_schema"])
            _put_before(_Before(_a_list), schema)
        elif kind == "bool":
            schema["strict"] = True
        else:
            for name, part in schema.items():
                if name not in ("default", "metadata", "config", "serialization"):
                    _close_scalars(part)


class _Before:
    """Reads a value before pydantic does; of a class of its own, to be known again."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self._read = read

    def __call__(self, value: Any) -> Any:
        return self._read(value)


def _put_before(read: _Before, schema: dict[str, Any]) -> None:
    inner: Any = dict(schema)
    schema.clear()
    schema.update(core_schema.no_info_before_validator_function(read, inner))


def _a_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _a_word(expected: tuple[Any, ...], value: Any) -> Any:
    """`off` is false in older YAML, and what writes YAML or JSON may write that."""
    if isinstance(value, bool):
        words = ("on", "always") if value else ("off", "never", "none")
        return next((word for word in words if word in expected), value)
    if isinstance(value, str) and value not in expected:
        same = [w for w in expected if isinstance(w, str) and w.lower() == value.strip().lower()]
        return same[0] if len(same) == 1 else value
    return value


def _a_number(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise PydanticCustomError(
            "number_type", "a number was expected, without quotes, leading zeros or colons"
        )
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        raise PydanticCustomError("number_size", "this number is too large")
    return value


class Config(BaseModel):
    """A frozen model that refuses unknown keys; docstrings under fields become help texts.

    A number is a number: texts (`"32"`, `yes`, `1:00:00`) and booleans are refused where one is
    expected, and so are infinity and NaN. One item may stand for a list of it, `false` for `off`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # it may hold a key that was pasted; see `problems`
    )

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler, /
    ) -> CoreSchema:
        schema = handler(source)
        _close_scalars(schema)
        return schema

    def digest_fields(self) -> dict[str, Any]:
        """The fields that can change a result, as plain JSON values, nested configs included."""
        out: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            rule = extra.get("digest")
            value = getattr(self, name)
            if rule is False or (rule == "changed" and value == extra["before"]):
                continue
            out[name] = _plain(value)
        return out


class StageConfig(Config):
    """Base of the stage configs."""

    @property
    def num_devices(self) -> int:
        """Accelerators that the stage holds at once, where there are any."""
        return 1

    @property
    def in_team(self) -> bool:
        """Whether several processes do together all that needs a device."""
        return False


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.digest_fields()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    return str(value)


def hash_json(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
