"""A real Ray cluster of two nodes on the loopback: the same bytes, also when a node is killed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from rldecoder.artifacts.store import ArtifactRef
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.devices import FAKE_DEVICES, LEASE_FOLDER, lease_device
from rldecoder.errors import NoResourceError
from rldecoder.executors.ray_cluster import IN_FLIGHT
from rldecoder.interp import ablation_shards
from rldecoder.reporting import Bar, SilentBar, SilentReporter
from rldecoder.runner import StageRun, plan, run_stage, store_for
from tests.executors.cluster import LoopbackCluster, loopback_cluster

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SHARDED = ("cache_activations", "rank_features", "label_features", "evaluate")
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


SMALL = {
    "cache_activations": ["cache_activations.shard_tokens=256"],
    "label_features": [
        "label_features.batch_tokens=8", "label_features.num_features=4",
        "label_features.control_features=2", "label_features.control_tokens=512",
    ],
}  # fmt: skip
"""Many shards, and little else."""


@pytest.mark.parametrize(
    ("stage", "passes"),
    [
        ("cache_activations", ["cache_activations"]),
        ("label_features", ["encode label", "ablations, label-fit"]),
    ],
)
def test_a_killed_node_costs_the_shards_in_flight(
    stage: str, passes: list[str], cluster: LoopbackCluster, debug_store: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One worker, on either node; in each of these passes its node is killed -9."""
    monkeypatch.setattr(ablation_shards, "PLACES", 4)
    alone = configured(*SMALL[stage])
    here = part_of(debug_store, tmp_path / "here", plan(alone), stage)
    expected = build(alone, here, stage, SilentReporter())

    config = configured(*SMALL[stage], *on(cluster, workers=1, gpus=1))
    there = part_of(debug_store, tmp_path / "there", plan(config), stage)
    while len(cluster.nodes) < 2:
        cluster.add(cpus=1, gpus=1)
    report = KillingReporter(cluster, passes, there / stage / f"{expected.ref.digest}.progress")
    result = build(config, there, stage, report)

    assert result.ref == expected.ref
    published = there / stage / result.ref.digest
    assert content(published) == content(here / stage / result.ref.digest)
    # What was finished before is not done again; of the rest little was begun.
    losses = [note for note in report.notes if "was lost" in note]
    assert len(losses) == len(report.kills) == len(passes)
    for lost, kill in zip(losses, report.kills, strict=True):
        named = set(re.findall(r"[\w-]+\.(?:parquet|safetensors)", lost))
        assert len(named) <= IN_FLIGHT
        assert len(kill.finished) >= 3
        assert not named & set(kill.finished)
        # While the worker lived no run without Ray got its device.
        assert "GPU-a" in kill.taken
        for name, inode in kill.finished.items():
            if (published / name).exists():
                assert (published / name).stat().st_ino == inode


class Kill(NamedTuple):
    """What was so when a node was killed."""

    finished: dict[str, int]
    """Inodes of the finished shards."""
    taken: str
    """Who had the device."""


class KillingReporter(SilentReporter):
    """Kills the node of the worker when a pass has finished three shards, once a pass."""

    def __init__(self, cluster: LoopbackCluster, passes: list[str], progress: Path) -> None:
        super().__init__()
        self.cluster, self.progress, self.left = cluster, progress, list(passes)
        self.kills: list[Kill] = []

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """A bar that counts the shards, for the driver moves it on by one of them."""
        bar = CountingBar(self.kill)
        yield bar if description in self.left else SilentBar()
        if bar.moves:
            self.left.remove(description)

    def kill(self) -> None:
        """End the only worker's node, and start another one."""
        (node,) = [node for node in self.cluster.nodes if self.cluster.workers(node)]
        # Stopped first, so that what is finished is known.
        for worker in self.cluster.workers(node):
            worker.suspend()
        seals = self.progress.rglob("*.seal")
        finished = {path.stem: path.with_suffix("").stat().st_ino for path in seals}
        try:
            with lease_device("GPU-a", timeout_seconds=0):
                taken = "by nobody"
        except NoResourceError as error:
            taken = str(error)
        gone = self.cluster.kill(node)
        psutil.wait_procs([psutil.Process(p) for p in gone if psutil.pid_exists(p)], timeout=10)
        self.kills.append(Kill(finished, taken))
        if self.left[1:]:
            self.cluster.add(cpus=1, gpus=1)


class CountingBar(SilentBar):
    """Calls at its third move."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call, self.moves = call, 0

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count."""
        self.moves += 1
        if self.moves == 3:
            self.call()
