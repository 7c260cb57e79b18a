"""A store in a bucket: what is published is whole, read only if undamaged, and built once."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rldecoder.artifacts.bucket import Bucket
from rldecoder.artifacts.manifests import MANIFEST
from rldecoder.artifacts.remote import RemoteStore
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore, artifact_digest
from rldecoder.config.store import S3Config
from rldecoder.errors import (
    BadInputError,
    DamagedFileError,
    NoResourceError,
    RlDecoderError,
    StoreBusyError,
)
from tests.artifacts.conftest import Opener
from tests.artifacts.published import FIELDS, ORIGIN, REF, manifest, publish
from tests.artifacts.s3_server import SECRET, Proxy


def numbered(number: int) -> tuple[ArtifactRef, dict[str, Any]]:
    """A reference and what its digest is of."""
    origin = {**ORIGIN, "seed": number}
    digest = artifact_digest(stage="ingest", config=FIELDS, **origin)
    return ArtifactRef(kind="tokens", stage="ingest", digest=digest), origin


def build(store: ArtifactStore, number: int, content: bytes, files: int = 1) -> ArtifactRef:
    """Publish an artifact of some files under its lock, as the runner does."""
    ref, origin = numbered(number)
    with store.lock(ref, print), store.building(ref) as folder:
        for index in range(files):
            (folder / f"part-{index}.bin").write_bytes(content + bytes([index]))
        store.publish(ref, folder, manifest(ref, **origin))
    return ref


def keys(store: RemoteStore) -> list[str]:
    """All objects of the store."""
    bucket = store._bucket
    answer = bucket._client.list_objects_v2(Bucket=bucket.name)
    return sorted(row["Key"] for row in answer.get("Contents", []))


def test_another_machine_reads_what_was_published(machine: Opener, bucket: str) -> None:
    a, b = machine("a"), machine("b")
    assert not b.is_published(REF)
    assert b.existing(REF, print) is None
    file = publish(a)
    assert b.is_published(REF)
    assert b.manifest(REF).files.keys() == {"sub/file.bin"}
    assert not (b.path(REF)).exists()  # a look fetches nothing
    assert b.looked_at(REF) == a.manifest(REF)

    notes: list[str] = []
    assert b.existing(REF, notes.append) == a.verify(REF)
    assert [f"fetched from {bucket}" in note for note in notes] == [True]
    assert (b.path(REF) / "sub" / "file.bin").read_bytes() == file.read_bytes() == b"hello"
    prefix = f"some/prefix/ingest/{REF.digest}"
    (sha256,) = (entry.sha256 for entry in b.manifest(REF).files.values())
    assert keys(a) == [f"{prefix}/files/{sha256}", f"{prefix}/{MANIFEST}"]
    # And so does one that only opens it.
    assert machine("c").verify(REF) == a.manifest(REF)


def test_faults_at_a_tenth_of_the_requests(machine: Opener, proxy: Proxy) -> None:
    """Bodies cut short, bytes flipped, answers lost, errors: what arrives is what was published."""
    proxy.rates = {"error": 0.02, "slow": 0.01, "drop": 0.02, "lost": 0.02, "truncate": 0.02,
                   "flip": 0.01}  # fmt: skip
    a, b = machine("a", part_bytes=5 << 20), machine("b")
    large = os.urandom(11 << 20)
    refs = [build(a, number, bytes([number]) * 1000, files=4) for number in range(12)]
    refs.append(build(a, 99, large))
    for ref in refs:
        with b.lock(ref, print):
            assert b.existing(ref, print) == a.manifest(ref)
    assert (b.path(refs[-1]) / "part-0.bin").read_bytes() == large + b"\0"
    assert sum(proxy.put_in.values()) > 15
    assert len(proxy.put_in) >= 4
    assert any("uploadId" in path for _, path in proxy.requests)  # in parts
    # The manifest is the last of an artifact's writes.
    for ref in refs:
        writes = [path for verb, path in proxy.requests if verb == "PUT" and str(ref) in path]
        first = next(i for i, path in enumerate(writes) if MANIFEST in path)
        assert not any("/files/" in path for path in writes[first:])


@pytest.mark.parametrize("what", ["file", "short", "missing", "manifest", "seal"])
def test_what_is_damaged_in_the_bucket_is_not_read(machine: Opener, what: str) -> None:
    a, b = machine("a"), machine("b")
    publish(a)
    (file,) = (key for key in keys(a) if "/files/" in key)
    (record,) = (key for key in keys(a) if key.endswith(MANIFEST))
    client, name = a._bucket._client, a._bucket.name
    if what == "file":
        client.put_object(Bucket=name, Key=file, Body=b"hellO")
    elif what == "short":
        client.put_object(Bucket=name, Key=file, Body=b"hel")
    elif what == "missing":
        client.delete_object(Bucket=name, Key=file)
    else:
        data = client.get_object(Bucket=name, Key=record)["Body"].read()
        old, new = (b'"n": 1', b'"n": 2') if what == "seal" else (data, b"{}")
        client.put_object(Bucket=name, Key=record, Body=data.replace(old, new))

    with pytest.raises(DamagedFileError):
        b.verify(REF)
    assert not b.path(REF).exists()
    # Who builds moves it out of the way, and all find the new one.
    notes: list[str] = []
    with b.lock(REF, print):
        assert b.existing(REF, notes.append) is None
        assert "built here instead" in notes[-1]
        publish(b)
    assert machine("c").existing(REF, print) is not None
    assert any(".damaged-" in key for key in keys(a))


def test_what_is_damaged_here_comes_from_there_and_the_other_way(machine: Opener) -> None:
    a = machine("a")
    file = publish(a)
    file.write_bytes(b"hellO")
    notes: list[str] = []
    with a.lock(REF, print):
        assert a.existing(REF, notes.append) is not None
    assert file.read_bytes() == b"hello"
    assert "damaged" in notes[0]
    # A copy without a manifest is none, whatever the bucket has.
    (a.path(REF) / MANIFEST).unlink()
    with a.lock(REF, print):
        assert a.existing(REF, notes.append) is not None
    # And an emptied bucket is filled again.
    for key in keys(a):
        a._bucket._client.delete_object(Bucket=a._bucket.name, Key=key)
    with a.lock(REF, print):
        assert a.existing(REF, notes.append) is not None
    assert machine("b").verify(REF) == a.manifest(REF)


def test_of_two_that_publish_at_once_all_read_the_first(machine: Opener) -> None:
    """A lock can be lost; files are named by content, so that theirs are never mixed."""
    a, b = machine("a"), machine("b")
    notes: list[str] = []
    with b.building(REF) as folder:
        (folder / "file.bin").write_bytes(b"rounded otherwise")
        publish(a)  # meanwhile
        taken = b.publish(REF, folder, manifest(), notes.append)
    assert "published by another run meanwhile" in notes[0]
    assert taken == a.manifest(REF) == b.verify(REF)
    assert (b.path(REF) / "sub" / "file.bin").read_bytes() == b"hello"


def test_two_machines_build_each_artifact_once(machine: Opener, proxy: Proxy) -> None:
    proxy.rates = {"error": 0.03, "drop": 0.03, "lost": 0.04}
    built: list[tuple[str, int]] = []
    failures: list[BaseException] = []

    def work(name: str) -> None:
        store = machine(name)
        try:
            for number in range(8):
                ref, origin = numbered(number)
                with store.lock(ref, lambda text: None):
                    if store.existing(ref, lambda text: None) is None:
                        with store.building(ref) as folder:
                            (folder / "who").write_text(name)
                            built.append((name, number))
                            time.sleep(0.05)
                            store.publish(ref, folder, manifest(ref, **origin))
                store.verify(ref)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(number for _, number in built) == list(range(8))


def test_a_lock_survives_no_holder(machine: Opener) -> None:
    # Long enough that a busy machine is not taken for a dead one; the wait costs nothing.
    a, b = machine("a", lease_seconds=4.0), machine("b", lease_seconds=4.0)
    # Left by a machine that lost its power.
    a._bucket.write_new(f".locks/ingest-{REF.digest}.json", b'{"token": "x", "host": "gone"}')
    notes: list[str] = []
    begun = time.monotonic()
    with b.lock(REF, notes.append):
        assert time.monotonic() - begun >= 4.0
        assert "'gone' gives no sign of life" in notes[-1]
        # One that lives keeps it, for as long as it takes.
        a.lock_timeout_seconds = 6.0
        with (
            pytest.raises(StoreBusyError, match="still being built by another run"),
            a.lock(REF, notes.append),
        ):
            pass
    waited = len(notes)
    with a.lock(REF, notes.append):  # given back, so nobody waits
        assert len(notes) == waited


def test_a_beat_whose_answer_was_lost_was_a_beat(machine: Opener) -> None:
    """What stands there is newer than the holder knows, and still its own."""
    a = machine("a", lease_seconds=0.4)
    key = f".locks/ingest-{REF.digest}.json"
    notes: list[str] = []
    with a.lock(REF, notes.append):
        found = a._bucket.read(key)
        assert found is not None
        unheard = found.data.replace(b'"beats": ', b'"beats": 77')
        while a._bucket.write_over(key, unheard, found.etag) is None:
            found = a._bucket.read(key)
            assert found is not None
        deadline = time.monotonic() + 60
        while (again := a._bucket.read(key)) is not None and again.data == unheard:
            assert time.monotonic() < deadline, "it beats no more"
    assert notes == []
    freed = a._bucket.read(key)
    assert freed is not None
    assert b"null" in freed.data


def test_a_server_that_ignores_conditions_is_refused(machine: Opener, proxy: Proxy) -> None:
    proxy.blind = True
    with pytest.raises(BadInputError, match="no conditional writes"):
        publish_locked(machine("a"))
    proxy.blind = False
    assert not machine("b").is_published(REF)


def publish_locked(store: RemoteStore) -> None:
    """Publish as the runner does."""
    with store.lock(REF, print):
        publish(store)


def test_copies_used_longest_ago_go_first_and_never_those_in_use(
    machine: Opener, tmp_path: Path
) -> None:
    writer = machine("w")
    refs = [build(writer, number, os.urandom(20_000)) for number in range(4)]
    store = machine("a", cache_bytes=50_000)

    def here() -> list[int]:
        return [i for i, ref in enumerate(refs) if store.path(ref).exists()]

    with store.session():
        store.verify(refs[0])
    time.sleep(0.02)
    with store.session():
        store.verify(refs[1])
        time.sleep(0.02)
    with store.session():
        store.verify(refs[0])  # used again, so 1 is the one of longest ago
    with store.session():
        store.verify(refs[2])
    assert here() == [0, 2]

    # What a killed process was removing goes, too.
    rest = store.path(refs[1]).with_name("0123.gone-1")
    rest.mkdir()
    other = machine("a", cache_bytes=50_000)  # another process of the same machine
    other.verify(refs[0])
    other.verify(refs[2])
    with store.session():
        store.verify(refs[3])
    assert not rest.exists()
    assert here() == [0, 2, 3]  # over the limit, rather than out of somebody's hands
    other._copies.release(other._copies.used)
    with store.session():
        store.verify(refs[1])
    assert len(here()) == 2
    assert 1 in here()


def test_what_the_bucket_has_not_got_stays(machine: Opener, proxy: Proxy) -> None:
    store = machine("a", cache_bytes=1000, attempts=1)
    proxy.rates = {"error": 1.0}
    with pytest.raises(NoResourceError, match="fails"), store.session():
        publish(store, b"x" * 2000)
    proxy.quiet()
    with store.session():
        build(store, 7, b"y" * 2000)
    assert (store.path(REF) / MANIFEST).exists()
    with store.session(), store.lock(REF, print):
        assert store.existing(REF, print) is not None  # uploads it now
    assert machine("b").is_published(REF)


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("denied", BadInputError, r"refuses access.*AccessDenied.*AWS_ACCESS_KEY_ID"),
        ("slow", NoResourceError, r"asks to slow down.*SlowDown to 2 attempts"),
        ("error", NoResourceError, r"fails.*500 to 2 attempts"),
        ("drop", NoResourceError, r"cannot be reached.*at 2 attempts"),
        ("hang", NoResourceError, r"cannot be reached|does not send"),
    ],
)
def test_errors_say_what_to_do_and_no_secret(
    machine: Opener, proxy: Proxy, fault: str, error: type[RlDecoderError], words: str
) -> None:
    store = machine("a", attempts=2, timeout_seconds=0.3)
    proxy.rates = {fault: 1.0}
    with pytest.raises(error, match=words) as caught:
        store.existing(REF, print)
    with pytest.raises(error):  # never taken for an empty bucket
        store.is_published(REF)
    proxy.quiet()
    assert SECRET not in repr(caught.value) + str(caught.value.__context__ or "")
    assert sum(proxy.put_in.values()) <= 8  # a limit


def test_a_bucket_that_is_not_there(bucket: str, tmp_path: Path) -> None:
    store = RemoteStore("s3://no-such-bucket-at-all/x", S3Config(cache=tmp_path / "c"))
    with pytest.raises(BadInputError, match="no bucket no-such-bucket-at-all"):
        store.existing(REF, print)


def test_without_keys_or_server(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hunter2@127.0.0.1:9")
    gone = Bucket(bucket, S3Config(attempts=1))
    with pytest.raises(NoResourceError, match="cannot be reached") as caught:
        gone.read("x")
    assert "hunter2" not in str(caught.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(BadInputError, match="names no keys"):
        Bucket(bucket, S3Config()).read("x")
