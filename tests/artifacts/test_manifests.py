"""Manifests: every edit is noticed, what one says must be true, old ones still load."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder import files, schemas
from rldecoder.artifacts.manifests import read_manifest, write_manifest
from rldecoder.artifacts.store import (
    ArtifactRef,
    ArtifactStore,
    FileEntry,
    artifact_digest,
)
from rldecoder.artifacts.unsealed import LIST_FILE
from rldecoder.config.data import IngestConfig
from rldecoder.errors import DamagedFileError
from tests.artifacts.published import ORIGIN, REF, edit, manifest, publish


def test_unreadable_manifest_is_damage(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    (store.path(REF) / "manifest.json").write_text("{")
    with pytest.raises(DamagedFileError):
        store.manifest(REF)


HOSTILE = ["/dev/zero", "../../x", "sub/../../x", "./a", "sub//file.bin", "", ".", "a\0b", "a\\b"]


BAD_MANIFESTS: dict[str, Any] = {
    "verdict": {"verdict": "pass"},
    "no seal": {"verdict": "pass", "seal": None},
    "seed": {"seed": 2},
    "nothing": {},
    "extra": {"more": 1},
    "nan": {"metrics": {"x": float("nan")}},
    **{f"name {name!r}": {"files": {name: {"size": 0, "sha256": "0" * 64}}} for name in HOSTILE},
}


@pytest.mark.parametrize("changes", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS.keys())
def test_an_edited_manifest_is_noticed(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = publish(ArtifactStore(tmp_path)).parents[1]
    edit(folder / "manifest.json", **changes)
    if not changes:  # even if only white space did change
        (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + " ")
    notes: list[str] = []
    assert ArtifactStore(tmp_path).existing(REF, notes.append) is None
    assert "cannot be trusted" in notes[0]
    publish(ArtifactStore(tmp_path))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sealed_manifest_names_plain_files_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "m").mkdir()
    entry = FileEntry(size=0, sha256="0" * 64)
    write_manifest(tmp_path / "m", manifest(files={name: entry}))
    with pytest.raises(DamagedFileError, match="no file of its folder"):
        read_manifest(tmp_path / "m" / "manifest.json", REF)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2}, {"version": 2}, {"fingerprint": {}}, {"digest_fields": {"size": 4}},
        {"inputs": {"x": REF}}, {"digest": "0" * 16}, {"kind": "model"}, {"stage": "report"},
    ],
)  # fmt: skip
def test_what_a_manifest_says_must_have_its_digest(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_manifest(tmp_path, manifest(**changes))  # sealed, by whoever wrote it
    with pytest.raises(DamagedFileError):
        read_manifest(tmp_path / "manifest.json", REF)


@pytest.mark.parametrize("content", [b"", b"[" * 200_000, b"\xff\xfe", b"{}", b"[1]", b"NaN"])
def test_no_manifest_at_all_is_moved_aside_and_built_again(tmp_path: Path, content: bytes) -> None:
    folder = publish(ArtifactStore(tmp_path)).parents[1]
    (folder / "manifest.json").write_bytes(content)
    notes: list[str] = []
    assert ArtifactStore(tmp_path).existing(REF, notes.append) is None
    assert len(notes) == 1
    publish(ArtifactStore(tmp_path))


def old_artifact(root: Path, created_at: str = "2025-01-01T00:00:00+00:00") -> ArtifactRef:
    """An artifact as it was written before seals, without any file."""
    config = IngestConfig()
    origin: dict[str, Any] = {**ORIGIN, "fingerprint": {}}
    digest = artifact_digest(stage="ingest", config=config.digest_fields(), **origin)
    ref = REF.model_copy(update={"digest": digest})
    old = manifest(ref, **origin, config=config.model_dump(mode="json"), created_at=created_at)
    values = old.model_dump(mode="json", exclude={"seal", "digest_fields"})
    path = root / str(ref) / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    schemas.write_json(path, values)
    return ref


def test_artifacts_of_before_seals_still_load_as_they_are(tmp_path: Path) -> None:
    """Their digests are checked through the config of their stage."""
    ref = old_artifact(tmp_path)
    path = tmp_path / str(ref) / "manifest.json"
    values = json.loads(path.read_text())
    for changes in ({"seed": 2}, {"version": 7}, {"config": values["config"] | {"shard_rows": 1}}):
        schemas.write_json(path, values | changes)
        (tmp_path / LIST_FILE).unlink(missing_ok=True)  # as if they had always been so
        if "config" in changes:  # one that this program's settings do not read as they were
            ArtifactStore(tmp_path).verify(ref)
            continue
        with pytest.raises(DamagedFileError, match="another digest"):
            ArtifactStore(tmp_path).verify(ref)

    schemas.write_json(path, values)
    (tmp_path / LIST_FILE).unlink()
    assert ArtifactStore(tmp_path).verify(ref).seed == 1
    publish(ArtifactStore(tmp_path))
    assert ArtifactStore(tmp_path).verify(ref).verdict == "fail"
    schemas.write_json(path, values | {"verdict": "pass"})  # now they are protected, too
    with pytest.raises(DamagedFileError, match="has no seal"):
        ArtifactStore(tmp_path).verify(ref)


@pytest.mark.parametrize("listed", [True, False], ids=["list", "no list"])
def test_a_manifest_without_its_seal_is_not_an_old_one(tmp_path: Path, listed: bool) -> None:
    store = ArtifactStore(tmp_path)
    path = publish(store).parents[1] / "manifest.json"
    values = json.loads(path.read_text())
    del values["seal"], values["digest_fields"]
    if not listed:  # as a store that was made between seals and lists
        (tmp_path / LIST_FILE).unlink()
        other = REF.model_copy(update={"digest": "1" * 16})
        with store.building(other) as folder:
            store.publish(other, folder, manifest(other))
    schemas.write_json(path, values | {"verdict": "pass"})
    with pytest.raises(DamagedFileError, match="has no seal"):
        ArtifactStore(tmp_path).verify(REF)


def test_a_mirror_brings_no_manifest_without_seal(tmp_path: Path) -> None:
    ref = old_artifact(tmp_path / "mirror")
    notes: list[str] = []
    store = ArtifactStore(tmp_path / "store", mirror=str(tmp_path / "mirror"))
    assert store.existing(ref, notes.append) is None
    assert "has no seal" in notes[-1]
    # That of a store which has it, too, is known by its content.
    old_artifact(tmp_path / "old")
    store = ArtifactStore(tmp_path / "old", mirror=str(tmp_path / "mirror"))
    assert store.mirror is not None
    assert store.mirror.holds(ref, notes.append)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '["x"]', "[" * 9999])
def test_a_damaged_list_of_old_manifests_is_named(tmp_path: Path, content: str) -> None:
    ref = old_artifact(tmp_path)
    ArtifactStore(tmp_path)
    (tmp_path / LIST_FILE).write_text(content)
    with pytest.raises(DamagedFileError, match=r"\.unsealed\.json"):
        ArtifactStore(tmp_path).verify(ref)


def test_an_old_store_that_cannot_be_written_to_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = old_artifact(tmp_path)

    def read_only(path: Path, data: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "write_bytes", read_only)
    assert ArtifactStore(tmp_path).verify(ref).seed == 1


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=4), st.integers(0, 9))
def test_digest_depends_on_content_not_on_order(config: dict[str, int], seed: int) -> None:
    def digest(values: dict[str, int], seed: int) -> str:
        return artifact_digest(
            stage="s", version=1, config=values, seed=seed, fingerprint={}, inputs={}
        )

    assert digest(config, seed) == digest(dict(reversed(config.items())), seed)
    assert digest(config, seed) != digest({**config, "extra": 1, "": -1}, seed) or "extra" in config
    assert digest(config, seed) != digest(config, seed + 1)
