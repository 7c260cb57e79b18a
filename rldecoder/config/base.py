"""The base class of every configuration: frozen, closed, documented."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

OnFail = Literal["stop", "warn"]


def free(default: Any, **kwargs: Any) -> Any:
    """A field that cannot change the result (paths, log intervals, ...): not in the digest."""
    return Field(default, json_schema_extra={"digest": False}, **kwargs)


class Config(BaseModel):
    """A frozen model that refuses unknown keys; docstrings under fields become help texts."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    def digest_fields(self) -> dict[str, Any]:
        """The fields that can change a result, as plain JSON values, nested configs included."""
        out: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("digest") is False:
                continue
            out[name] = _plain(getattr(self, name))
        return out


class StageConfig(Config):
    """Base of the stage configs."""

    @property
    def num_devices(self) -> int:
        """Accelerators that the stage holds at once, where there are any."""
        return 1


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
