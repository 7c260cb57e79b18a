"""What a release says of itself, and the check that it is what was released.

The manifest is sealed as those of artifacts are. It lists every file with its SHA-256; a folder
that holds anything else, or anything else than it lists, is not opened.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError

from rldecoder import files
from rldecoder.artifacts.manifests import (
    MANIFEST,
    MOST_BYTES,
    FileEntry,
    Hex,
    is_plain,
    keeps_seal,
)
from rldecoder.config.problems import problem_lines
from rldecoder.errors import BadInputError, DamagedFileError, RlDecoderError
from rldecoder.schemas import JsonRecord, Scalar

FORMAT: Literal["rl-decoder release"] = "rl-decoder release"
SCHEMA_VERSION = 1
"""Raised when an older program could misread a release."""
CARD = "README.md"
SUFFIXES = (".safetensors", ".json", ".parquet")
"""Beside the card, no file has another."""
BOOKKEEPING = frozenset({".git", ".gitattributes", ".cache"})
"""What git and the hub put beside the files of a release; never read."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_MEND = "Take the release again from where it was published."


class ReleasedArtifact(JsonRecord):
    """A stage's artifact, as far as it was released."""

    kind: str
    """What it is; also its folder."""
    digest: str
    """Its address in the store of the run."""
    version: int
    """Of the stage."""
    seed: int
    """Of the stage."""
    metrics: dict[str, Scalar]
    """Headline numbers."""
    verdict: str | None
    """`pass` or `fail` of a gate."""
    caveats: tuple[str, ...]
    """What readers must be told."""


class ReleaseManifest(JsonRecord):
    """The whole release."""

    format: Literal["rl-decoder release"]
    """Tells it from other JSON."""
    schema_version: int = Field(ge=1)
    """See SCHEMA_VERSION."""
    label_schema: int
    """`schema_version` of the labels."""
    name: str
    """The run's."""
    built_at: str
    """When the last of its artifacts was: ISO 8601, UTC."""
    program: str
    """Version of RL-Decoder that wrote it."""
    git_commit: str | None
    """Of the program that built the last artifact; null outside a checkout."""
    packages: dict[str, str]
    """Versions that the last artifact was built with."""
    artifacts: dict[str, ReleasedArtifact]
    """By stage."""
    files: dict[str, FileEntry]
    """All files but this one, by name."""
    seal: Hex
    """SHA-256 of this file's bytes, these digits taken as zeros."""


def read_release(root: Path, *, links_into: Path | None = None) -> ReleaseManifest:
    """The manifest of a release; its files are not looked at yet.

    Args:
        root: the release's folder.
        links_into: a folder into which its files may be links, as in the hub's cache.

    Raises:
        BadInputError: there is no release, or one that a newer program wrote.
        DamagedFileError: the manifest was changed, or names what no release holds.
    """
    if not root.is_dir() or not os.path.lexists(root / MANIFEST):
        raise BadInputError(
            f"{root} is not a release.",
            f"It has no {MANIFEST}." if root.is_dir() else "There is no such folder.",
            "Name a folder that `rldecoder export CONFIG release DIR` wrote, or owner/name on "
            "the hub.",
        )
    data = _content(root, MANIFEST, links_into)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        _refuse(MANIFEST, str(error), error)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BadInputError(
            f"{root} is not a release.",
            f"Its {MANIFEST} is that of something else.",
            "Name the folder that `rldecoder export CONFIG release DIR` wrote.",
        )

    # The seal first: what was changed says nothing, not even how new it is.
    seal = value.get("seal")
    if not isinstance(seal, str) or not keeps_seal(data, seal):
        _refuse(MANIFEST, "it was changed after it was sealed")
    _require_known(root, value)
    try:
        manifest = ReleaseManifest.model_validate(value)
    except ValidationError as error:
        _refuse(MANIFEST, problem_lines(error)[0], error)
    for name in manifest.files:
        if not is_plain(name) or not _NAME.fullmatch(name):
            _refuse(MANIFEST, f"it names {name!r}, which is no file of its folder")
        if name != CARD and not name.endswith(SUFFIXES):
            _refuse(MANIFEST, f"it names {name}, which is neither safetensors, JSON nor Parquet")
    return manifest


def verify_release(
    root: Path, manifest: ReleaseManifest, *, links_into: Path | None = None
) -> None:
    """Compare every file of a release with its hash.

    Args:
        links_into: as in `read_release`.

    Raises:
        DamagedFileError: a file is missing, was changed, or was never released; it is named.
        NoResourceError: a file is there and may not be read.
    """
    for name in _lying_there(root):
        if name not in manifest.files and name != MANIFEST:
            _refuse(name, "it was never released")

    def check(name: str) -> None:
        entry = manifest.files[name]
        path = _place(root, name, links_into)
        try:
            size, sha256 = path.stat().st_size, files.hash_file(path)
        except OSError as error:
            raise _unreadable(root, name, error) from error
        if (size, sha256) != (entry.size, entry.sha256):
            _refuse(name, "it was changed after it was released")

    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        list(pool.map(check, sorted(manifest.files)))


def _require_known(root: Path, value: dict[str, Any]) -> None:
    from rldecoder.interp.records import SCHEMA_VERSION as LABEL_SCHEMA

    for what, key, known in (
        ("release", "schema_version", SCHEMA_VERSION),
        ("labels", "label_schema", LABEL_SCHEMA),
    ):
        found = value.get(key)
        if isinstance(found, int) and found > known:
            raise BadInputError(
                f"{root} is of a newer RL-Decoder ({value.get('program')}).",
                f"Its {what} has schema {found}; this program reads up to {known}.",
                "Install a newer one: `pip install -U rl-decoder`.",
            )


def _lying_there(root: Path) -> Iterator[str]:
    """Names of all that lies in the folder: files, links, pipes."""
    for here, folders, names in os.walk(root):
        at_top = Path(here) == root
        folders[:] = sorted(name for name in folders if not (at_top and name in BOOKKEEPING))
        found = [*names, *(name for name in folders if (Path(here) / name).is_symlink())]
        for name in sorted(found):
            if not (at_top and name in BOOKKEEPING):
                yield (Path(here) / name).relative_to(root).as_posix()


def _content(root: Path, name: str, links_into: Path | None) -> bytes:
    path = _place(root, name, links_into)
    try:
        if path.stat().st_size > MOST_BYTES:
            _refuse(name, f"it is larger than {MOST_BYTES >> 20} MiB")
        return files.read_regular(path)
    except OSError as error:
        raise _unreadable(root, name, error) from error


def _place(root: Path, name: str, links_into: Path | None) -> Path:
    """Where a file's bytes are."""
    path = root / name
    if links_into is None or not path.is_symlink():
        return path
    target = path.resolve()
    if not target.is_relative_to(links_into.resolve()):
        _refuse(name, "it is a link to outside")
    return target


def _unreadable(root: Path, name: str, error: OSError) -> RlDecoderError:
    return files.unreadable(root / name, error, _MEND)


def _refuse(name: str, why: str, error: Exception | None = None) -> NoReturn:
    raise DamagedFileError(
        f"{name} of the release cannot be trusted.",
        f"{why[0].upper()}{why[1:].rstrip('.')}.",
        _MEND,
    ) from error
