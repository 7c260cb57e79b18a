"""What an artifact says of itself, and whether that can be true.

A manifest is sealed: `seal` is the SHA-256 of its own bytes with the seal's digits as zeros, so a
change of any byte is noticed. Its digest is computed again from what it says. Manifests of
before seals (up to 0.1 of November 2026) have neither `seal` nor `digest_fields`; they are read
too if they were in the store when it was first opened with seals (`unsealed.py`), and their digest
is checked through the stage's config where that still reads as it did.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rldecoder import files
from rldecoder.artifacts import unsealed
from rldecoder.config.base import StageConfig, hash_json
from rldecoder.devices import Machine
from rldecoder.errors import DamagedFileError
from rldecoder.json_records import to_json

MANIFEST = "manifest.json"
DIGEST_LENGTH = 16
MOST_BYTES = 64 * 2**20
"""No manifest is larger; one of a mirror is not read further."""
_BLANK = "0" * 64
_MEND = "Run again with the config that built it: it is moved aside and built anew."
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256."""
Sealed = TypeVar("Sealed", bound=BaseModel)


class ArtifactRef(BaseModel):
    """All that tasks pass to each other."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    stage: str
    digest: str

    def __str__(self) -> str:
        return f"{self.stage}/{self.digest}"


class FileEntry(BaseModel):
    """Size and hash of one published file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=0)]
    sha256: Hex


class Manifest(BaseModel):
    """Everything needed to know where an artifact came from and whether it is intact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    stage: str
    digest: str
    version: int
    config: dict[str, Any]
    """The stage config, all fields."""
    digest_fields: dict[str, Any] | None = None
    """The part of `config` that the digest covers, as it was hashed."""
    seed: int
    inputs: dict[str, ArtifactRef]
    fingerprint: dict[str, str]
    files: dict[str, FileEntry]
    """By names relative to the artifact's folder."""
    metrics: dict[str, float | int | str | bool | None]
    verdict: str | None = None
    reasons: list[str] = []
    caveats: list[str] = []
    source_digest: str
    """SHA-256 over the stage's module and every rldecoder module that it imports."""
    git_commit: str | None
    packages: dict[str, str]
    device: str
    device_name: str
    devices: Machine = Machine()
    """The machine when the stage began."""
    threads: int
    wall_seconds: float
    peak_memory_bytes: int
    resumed: bool
    """Whether an interrupted run's checkpoint was found; wall_seconds is then the last part's."""
    created_at: str
    seal: Hex | None = None
    """SHA-256 of the manifest's bytes, these digits taken as zeros."""


def artifact_digest(
    *,
    stage: str,
    version: int,
    config: dict[str, Any],
    seed: int,
    fingerprint: dict[str, str],
    inputs: dict[str, ArtifactRef],
) -> str:
    """The address of what a stage would publish, known before it runs."""
    return hash_json(
        {
            "stage": stage,
            "version": version,
            "config": config,
            "seed": seed,
            "fingerprint": fingerprint,
            "inputs": {name: ref.digest for name, ref in inputs.items()},
        }
    )[:DIGEST_LENGTH]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seal a manifest and write it; returns it with its seal."""
    return write_sealed(folder / MANIFEST, manifest)


def write_sealed(path: Path, record: Sealed) -> Sealed:
    """Write a record with a field `seal` under the hash of its own bytes; returns it with it."""
    blank = to_json(path, record.model_copy(update={"seal": _BLANK}).model_dump(mode="json"))
    seal = hashlib.sha256(blank).hexdigest()
    files.write_bytes(path, _with_seal(blank, _BLANK, seal))
    return record.model_copy(update={"seal": seal})


def keeps_seal(data: bytes, seal: str) -> bool:
    """Whether the bytes of a sealed record are those that were sealed."""
    blank = _with_seal(data, seal, _BLANK)
    return hashlib.sha256(blank).hexdigest() == seal


def read_manifest(path: Path, ref: ArtifactRef) -> Manifest:
    """The manifest in a file, which must be that of `ref`.

    Raises:
        DamagedFileError: as `parse_manifest`, or the file is missing or no regular one.
        NoResourceError: it is there and may not be read.
    """
    try:
        data = files.read_regular(path)
    except OSError as error:
        raise files.unreadable(path, error, _MEND) from error
    return parse_manifest(data, ref, path, path.parents[2])


def parse_manifest(data: bytes, ref: ArtifactRef, source: object, store: Path) -> Manifest:
    """The manifest that `data` is, which must be that of `ref`.

    Args:
        source: where it came from, for errors.
        store: the folder of the store, which knows the manifests of before seals.

    Raises:
        DamagedFileError: it is not JSON, lacks a field, was changed, names files that are not
            plain relative ones, or is of another artifact.
    """
    try:
        manifest = Manifest.model_validate(json.loads(data, parse_constant=_no_number))
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        _refuse(source, f"{where}: {first['msg']}", error)
    except (ValueError, RecursionError) as error:
        _refuse(source, str(error), error)
    if manifest.seal is None:
        if hashlib.sha256(data).hexdigest() not in unsealed.listed(store):
            _refuse(source, "It has no seal, and is not one of the store's manifests of before")
    elif not keeps_seal(data, manifest.seal):
        _refuse(source, "It was changed after it was sealed")
    if (manifest.kind, manifest.stage, manifest.digest) != (ref.kind, ref.stage, ref.digest):
        _refuse(source, f"It is of {manifest.stage}/{manifest.digest} ({manifest.kind})")
    if _own_digest(manifest) not in (None, manifest.digest):
        _refuse(source, "What it says it was made from has another digest")
    for name in manifest.files:
        if not is_plain(name):
            _refuse(source, f"It names {name!r}, which is no file of its folder")
    return manifest


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in the artifact's folder or below it."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and str(path) == name
        and not path.is_absolute()
        and ".." not in path.parts
        and not set("\0\\") & set(name)
        and name != MANIFEST
    )


def _own_digest(manifest: Manifest) -> str | None:
    """The digest of what the manifest says; None where an old one's cannot be known any more."""
    fields = manifest.digest_fields
    if fields is None:
        fields = _old_digest_fields(manifest)
    if fields is None:
        return None
    return artifact_digest(
        stage=manifest.stage,
        version=manifest.version,
        config=fields,
        seed=manifest.seed,
        fingerprint=manifest.fingerprint,
        inputs=manifest.inputs,
    )


def _old_digest_fields(manifest: Manifest) -> dict[str, Any] | None:
    from rldecoder.config.run import RunConfig  # here, because only old manifests need it

    field = RunConfig.model_fields.get(manifest.stage)
    kind = None if field is None else field.annotation
    if not (isinstance(kind, type) and issubclass(kind, StageConfig)):
        return None
    try:
        config = kind.model_validate(manifest.config)
    except ValidationError:
        return None  # of a program whose settings were others
    same = config.model_dump(mode="json") == manifest.config
    return config.digest_fields() if same else None


def _with_seal(data: bytes, old: str, new: str) -> bytes:
    # Its key cannot stand in a string of the manifest: there the quotes would be escaped.
    return data.replace(f'"seal": "{old}"'.encode(), f'"seal": "{new}"'.encode(), 1)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _refuse(source: object, why: str, error: Exception | None = None) -> NoReturn:
    raise DamagedFileError(f"{source} cannot be trusted.", f"{why.rstrip('.')}.", _MEND) from error
