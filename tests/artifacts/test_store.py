"""Digests, publication, verification, locks and damage."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import textwrap
import time
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
    Manifest,
    artifact_digest,
)
from rldecoder.artifacts.unsealed import LIST_FILE
from rldecoder.config.data import IngestConfig
from rldecoder.errors import DamagedFileError, NoResourceError, StoreBusyError

FIELDS = {"size": 3}
ORIGIN: dict[str, Any] = {"version": 1, "seed": 1, "inputs": {}, "fingerprint": {"text": "a"}}
REF = ArtifactRef(
    kind="tokens",
    stage="ingest",
    digest=artifact_digest(stage="ingest", config=FIELDS, **ORIGIN),
)


def manifest(ref: ArtifactRef = REF, **changes: Any) -> Manifest:
    """A manifest as the runner would hand it in: no files yet."""
    values: dict[str, Any] = {
        "kind": ref.kind, "stage": ref.stage, "digest": ref.digest, **ORIGIN,
        "config": {**FIELDS, "workers": 1}, "digest_fields": FIELDS, "files": {},
        "metrics": {"n": 1}, "source_digest": "s", "git_commit": None, "packages": {},
        "device": "cpu", "device_name": "cpu", "threads": 1, "wall_seconds": 0.0,
        "peak_memory_bytes": 0, "resumed": False, "created_at": "2026-01-01", "verdict": "fail",
    }  # fmt: skip
    return Manifest(**(values | changes))


def publish(store: ArtifactStore, content: bytes = b"hello") -> Path:
    """Publish one artifact with one file in a subfolder."""
    with store.building(REF) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file.bin").write_bytes(content)
        store.publish(REF, folder, manifest())
    return store.path(REF) / "sub" / "file.bin"


def test_published_artifact_verifies_and_progress_is_cleared(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.progress_path(REF).mkdir(parents=True)
    publish(store)
    assert store.is_published(REF)
    assert ArtifactStore(tmp_path).verify(REF).files["sub/file.bin"].size == 5
    assert not store.progress_path(REF).exists()
    assert not list((tmp_path / "ingest").glob("*.building"))


def test_failed_build_leaves_nothing_but_checkpoints(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.progress_path(REF).mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), store.building(REF) as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert not store.is_published(REF)
    assert sorted(p.name for p in (tmp_path / "ingest").iterdir()) == [f"{REF.digest}.progress"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_found_moved_aside_and_rebuilt(tmp_path: Path, damage: str) -> None:
    file = publish(ArtifactStore(tmp_path))
    if damage == "truncate":
        file.write_bytes(b"hel")
    elif damage == "flip":
        file.write_bytes(b"hellO")
    else:
        file.unlink()
    store = ArtifactStore(tmp_path)
    with pytest.raises(DamagedFileError):
        store.verify(REF)
    notes: list[str] = []
    assert store.existing(REF, notes.append) is None
    assert "moved to" in notes[0].replace("\n", " ")
    assert len(list((tmp_path / "ingest").glob("*.damaged-*"))) == 1
    publish(store)
    assert store.existing(REF, notes.append) is not None


def test_damage_after_verification_in_the_same_process_is_found(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    file = publish(store)
    store.verify(REF)
    time.sleep(0.01)
    file.write_bytes(b"HELLO")
    with pytest.raises(DamagedFileError):
        store.verify(REF)


def test_full_disk_says_so_and_publishes_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(NoResourceError, match="is full"), store.building(REF):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not store.is_published(REF)


def test_unreadable_manifest_is_damage(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    (store.path(REF) / "manifest.json").write_text("{")
    with pytest.raises(DamagedFileError):
        store.manifest(REF)


def test_lock_excludes_and_times_out(tmp_path: Path) -> None:
    first, second = ArtifactStore(tmp_path), ArtifactStore(tmp_path, lock_timeout_seconds=0.1)
    waits: list[str] = []
    with first.lock(REF, waits.append):
        with pytest.raises(StoreBusyError), second.lock(REF, waits.append):
            pytest.fail("two holders")
        assert len(waits) == 1
    with second.lock(REF, waits.append):
        assert len(waits) == 1


def test_lock_of_a_killed_holder_is_free(tmp_path: Path) -> None:
    code = textwrap.dedent(f"""
        import time
        from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
        ref = ArtifactRef(kind="tokens", stage="ingest", digest="{REF.digest}")
        with ArtifactStore({str(tmp_path)!r}).lock(ref, print):
            print("held", flush=True)
            time.sleep(60)
    """)
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"
    store = ArtifactStore(tmp_path, lock_timeout_seconds=0.1)
    with pytest.raises(StoreBusyError), store.lock(REF, lambda _: None):
        pytest.fail("two holders")
    holder.kill()
    holder.wait()
    with store.lock(REF, lambda _: None):
        assert True


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    file = publish(ArtifactStore(tmp_path), random.Random(0).randbytes(200))
    folder = file.parents[1]
    for path in (file, folder / "manifest.json"):
        whole, rng = path.read_bytes(), random.Random(path.name)
        for _ in range(500):
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(DamagedFileError):
                ArtifactStore(tmp_path).verify(REF)
        path.write_bytes(whole)
    assert ArtifactStore(tmp_path).verify(REF).verdict == "fail"


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a manifest as a person with an editor would."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2, sort_keys=True))


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


@pytest.mark.parametrize("how", ["link", "pipe", "folder"])
def test_only_regular_files_count(tmp_path: Path, how: str) -> None:
    file = publish(ArtifactStore(tmp_path))
    (tmp_path / "same").write_bytes(file.read_bytes())
    file.unlink()
    if how == "link":
        file.symlink_to(tmp_path / "same")
    elif how == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(DamagedFileError):
        ArtifactStore(tmp_path).verify(REF)
    assert ArtifactStore(tmp_path).existing(REF, lambda _: None) is None


def test_what_was_never_published_is_refused_and_moved_out(tmp_path: Path) -> None:
    folder = publish(ArtifactStore(tmp_path)).parents[1]
    (folder / "sub" / "file-2.bin").write_bytes(b"more")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder)
    store, notes = ArtifactStore(tmp_path), list[str]()
    with pytest.raises(DamagedFileError, match="never published"):
        store.verify(REF)
    assert store.existing(REF, notes.append) is not None
    assert len(notes) == 3
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*")} == {
        "manifest.json", "sub", "sub/file.bin",
    }  # fmt: skip
    [out] = folder.parent.glob("*.unpublished-*")
    assert (out / "sub" / "file-2.bin").read_bytes() == b"more"


@pytest.mark.parametrize("name", ["", ".progress", ".building"])
@pytest.mark.parametrize("what", ["file", "folder", "link"])
def test_nothing_in_the_way_blocks_publication(tmp_path: Path, name: str, what: str) -> None:
    store, notes = ArtifactStore(tmp_path), list[str]()
    place = store.path(REF).with_name(REF.digest + name)
    place.parent.mkdir()
    if what == "file":
        place.write_text("a file")
    elif what == "folder":
        place.mkdir()
        (place / "half").write_text("x")
    else:
        place.symlink_to("/nowhere")
    assert store.existing(REF, notes.append) is None
    store.make_progress(REF, notes.append)
    publish(store)
    assert ArtifactStore(tmp_path).verify(REF)


def test_files_in_place_of_the_folders_of_stage_and_locks(tmp_path: Path) -> None:
    (tmp_path / "ingest").write_text("a file")
    (tmp_path / ".locks").write_text("a file")
    store, notes = ArtifactStore(tmp_path), list[str]()
    with store.lock(REF, notes.append):
        assert store.existing(REF, notes.append) is None
        publish(store)
    assert len(notes) == 2
    assert len(list(tmp_path.glob("*.damaged-*"))) == 2


def test_a_lock_that_is_a_link_empties_no_file(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    store = ArtifactStore(tmp_path / "store")
    (store.root / ".locks").mkdir()
    (store.root / ".locks" / f"ingest-{REF.digest}.lock").symlink_to(victim)
    notes: list[str] = []
    with store.lock(REF, notes.append):
        assert "no lock file" in notes[0]
    assert victim.read_text() == "precious"


def test_a_read_only_store_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *arguments: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    store = ArtifactStore(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NoResourceError, match="cannot be written to"), store.lock(REF, print):
        pytest.fail("locked")
    with pytest.raises(NoResourceError, match="cannot be written to"):
        store.make_progress(REF, print)
    with pytest.raises(NoResourceError, match="cannot be written to"), store.building(REF):
        pytest.fail("built")


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=4), st.integers(0, 9))
def test_digest_depends_on_content_not_on_order(config: dict[str, int], seed: int) -> None:
    def digest(values: dict[str, int], seed: int) -> str:
        return artifact_digest(
            stage="s", version=1, config=values, seed=seed, fingerprint={}, inputs={}
        )

    assert digest(config, seed) == digest(dict(reversed(config.items())), seed)
    assert digest(config, seed) != digest({**config, "extra": 1, "": -1}, seed) or "extra" in config
    assert digest(config, seed) != digest(config, seed + 1)
