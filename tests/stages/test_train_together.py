"""train_sae in two processes of this machine (gloo): the SAE of one, also when one is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace

import psutil
import pytest
import torch

from rldecoder.artifacts.catalogue import TrainedSae
from rldecoder.config.sae import SparsityPhase, TrainSaeConfig
from rldecoder.curves import read_curves
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.executors.local import LocalExecutor
from rldecoder.executors.local_team import require_devices
from rldecoder.reporting import SilentReporter
from rldecoder.sae.model import Sae
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import SaeInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import files_of, inputs_in
from tests.stages.test_train_sae import write_cache

STAGE = stage_named("train_sae")
Context = Callable[..., StageContext]

CONFIG = TrainSaeConfig(
    expansion=8,
    k=3, budget_tokens=40 * 128, batch_tokens=128, init_tokens=512, lr=1e-2,
    lr_final=1e-3, warmup_steps=5, dead_after_tokens=384, eval_every_steps=1000, eval_tokens=256,
    checkpoint_every_steps=8, log_every_steps=5, sparsity_warmup_steps=20, bandwidth=0.02,
    sparsity_phases=(SparsityPhase(steps=1000, coefficient=0.5),), resample_every_steps=15,
    matmul_dtype="float32",
)  # fmt: skip
"""Evaluated at the last step alone, whose weights are published then. Latents die, so that AuxK,
resampling and the counters are exchanged, too."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SaeInputs:
    inputs = inputs_in(SaeInputs, tmp_path_factory.mktemp("store"))
    write_cache(inputs.cache.folder)
    return inputs


def trained(
    inputs: SaeInputs, config: TrainSaeConfig, ctx: StageContext
) -> dict[str, torch.Tensor]:
    """The published weights."""
    STAGE.run(inputs, config, ctx)
    return Sae.load(TrainedSae.sae.path(ctx.out)).state_dict()


def numbers(ctx: StageContext) -> dict[str, list[float]]:
    """The training curves."""
    curves = read_curves(TrainedSae.curves.path(ctx.out))
    return {name: values for name, (_, values) in curves.items()}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka", "jumprelu", "relu"])
def test_two_processes_train_the_sae_of_one(
    architecture: str, inputs: SaeInputs, context: Context
) -> None:
    config = CONFIG.model_copy(update={"architecture": architecture})
    alone, together = context("one"), context("two")
    one = trained(inputs, config, alone)
    two = trained(inputs, config.model_copy(update={"processes": 2}), together)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert float((two[name] - tensor).norm() / tensor.norm()) < 1e-4, name

    # What is shown of a step is of the whole batch.
    expected, found = numbers(alone), numbers(together)
    assert expected.keys() == found.keys()
    assert max(expected["dead_fraction"]) > 0
    assert ("revived" in expected and max(expected["revived"]) > 0) or max(expected["penalty"]) > 0
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-6), name


class KillingReporter(SilentReporter):
    """Kills one of the processes, from last to first, when training reports certain steps."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__()
        self.steps, self.last = steps, 0

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Kill, with -9, when a next step is due; later steps are seen again after it."""
        self.last = step
        if self.steps and step >= self.steps[0]:
            self.steps.pop(0)
            os.kill(members()[-1 if self.steps else 0].pid, signal.SIGKILL)


def members() -> list[psutil.Process]:
    """The processes of a team, in the order in which they began."""
    children = [c for server in psutil.Process().children() for c in server.children()]
    alive = [c for c in children if c.status() != psutil.STATUS_ZOMBIE]
    found = [c for c in alive if "multiprocessing.forkserver" in " ".join(c.cmdline())]
    return sorted(found, key=lambda process: process.create_time())


@pytest.mark.slow
def test_killed_processes_are_replaced_and_the_bytes_are_the_same(
    inputs: SaeInputs, context: Context
) -> None:
    """The second one in the middle, and the first one, who saves and evaluates, later."""
    config = CONFIG.model_copy(update={"processes": 2, "budget_tokens": 200 * 128})
    whole, killed = context("whole"), context("killed")
    STAGE.run(inputs, config, whole)
    report = KillingReporter([40, 100])
    STAGE.run(inputs, config, replace(killed, report=report, executor=LocalExecutor(retries=1)))
    assert files_of(killed.out) == files_of(whole.out)
    assert report.steps == []
    losses = [note for note in report.notes if "was lost" in note]
    assert [loss.split(" of a training")[0] for loss in losses] == ["Process 1", "Process 0"]
    assert all("it was ended by SIGKILL" in loss for loss in losses)
    resumed = [int(note.split()[5]) for note in report.notes if "goes on from step" in note]
    assert len(resumed) == 2
    assert 0 < resumed[0] < resumed[1] < 200
    assert members() == []


@pytest.mark.slow
def test_what_a_process_refuses_is_refused_as_in_one(inputs: SaeInputs, context: Context) -> None:
    ctx = replace(context(), executor=LocalExecutor(retries=3))
    with pytest.raises(BadInputError, match="128 latents"):
        STAGE.run(inputs, CONFIG.model_copy(update={"k": 129, "processes": 2}), ctx)
    assert members() == []


def test_devices_are_counted_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(NoResourceError, match="2 processes were asked for; 1 devices"):
        require_devices(2, torch.device("cuda"))
