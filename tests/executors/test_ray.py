"""A real Ray cluster of two nodes on the loopback: the same bytes, also when a node is killed."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rldecoder.artifacts.store import ArtifactRef
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.devices import FAKE_DEVICES, LEASE_FOLDER, lease_device
from rldecoder.errors import NoResourceError
from rldecoder.executors.ray_cluster import IN_FLIGHT
from rldecoder.reporting import SilentReporter
from rldecoder.runner import StageRun, plan, run_stage, store_for
from tests.executors.cluster import LoopbackCluster, loopback_cluster

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SHARDED = ("cache_activations", "label_features")
"""Stages of the debug run whose shards go to the cluster."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackCluster]:
    """Two nodes of one core and one pretended accelerator; nothing is computed at their head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAKE_DEVICES, "GPU-a,GPU-b")
        patch.setenv(LEASE_FOLDER, str(tmp_path_factory.mktemp("leases")))
        with loopback_cluster() as cluster:
            for _ in range(2):
                cluster.add(cpus=1, gpus=1)
            yield cluster


def configured(*overrides: str) -> RunConfig:
    return load_run_config("configs/debug.yaml", ["threads=1", *overrides])


def on(cluster: LoopbackCluster, **settings: object) -> list[str]:
    values = {"type": "ray", "address": cluster.address} | settings
    return [f"executor.{name}={value}" for name, value in values.items()]


def part_of(debug_store: Path, store: Path, refs: dict[str, ArtifactRef], stage: str) -> Path:
    """A store with what stages before this one published."""
    for name, ref in refs.items():
        if name == stage:
            return store
        shutil.copytree(debug_store / name / ref.digest, store / name / ref.digest)
    raise AssertionError(stage)


def build(config: RunConfig, store: Path, stage: str, report: SilentReporter) -> StageRun:
    return run_stage(
        config, stage, plan(config), store=store_for(config, store), report=report, device="cpu"
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("stage", SHARDED)
def test_a_cluster_publishes_the_bytes_of_one_process(
    stage: str, cluster: LoopbackCluster, debug_store: Path, tmp_path: Path
) -> None:
    config = configured(*on(cluster))
    store = part_of(debug_store, tmp_path / "store", plan(config), stage)
    result = build(config, store, stage, SilentReporter())
    assert not result.reused
    published, expected = (s / stage / result.ref.digest for s in (store, debug_store))
    assert content(published) == content(expected)


def test_a_killed_node_costs_the_shards_in_flight(
    cluster: LoopbackCluster, debug_store: Path, tmp_path: Path
) -> None:
    """One worker, on either node; that node is killed -9 when some shards are done."""
    small, stage = "cache_activations.shard_tokens=256", "cache_activations"
    alone = configured(small)
    here = part_of(debug_store, tmp_path / "here", plan(alone), stage)
    expected = build(alone, here, stage, SilentReporter())

    config = configured(small, *on(cluster, workers=1, gpus=1))
    there = part_of(debug_store, tmp_path / "there", plan(config), stage)
    progress = there / stage / f"{expected.ref.digest}.progress"
    killed = Killer(cluster, progress)
    killed.start()
    report = SilentReporter()
    result = build(config, there, stage, report)
    killed.join()

    assert result.ref == expected.ref
    published = there / stage / result.ref.digest
    assert content(published) == content(here / stage / result.ref.digest)
    assert killed.inodes, killed.problem
    # What was finished before is the file that was written then; of the rest little was begun.
    now = {path.name: path.stat().st_ino for path in published.glob("*.parquet")}
    again = [name for name, inode in killed.inodes.items() if now[name] != inode]
    assert again == []
    (lost,) = [note for note in report.notes if "was lost" in note]
    assert 1 <= lost.count(".parquet") <= IN_FLIGHT
    # While the worker lived no run without Ray got its device.
    assert "GPU-a" in killed.taken


class Killer(threading.Thread):
    """Kills the node whose worker has finished some shards."""

    def __init__(self, cluster: LoopbackCluster, progress: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.progress = cluster, progress
        self.inodes: dict[str, int] = {}
        self.taken, self.problem = "", "no shard was finished in time"

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(list(self.progress.glob("*.seal"))) >= 3:
                break
            time.sleep(0.01)
        (node,) = [n for n in self.cluster.cluster.worker_nodes if self.cluster.workers(n)]
        # Stopped first, so that what is finished is known.
        for worker in self.cluster.workers(node):
            worker.suspend()
        finished = [path.with_suffix("") for path in self.progress.glob("*.seal")]
        try:
            with lease_device("GPU-a", timeout_seconds=0):
                self.taken = "by nobody"
        except NoResourceError as error:
            self.taken = str(error)
        gone = self.cluster.kill(node)
        psutil.wait_procs([psutil.Process(p) for p in gone if psutil.pid_exists(p)], timeout=10)
        self.inodes = {path.name: path.stat().st_ino for path in finished}
        self.problem = ""
