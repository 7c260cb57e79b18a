"""Digests, publication, verification, locks and damage."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from rldecoder.artifacts.store import (
    ArtifactStore,
)
from rldecoder.errors import DamagedFileError, NoResourceError, StoreBusyError
from tests.artifacts.published import REF, publish


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
