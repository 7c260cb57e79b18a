"""Where a run that a form started may read and write: what whoever started `make ui` allows.

A form of the Prefect UI is filled in by whoever may log in there; the worker runs it with the
rights of the one who started `make ui`. So its `config` lies in configs/, its store below
artifacts/ (or where that config keeps it), and no override names another file, folder, address or
environment variable. `--allow-config` and `--allow-store` of `python -m flows.serve_ui` allow
more. Flows that are called from Python, and `rldecoder run`, are their caller's and are not
confined: only the worker of `make ui` sets the variable that is read here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flows.project import ROOT
from rldecoder.config.named import SHIPPED_FOLDER
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError

CONFIGS = ROOT / "configs"
ALLOWED_ENV = "RLDECODER_UI_ALLOWED"

FILES = (
    "store", "path", "paths", "cache", "reviews", "sae", "clusters", "folder", "imported",
    "include",
)  # fmt: skip
"""Settings that name files or folders of this machine; `model` does so in some of its values."""
ELSEWHERE = ("mirror", "address", "repo", "revision", "base_url", "api_key_env", "release", "id")
"""Settings that name an address, what lies there, or an environment variable, as the `name` of a
dataset does."""

_MEND = (
    "Or let it in: `python -m flows.serve_ui {option} DIR`, or `make ui UI_ARGS='{option} DIR'`."
)


class Allowed(NamedTuple):
    """Folders that a form may name, with everything below them."""

    configs: tuple[Path, ...]
    """Run configs, read only."""
    stores: tuple[Path, ...]
    """Stores, review files, and what overrides name."""

    def as_env(self) -> dict[str, str]:
        """The environment variable for the worker."""
        values = {name: [str(p) for p in paths] for name, paths in self._asdict().items()}
        return {ALLOWED_ENV: json.dumps(values)}


def allowed_with(configs: Iterable[Path] = (), stores: Iterable[Path] = ()) -> Allowed:
    """The project's own folders and those of the command line."""
    ours = dict.fromkeys((ROOT / "configs", SHIPPED_FOLDER.resolve()))  # one in a checkout
    return Allowed(
        (*ours, *(path.resolve() for path in configs)),
        (ROOT / "artifacts", *(path.resolve() for path in stores)),
    )


def allowed_here() -> Allowed | None:
    """What forms may name in this process; None where it runs for its own caller."""
    text = os.environ.get(ALLOWED_ENV)
    if text is None:
        return None
    values = json.loads(text)
    return Allowed(*(tuple(Path(p) for p in values[name]) for name in Allowed._fields))


def check_config(path: Path, allowed: Allowed) -> None:
    """Refuse a config outside of what is allowed, before it is read.

    Raises:
        BadInputError: it lies elsewhere.
    """
    if not _below(path, allowed.configs):
        raise BadInputError(
            f"The config {_short(path)} is not one that a form may name.",
            f"Those lie in {_listed(allowed.configs)}.",
            f"Name one of them. {_MEND.format(option='--allow-config')}",
        )


def check_place(what: str, path: Path | str, allowed: Allowed, own: RunConfig) -> None:
    """Refuse a store or a file outside of what is allowed.

    Args:
        what: how the form calls it.
        own: the config without the form's overrides, whose store is allowed too.

    Raises:
        BadInputError: it lies elsewhere.
    """
    if path == own.store:
        return
    roots = _roots(allowed, own)
    if isinstance(path, str) or not _below(path, roots):
        raise BadInputError(
            f"The {what} {_short(path)} is not one that a form may name.",
            f"Those lie in {_listed(roots)}.",
            f"Leave it empty, or name one of them. {_MEND.format(option='--allow-store')}",
        )


def check_overrides(run: RunConfig, own: RunConfig, allowed: Allowed) -> None:
    """Refuse overrides that name another place than the config does.

    Args:
        run: with the overrides.
        own: without.

    Raises:
        BadInputError: one does, and the place is not below an allowed folder.
    """
    known = {(key, value) for _, key, value in _places(own.model_dump(mode="json"))}
    for dotted, key, value in _places(run.model_dump(mode="json")):
        local = (key == "model" or key in FILES) and "://" not in value
        if (key, value) in known or (local and _below(Path(value), _roots(allowed, own))):
            continue
        raise BadInputError(
            f"A form's override may not set {dotted} to {_short(value)}.",
            "It names a place that the config does not name.",
            "Write it into a config of your own and name that. "
            f"{_MEND.format(option='--allow-config')}",
        )


def _roots(allowed: Allowed, own: RunConfig) -> tuple[Path, ...]:
    """Folders that may be named; the config's own store is one unless it is a bucket."""
    return (*allowed.stores, *([own.store] if isinstance(own.store, Path) else []))


def _places(value: Any, dotted: str = "", key: str = "") -> Iterator[tuple[str, str, str]]:
    """Every setting that names a place: where it stands, its own name, and its value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "name" and value.get("type") == "dataset":
                yield f"{dotted}.name", "dataset", str(inner)
            else:
                yield from _places(inner, f"{dotted}.{name}" if dotted else name, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _places(inner, dotted, key)
    elif isinstance(value, str) and (
        key in (*FILES, *ELSEWHERE) or (key == "model" and _is_path(value))
    ):
        yield dotted, key, value


def _is_path(model: str) -> bool:
    """Whether `model` is a file of one's own, and no name of configs/models."""
    return "/" in model or "\\" in model or model.endswith((".yaml", ".yml"))


def _below(path: Path, roots: Iterable[Path]) -> bool:
    try:
        real = path.resolve()  # what a link points to counts
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL
        return False
    return any(real.is_relative_to(root.resolve()) for root in roots)


def _listed(roots: Iterable[Path]) -> str:
    return ", ".join(dict.fromkeys(str(root) for root in roots))


def _short(value: object) -> str:
    text = json.dumps(str(value))
    return text if len(text) <= 120 else f"{text[:117]}..."
