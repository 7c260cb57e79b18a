"""Digests, publication, verification, locks and damage."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.artifacts.store import ArtifactRef, ArtifactStore, Manifest, artifact_digest
from rldecoder.errors import DamagedFileError, NoResourceError, StoreBusyError

REF = ArtifactRef(kind="tokens", stage="ingest", digest="0123456789abcdef")


def manifest(ref: ArtifactRef = REF) -> Manifest:
    """A manifest as the runner would hand it in: no files yet."""
    return Manifest(
        kind=ref.kind, stage=ref.stage, digest=ref.digest, version=1, config={}, seed=1,
        inputs={}, fingerprint={}, files={}, metrics={"n": 1}, source_digest="s",
        git_commit=None, packages={}, device="cpu", device_name="cpu", threads=1,
        wall_seconds=0.0, peak_memory_bytes=0, resumed=False, created_at="2026-01-01",
    )  # fmt: skip


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
    assert "moved to" in notes[0]
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


def test_mirror_gives_another_machine_the_artifact(tmp_path: Path) -> None:
    url = (tmp_path / "mirror").as_uri()
    publish(ArtifactStore(tmp_path / "a", mirror=url))
    other = ArtifactStore(tmp_path / "b", mirror=url)
    notes: list[str] = []
    assert other.existing(REF, notes.append) is not None
    assert (other.path(REF) / "sub" / "file.bin").read_bytes() == b"hello"
    assert "fetched" in notes[0]


@given(st.dictionaries(st.text(max_size=5), st.integers(), max_size=4), st.integers(0, 9))
def test_digest_depends_on_content_not_on_order(config: dict[str, int], seed: int) -> None:
    def digest(values: dict[str, int], seed: int) -> str:
        return artifact_digest(
            stage="s", version=1, config=values, seed=seed, fingerprint={}, inputs={}
        )

    assert digest(config, seed) == digest(dict(reversed(config.items())), seed)
    assert digest(config, seed) != digest({**config, "extra": 1, "": -1}, seed) or "extra" in config
    assert digest(config, seed) != digest(config, seed + 1)
