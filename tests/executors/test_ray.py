"""A real Ray cluster of two nodes on the loopback: the same bytes, also when a node is killed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from safetensors.torch import load_file

from rldecoder.artifacts.catalogue import TrainedSae
from rldecoder.artifacts.store import ArtifactRef
from rldecoder.config.executor import ExecutorConfig
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.devices import FAKE_DEVICES, LEASE_FOLDER, lease_device
from rldecoder.errors import NoResourceError
from rldecoder.executors import ray_session
from rldecoder.executors.far_worker import Opening
from rldecoder.executors.ray_cluster import CALLS, RayExecutor
from rldecoder.executors.ray_team import RayAttempt
from rldecoder.executors.teams import TeamTask
from rldecoder.interp import ablation_shards
from rldecoder.reporting import Bar, SilentBar, SilentReporter
from rldecoder.runner import StageRun, plan, run_stage, store_for
from rldecoder.stages.inputs import SaeInputs
from rldecoder.stages.table import stage_named
from tests.conftest import make_context
from tests.executors.cluster import LoopbackCluster, loopback_cluster
from tests.stages.published import inputs_in
from tests.stages.test_train_sae import write_cache
from tests.stages.test_train_together import CONFIG as TOGETHER

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

SHARDED = (
    "ingest", "baselines", "cache_activations", "gate_decoder", "rank_features", "label_features",
    "train_explainer", "evaluate",
)  # fmt: skip
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
        if path.is_file() and path.name not in ("manifest.json", "timing.json")
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
        assert len(named) <= CALLS + 1
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


class KillingAtAStep(SilentReporter):
    """Kills a node when training reports a step, and starts another one."""

    def __init__(self, cluster: LoopbackCluster, at: int) -> None:
        super().__init__()
        self.cluster, self.at, self.nodes_at_work = cluster, at, 0

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Once."""
        if step >= self.at and not self.nodes_at_work:
            busy = [node for node in self.cluster.nodes if self.cluster.workers(node)]
            self.nodes_at_work = len(busy)
            self.cluster.kill(busy[-1])
            self.cluster.add(cpus=1, gpus=1)


def test_trainers_on_two_nodes_train_the_sae_of_one_process_though_a_node_is_killed(
    cluster: LoopbackCluster, tmp_path: Path
) -> None:
    inputs = inputs_in(SaeInputs, tmp_path / "store")
    write_cache(inputs.cache.folder)
    for artifact in (inputs.model, inputs.corpus):
        artifact.folder.mkdir()  # which a training from the cache does not read
    config = TOGETHER.model_copy(update={"budget_tokens": 150 * 128})
    alone = make_context(tmp_path / "alone")
    stage_named("train_sae").run(inputs, config, alone)

    while len(cluster.nodes) < 2:
        cluster.add(cpus=1, gpus=1)
    report = KillingAtAStep(cluster, at=20)
    settings = ExecutorConfig(type="ray", address=cluster.address, retries=1)
    with closing(RayExecutor(settings, threads=1, timeout_seconds=300)) as executor:
        there = replace(make_context(tmp_path / "there"), report=report, executor=executor)
        two = config.model_copy(update={"processes": 2})
        stage_named("train_sae").run(inputs, two, there)

    assert report.nodes_at_work == 2
    assert any("of a training was lost" in note for note in report.notes)
    (resumed,) = [int(note.split()[5]) for note in report.notes if "goes on from step" in note]
    assert 0 < resumed < 150
    expected, found = (
        load_file(TrainedSae.sae.path(ctx.out) / "sae_weights.safetensors")
        for ctx in (alone, there)
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert float((found[name] - tensor).norm() / tensor.norm()) < 1e-4, name
    assert [path.name for path in there.progress.glob("meeting-*")] == []


def test_a_team_that_has_no_room_says_so(cluster: LoopbackCluster, tmp_path: Path) -> None:
    settings = ExecutorConfig(type="ray", address=cluster.address, cpus=7)
    task = TeamTask(work="rldecoder.m:f", settings="{}", folder=tmp_path, owner="test/01")
    opening = Opening[TeamTask](job=task, code="", probe="", threads=1, task="")
    ray_session.connect(cluster.address)
    with pytest.raises(NoResourceError, match="no room for 2 processes at once"):
        RayAttempt(settings, opening, 2, 0.5, SilentReporter())
