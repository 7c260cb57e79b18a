"""The mirror: believed in nothing, made good when it failed, and never a reason to stop."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rldecoder.artifacts.manifests import write_manifest
from rldecoder.artifacts.mirror import Mirror
from rldecoder.artifacts.store import ArtifactStore, FileEntry
from rldecoder.errors import BadInputError, NoResourceError
from tests.artifacts.published import REF, manifest, publish
from tests.artifacts.test_manifests import HOSTILE


class Told:
    """Keeps notes and alerts."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.alerts: list[str] = []


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror that has the artifact, uploaded from the store `a`."""
    publish(ArtifactStore(tmp_path / "a", mirror=(tmp_path / "mirror").as_uri()))
    return tmp_path / "mirror" / "ingest" / REF.digest


def existing(root: Path, told: Told, url: str | None = None) -> Any:
    """What a run with this store finds."""
    store = ArtifactStore(root, mirror=url or (root.parent / "mirror").as_uri())
    return store.existing(REF, told.notes.append, told.alerts.append)


def test_another_machine_gets_the_artifact(tmp_path: Path, mirror: Path, told: Told) -> None:
    (mirror / "evil.py").write_text("x")  # no manifest names these
    (mirror / "secret").symlink_to("/etc/hostname")
    os.mkfifo(mirror / "pipe")
    assert existing(tmp_path / "b", told) is not None
    here = tmp_path / "b" / "ingest" / REF.digest
    found = {p.relative_to(here).as_posix() for p in here.rglob("*") if p.is_file()}
    assert found == {"manifest.json", "sub/file.bin"}
    assert (here / "sub" / "file.bin").read_bytes() == b"hello"
    assert ["fetched" in note for note in told.notes] == [True]
    assert told.alerts == []


def test_what_is_damaged_here_is_healed_from_there(
    tmp_path: Path, mirror: Path, told: Told
) -> None:
    (tmp_path / "a" / "ingest" / REF.digest / "sub" / "file.bin").write_bytes(b"hellO")
    assert existing(tmp_path / "a", told) is not None
    assert len(told.notes) == 2


def spoil(mirror: Path, how: str) -> None:
    """Damage the mirror's copy."""
    file = mirror / "sub" / "file.bin"
    if how == "flipped":
        file.write_bytes(b"hellO")
    elif how == "longer":
        file.write_bytes(b"hello!")
    elif how == "missing":
        file.unlink()
    elif how == "link":
        shutil.copy(file, mirror / "same")
        file.unlink()
        file.symlink_to(mirror / "same")
    elif how == "pipe":
        file.unlink()
        os.mkfifo(file)
    elif how == "verdict":
        path = mirror / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "pass"}))
    elif how == "not json":
        (mirror / "manifest.json").write_text("{")
    else:
        write_manifest(mirror, manifest(files={how: FileEntry(size=0, sha256="0" * 64)}))


@pytest.mark.parametrize(
    "how",
    ["flipped", "longer", "missing", "link", "pipe", "verdict", "not json", *HOSTILE],
)
def test_a_damaged_copy_is_not_taken_and_is_mended(
    tmp_path: Path, mirror: Path, told: Told, how: str
) -> None:
    spoil(mirror, how)
    assert existing(tmp_path / "b", told) is None
    assert told.notes[-1].endswith("It is built here instead.")
    assert not (tmp_path / "b" / "ingest" / REF.digest).exists()
    publish(ArtifactStore(tmp_path / "b", mirror=(tmp_path / "mirror").as_uri()))
    assert existing(tmp_path / "c", told) is not None


def test_another_artifact_in_its_place_is_not_taken(
    tmp_path: Path, mirror: Path, told: Told
) -> None:
    write_manifest(mirror, manifest(seed=2))
    assert existing(tmp_path / "b", told) is None


@pytest.mark.parametrize("left", ["nothing", "files", "half a manifest"])
def test_an_upload_that_failed_is_made_good_by_the_next_run(
    tmp_path: Path, mirror: Path, told: Told, left: str
) -> None:
    if left == "nothing":
        shutil.rmtree(mirror)
    elif left == "files":
        (mirror / "manifest.json").unlink()
        (mirror / "sub" / "file.bin").write_bytes(b"hel")
    else:
        (mirror / "manifest.json").write_bytes((mirror / "manifest.json").read_bytes()[:100])
    assert existing(tmp_path / "a", told) is not None
    assert existing(tmp_path / "b", told) is not None
    assert told.alerts == []


def test_an_upload_writes_through_no_link(tmp_path: Path, mirror: Path, told: Told) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (mirror / "manifest.json").unlink()
    (mirror / "sub" / "file.bin").unlink()
    (mirror / "sub" / "file.bin").symlink_to(victim)
    assert existing(tmp_path / "a", told) is not None
    assert victim.read_text() == "precious"
    assert existing(tmp_path / "b", told) is not None


@pytest.mark.parametrize("url", ["ftp://user:hunter2@127.0.0.1:9/y", "file:///proc/none/x"])
def test_a_mirror_that_fails_is_an_alert_that_names_it(
    tmp_path: Path, told: Told, url: str
) -> None:
    store = ArtifactStore(tmp_path, mirror=url)
    assert store.existing(REF, told.notes.append, told.alerts.append) is None
    with store.building(REF) as folder:
        (folder / "file.bin").write_bytes(b"hello")
        store.publish(REF, folder, manifest(), told.alerts.append)
    assert store.verify(REF)
    assert existing(tmp_path, told, url) is not None
    assert 1 <= len(told.alerts) <= 2  # one a run: a server that is down costs one time-out
    shown = url.replace("user:hunter2", "***")
    assert all(shown in alert and "hunter2" not in alert for alert in told.alerts)


@pytest.mark.parametrize("url", ["/", "file://", "file:///", " ", "s3://", "memory://"])
def test_a_mirror_is_no_whole_disk(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadInputError, match="names no folder"):
        ArtifactStore(tmp_path, mirror=url)


def test_an_unknown_protocol_is_refused_without_its_password() -> None:
    with pytest.raises(NoResourceError, match=r"nope://\*\*\*@x/y") as found:
        Mirror("nope://user:hunter2@x/y", Path())
    assert "hunter2" not in str(found.value)
