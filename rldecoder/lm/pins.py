"""A model that is not at hand, known by hashes: which files it has, and where they may be had.

A release names its frozen model so. Whoever opens it finds the model again in the same places as
a run would, and every file is compared before it is read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock
from pydantic import Field

from rldecoder.config.base import Config, hash_json
from rldecoder.config.model import RandomModelConfig
from rldecoder.errors import BadInputError, RlDecoderError
from rldecoder.json_text import read_json_file
from rldecoder.lm.model_sources import (
    TOKENIZER_FILES,
    SourceUnavailableError,
    check_model_folder,
    fetch,
    locate_one,
)
from rldecoder.lm.specs import (
    HfCacheSource,
    HubSource,
    LocalSource,
    ModelRecord,
    ModelSource,
    WheelSource,
)
from rldecoder.lm.user_cache import sha256_file, user_cache
from rldecoder.schemas import JsonRecord

_SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_READ_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", *TOKENIZER_FILES,
)  # fmt: skip
# Made when a run takes in a folder that lacks them; a model is the same without.
_MADE_FROM_OTHERS = ("generation_config.json", "tokenizer.json")
# What the program that saved a file says of itself and of its disk.
_OF_THE_WRITER = (
    "transformers_version", "name_or_path", "_name_or_path", "is_local", "local_files_only",
)  # fmt: skip


class RandomSource(Config):
    """A random model, which is made again: same sizes and seed, same bytes."""

    kind: Literal["random"] = "random"
    seed: int
    """The stage's."""
    sizes: RandomModelConfig
    """As in the run's config."""


PinnedSource = Annotated[
    HfCacheSource | HubSource | WheelSource | RandomSource, Field(discriminator="kind")
]
"""No folder is among them: a path on one machine says nothing on another."""


class ModelPin(JsonRecord):
    """What a folder must hold to be the model."""

    name: str
    """For people."""
    weights: dict[str, _SHA256]
    """SHA-256 of every weight file, by name; no other may be there."""
    files: dict[str, _SHA256]
    """Of config and tokenizer files: of JSON what it says, less who wrote it where."""
    sources: tuple[PinnedSource, ...]
    """Where to look, in this order; none for a folder of somebody's own."""


def pin_model(
    folder: Path, record: ModelRecord, sources: Sequence[ModelSource | RandomSource]
) -> ModelPin:
    """The pin of a model's published folder.

    Args:
        sources: where a run would look for it; those that cannot give these bytes are left out.
    """
    if "hub" in record.source:  # whatever branch the config names: the commit it was then
        repo, _, commit = record.source["hub"].partition("@")
        sources = (
            HfCacheSource(repo=repo, revision=commit),
            HubSource(repo=repo, revision=commit),
        )
    gguf = record.source.get("gguf")
    return ModelPin(
        name=record.name,
        weights=record.weight_files,
        files={path.name: _content_sha256(path) for path in _read_files(folder)},
        sources=tuple(
            source
            for source in sources
            if not isinstance(source, LocalSource)
            and not (isinstance(source, WheelSource) and gguf not in (None, source.member_sha256))
        ),
    )


def find_model(pin: ModelPin, note: Callable[[str], None], given: Path | str | None = None) -> Path:
    """The folder of the pinned model, every file of it compared.

    Args:
        note: told one line before anything slow starts.
        given: look here and nowhere else.

    Raises:
        BadInputError: it is nowhere, or what is there is another model.
        NoResourceError: the disk is too small to fetch it.
    """
    if given is not None:
        folder = Path(given).expanduser()
        why = _difference(folder, pin) if folder.is_dir() else "no such folder"
        if why is None:
            return folder
        raise BadInputError(
            f"The model in {folder} is not {pin.name}, as it was pinned.",
            f"The difference: {why}.",
            "Give the folder that the run read.",
        )

    reasons = []
    for source in pin.sources:
        try:
            return _from_source(source, pin, note)
        except SourceUnavailableError as error:
            reasons.append(str(error))
        except RlDecoderError as error:
            reasons.append(f"{error.what} {error.why}".strip().rstrip("."))
    raise BadInputError(
        f"The frozen model {pin.name} was not found.",
        f"{'; '.join(reasons)}." if reasons else "It was a folder on the machine of the run.",
        "Give the folder that holds it: open_release(..., model=FOLDER), or --model FOLDER.",
    )


def _from_source(
    source: ModelSource | RandomSource, pin: ModelPin, note: Callable[[str], None]
) -> Path:
    if isinstance(source, RandomSource):
        return _random_model(source, pin)
    located = locate_one(source)
    # What is there may be damaged, or made by another version: fetching would mend it.
    if located.folder is not None and _difference(located.folder, pin) is None:
        return located.folder
    folder = fetch(located, note)
    why = _difference(folder, pin)
    if why is not None:
        raise SourceUnavailableError(f"{located.description} has another model: {why}")
    return folder


def _random_model(source: RandomSource, pin: ModelPin) -> Path:
    from rldecoder.lm.random_model import make_random_model

    name = hash_json(source.model_dump(mode="json"))[:12]
    folder = user_cache() / "models" / f"random-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir() and _difference(folder, pin) is None:
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
            made = make_random_model(
                Path(work) / "model", seed=source.seed, **source.sizes.model_dump()
            )
            why = _difference(made, pin)
            if why is not None:
                raise SourceUnavailableError(
                    f"a random model of the same seed is another one here: {why}"
                )
            if folder.is_dir():
                os.replace(folder, Path(work) / "damaged")
            os.replace(made, folder)
    return folder


def _difference(folder: Path, pin: ModelPin) -> str | None:
    """How a folder differs from the pinned model, None if it does not."""
    try:
        weights = {path.name: path for path in check_model_folder(folder)}
    except RlDecoderError as error:
        return f"{error.what} {error.why}".rstrip(".")
    for name in sorted(set(weights) ^ set(pin.weights)):
        return f"{name} is {'not pinned' if name in weights else 'missing'}"

    # Small files first: they tell most models apart.
    present = {path.name: path for path in _read_files(folder)}
    for name in sorted(set(present) | set(pin.files)):
        if name not in present:
            if name not in _MADE_FROM_OTHERS:
                return f"{name} is missing"
        elif name not in pin.files:
            return f"{name} is not pinned, and would be read"
        elif _content_sha256(present[name]) != pin.files[name]:
            return f"{name} says something else"
    for name, path in weights.items():
        if sha256_file(path) != pin.weights[name]:
            return f"{name} has another SHA-256"
    return None


def _read_files(folder: Path) -> list[Path]:
    return [folder / name for name in _READ_FILES if (folder / name).is_file()]


def _content_sha256(path: Path) -> str:
    """Of JSON the hash of what it says; of other files that of their bytes."""
    if path.suffix != ".json":
        return sha256_file(path)
    try:
        value = read_json_file(path)
    except ValueError:
        return sha256_file(path)
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _OF_THE_WRITER}
    return hash_json(value)
