"""Devices and leases, with pretended devices and real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rldecoder import devices
from rldecoder.devices import LEASE_FOLDER, DeviceInfo, lease_device, list_devices
from rldecoder.errors import BadInputError, NoResourceError

GIB = 1 << 30


def fake(index: int, free: int = 8 * GIB) -> DeviceInfo:
    return DeviceInfo(index, f"GPU-{index}-fake", "pretended", 8 * GIB, free, 0, fake=True)


def two() -> list[DeviceInfo]:
    return [fake(0), fake(1)]


HOLDER = """
import sys, time
from pathlib import Path
from rldecoder.devices import lease_device
with lease_device("cuda", Path(sys.argv[1]), task="holder") as lease:
    print(lease.uuids[0], flush=True)
    time.sleep(60)
"""

WORKER = """
import os, sys, time
from pathlib import Path
from rldecoder.devices import lease_device
folder, log = Path(sys.argv[1]), Path(sys.argv[2])
with lease_device("cuda", folder, timeout_seconds=60) as lease:
    mark = log / lease.uuids[0]
    os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # fails when someone shares the device
    time.sleep(0.3)
    mark.unlink()
"""


def spawn(code: str, *arguments: Path) -> subprocess.Popen[str]:
    env = {**os.environ, devices.FAKE_DEVICES: "GPU-a,GPU-b"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_pretended_devices_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.FAKE_DEVICES, "GPU-x, GPU-y")
    assert [d.uuid for d in list_devices()] == ["GPU-x", "GPU-y"]
    monkeypatch.setenv(devices.FAKE_DEVICES, "")
    assert list_devices() == []


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-1", [1]),
        ("", []),
        ("0,9,1", [0]),  # CUDA stops at the first entry that it cannot resolve
        ("0,0", [0]),
    ],
)
def test_cuda_visible_devices_has_the_last_word(setting: str | None, expected: list[int]) -> None:
    assert [d.index for d in devices._visible(two(), setting)] == expected


def test_auto_falls_back_to_the_cpu_with_one_line(tmp_path: Path) -> None:
    said: list[str] = []
    with lease_device("auto", tmp_path, say=said.append, lister=list) as lease:
        assert (lease.device, lease.uuids, dict(lease.env)) == ("cpu", (), {})
    assert len(said) == 1
    assert "Running on the CPU" in said[0]


def test_cpu_is_never_leased_and_says_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with lease_device("cpu", tmp_path / "locks", say=said.append, lister=two) as lease:
        assert lease.uuids == ()
    assert said == []
    assert not (tmp_path / "locks").exists()


def test_cuda_without_a_device_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(BadInputError, match="Set device to cpu"),
        lease_device("cuda", tmp_path, lister=list),
    ):
        pass


@pytest.mark.parametrize("wanted", ["GPU-7", "GPU-", "tpu"])
def test_a_name_that_is_not_one_device_is_an_error(wanted: str, tmp_path: Path) -> None:
    with (
        pytest.raises(BadInputError, match="GPU-0-fake, GPU-1-fake"),
        lease_device(wanted, tmp_path, lister=two),
    ):
        pass


def test_two_leases_get_two_devices_and_a_third_waits_in_vain(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        lease_device("cuda", tmp_path, task="first", lister=two) as one,
        lease_device("auto", tmp_path, lister=two) as other,
    ):
        assert {*one.uuids, *other.uuids} == {"GPU-0-fake", "GPU-1-fake"}
        assert one.env == {"CUDA_VISIBLE_DEVICES": one.uuids[0]}
        with (
            pytest.raises(NoResourceError, match=r"first \(process \d+\)"),
            lease_device("cuda", tmp_path, timeout_seconds=0.3, say=said.append, lister=two),
        ):
            pass
    assert len(said) == 1
    with lease_device("GPU-0", tmp_path, timeout_seconds=0, lister=two) as again:
        assert again.uuids == ("GPU-0-fake",)


def test_several_are_taken_all_at_once_or_not_at_all(tmp_path: Path) -> None:
    with lease_device("cuda", tmp_path, count=2, lister=two) as both:
        assert set(both.uuids) == {"GPU-0-fake", "GPU-1-fake"}
        assert both.env == {"CUDA_VISIBLE_DEVICES": ",".join(both.uuids)}
        with (
            pytest.raises(NoResourceError, match="No device"),
            lease_device("cuda", tmp_path, timeout_seconds=0, lister=two),
        ):
            pass
    with lease_device("GPU-0", tmp_path, lister=two):
        with (
            pytest.raises(NoResourceError, match="Not 2 devices"),
            lease_device("cuda", tmp_path, count=2, timeout_seconds=0, lister=two),
        ):
            pass
        # The one that it could have had was let go.
        with lease_device("cuda", tmp_path, timeout_seconds=0, lister=two) as other:
            assert other.uuids == ("GPU-1-fake",)
    with (
        pytest.raises(BadInputError, match="3 devices are wanted at once, and 2 would do"),
        lease_device("cuda", tmp_path, count=3, lister=two),
    ):
        pass
    with lease_device("cpu", tmp_path, count=3, lister=two) as lease:
        assert lease.uuids == ()


def test_an_exception_frees_the_device(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lease_device("GPU-0", tmp_path, lister=two):
        raise RuntimeError
    with lease_device("GPU-0", tmp_path, timeout_seconds=0, lister=two):
        pass


def test_the_emptiest_device_is_taken_and_a_full_one_never(tmp_path: Path) -> None:
    crowded = [fake(0, free=2 * GIB), fake(1, free=6 * GIB), fake(2, free=GIB // 2)]
    with lease_device("auto", tmp_path, lister=lambda: crowded) as lease:
        assert lease.uuids == ("GPU-1-fake",)
    with (
        pytest.raises(NoResourceError, match="memory taken by others"),
        lease_device("GPU-2", tmp_path, timeout_seconds=0, lister=lambda: crowded),
    ):
        pass


def test_a_device_freed_by_a_stranger_is_noticed_while_waiting(tmp_path: Path) -> None:
    calls = iter([[fake(0, free=0)]] * 3 + [[fake(0)]] * 100)
    with lease_device("cuda", tmp_path, timeout_seconds=10, lister=lambda: next(calls)) as lease:
        assert lease.uuids == ("GPU-0-fake",)


def test_a_killed_holder_frees_its_device(tmp_path: Path) -> None:
    holder = spawn(HOLDER, tmp_path)
    try:
        assert holder.stdout is not None
        uuid = holder.stdout.readline().strip()
        device = [DeviceInfo(0, uuid, "pretended", GIB, GIB, 0, fake=True)]
        assert devices.device_rows(tmp_path, lambda: device)[0][-1].startswith("holder")
        with (
            pytest.raises(NoResourceError),
            lease_device(uuid, tmp_path, timeout_seconds=0, lister=lambda: device),
        ):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with lease_device(uuid, tmp_path, timeout_seconds=5, lister=lambda: device) as lease:
            assert lease.uuids == (uuid,)
    finally:
        holder.kill()
        holder.communicate()
    assert devices.device_rows(tmp_path, lambda: device)[0][-1] == "free"


def test_a_child_that_inherits_the_lock_keeps_the_device(tmp_path: Path) -> None:
    with lease_device("GPU-0", tmp_path, lister=two) as lease:
        assert lease.fds
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=lease.fds
        )
    try:
        with (
            pytest.raises(NoResourceError),
            lease_device("GPU-0", tmp_path, timeout_seconds=0, lister=two),
        ):
            pass
    finally:
        child.communicate(b"\n")
    with lease_device("GPU-0", tmp_path, timeout_seconds=0, lister=two):
        pass


def test_processes_never_share_a_device(tmp_path: Path) -> None:
    locks, log = tmp_path / "locks", tmp_path / "log"
    log.mkdir()
    started = time.monotonic()
    workers = [spawn(WORKER, locks, log) for _ in range(4)]
    codes = [worker.wait(60) for worker in workers]
    for worker in workers:
        worker.communicate()
    assert codes == [0, 0, 0, 0]
    assert time.monotonic() - started > 0.6  # four holds of 0.3 s on two devices


def test_snapshot_is_plain_json() -> None:
    snapshot = json.loads(devices.snapshot(two).model_dump_json())
    assert snapshot["cpu_count"] == os.cpu_count()
    assert [d["uuid"] for d in snapshot["devices"]] == ["GPU-0-fake", "GPU-1-fake"]


def test_the_table_ends_with_the_cpu(tmp_path: Path) -> None:
    rows = devices.device_rows(tmp_path, two)
    assert [row[0] for row in rows] == ["GPU-0-fake", "GPU-1-fake", "cpu"]
    assert rows[0][2:] == ("8.0 GiB of 8.0 GiB", "0 %", "free")


def refused(folder: Path, match: str) -> None:
    """Neither taking a lease nor looking at one goes past what lies there."""
    with (
        pytest.raises(BadInputError, match=match) as error,
        lease_device("GPU-0", folder, timeout_seconds=0, lister=two),
    ):
        pass
    assert LEASE_FOLDER in error.value.mend
    with pytest.raises(BadInputError, match=match):
        devices.device_rows(folder, two)


@pytest.mark.parametrize("exists", [True, False])
def test_a_lock_file_is_never_reached_through_a_link(tmp_path: Path, exists: bool) -> None:
    victim, locks = tmp_path / "victim", tmp_path / "locks"
    locks.mkdir(0o700)
    (locks / "GPU-0-fake.lock").symlink_to(victim)
    if exists:
        victim.write_text("precious")
    refused(locks, "It is a link")
    assert victim.exists() == exists
    assert not exists or victim.read_text() == "precious"


def test_a_lock_file_has_one_name_and_is_a_file(tmp_path: Path) -> None:
    victim, locks = tmp_path / "victim", tmp_path / "locks"
    locks.mkdir(0o700)
    victim.write_text("precious")
    file = locks / "GPU-0-fake.lock"
    file.hardlink_to(victim)
    refused(locks, "no regular file of yours")
    assert victim.read_text() == "precious"
    file.unlink()
    os.mkfifo(file)
    refused(locks, "no regular file of yours")


def test_a_folder_of_leases_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(0o700)
    link = tmp_path / "link"
    link.symlink_to(elsewhere)
    refused(link, "It is a link")
    assert not list(elsewhere.iterdir())
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    refused(shared, r"Other users may use it \(mode 1777\)")
    file = tmp_path / "file"
    file.touch()
    refused(file, "Not a directory")
    monkeypatch.setattr("rldecoder.lease_files.os.geteuid", lambda: os.getuid() + 1)
    refused(elsewhere, f"It belongs to user {os.getuid()}")


def test_the_default_folder_and_its_files_are_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEASE_FOLDER, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)
    try:
        with lease_device("GPU-0", timeout_seconds=0, lister=two):
            (folder,) = tmp_path.iterdir()
            (file,) = folder.iterdir()
            assert (folder.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    finally:
        os.umask(before)
    folder.chmod(0o750)
    with (
        pytest.raises(BadInputError, match="mode 0750"),
        lease_device("GPU-0", timeout_seconds=0, lister=two),
    ):
        pass
