"""The stage train_sae on a synthetic cache: what it publishes, resume after a kill, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rldecoder.artifacts.catalogue import Clusters, TrainedSae
from rldecoder.artifacts.store import MANIFEST
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.curves import read_curves
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.errors import BadInputError, DamagedFileError, NumericalError
from rldecoder.reporting import SilentReporter
from rldecoder.sae.model import Sae
from rldecoder.sae.training import SaeTrainer, StepResult
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import SaeInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import files_of, inputs_in

STAGE = stage_named("train_sae")

D_MODEL = 16
CONFIG = TrainSaeConfig(
    expansion=4,
    k=4,
    budget_tokens=6_400,
    batch_tokens=128,
    init_tokens=512,
    lr=3e-3,
    warmup_steps=5,
    dead_after_tokens=1000,
    eval_every_steps=10,
    eval_tokens=256,
    checkpoint_every_steps=8,
    log_every_steps=5,
)
Context = Callable[..., StageContext]


def write_cache(folder: Path, num_train: int = 1100) -> None:
    """Sparse combinations of 24 directions; 1,100 rows make an epoch end inside training."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(24, D_MODEL, generator=generator)
    meta = ActivationMeta(
        model_name="synthetic",
        hook_layer=2,
        num_layers=4,
        d_model=D_MODEL,
        vocab_size=50,
        context_length=11,
    )
    for split, count in (("train", num_train), ("validation", 330)):
        acts = torch.rand(count, 24, generator=generator)
        acts *= torch.rand(count, 24, generator=generator) < 0.12
        resid = 30 * acts @ rows + 4
        index = torch.arange(count)
        with ActivationWriter(folder, split, meta, shard_rows=500) as writer:
            writer.add(index // 10, index % 10 + 1, index % 50, resid, resid)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SaeInputs:
    root = tmp_path_factory.mktemp("store")
    inputs = inputs_in(SaeInputs, root)
    write_cache(inputs.cache.folder)
    return inputs


def test_publishes_an_sae_better_than_nothing(inputs: SaeInputs, context: Context) -> None:
    ctx = context()
    output = STAGE.run(inputs, CONFIG, ctx)
    sae = Sae.load(TrainedSae.sae.path(ctx.out))
    assert (sae.spec.hook_layer, sae.spec.model_name, sae.num_latents) == (2, "synthetic", 64)
    best = TrainedSae.best.read(ctx.out)
    curves = read_curves(TrainedSae.curves.path(ctx.out))
    steps, fvus = curves["validation_fvu"]
    assert steps == [10, 20, 30, 40, 50]
    assert best.fvu == min(fvus) == output.metrics["validation_fvu"]
    assert best.step == steps[fvus.index(min(fvus))]
    assert best.fvu < 0.75 * fvus[0]
    assert curves["loss"][0] == list(range(5, 51, 5))
    assert output.metrics["tokens"] == 6_400
    assert output.verdict is None


class KilledError(Exception):
    """Stands for a kill in the middle of training."""


class KillingReporter(SilentReporter):
    """Ends the stage when it reports a given step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Raise at the step."""
        if step >= self.at:
            raise KilledError


@pytest.mark.parametrize("killed_at", [[20], [10, 35, 50]])
def test_killed_and_resumed_publishes_the_same_bytes(
    inputs: SaeInputs, context: Context, killed_at: list[int]
) -> None:
    """Also across the end of an epoch (8 batches), and when killed several times."""
    whole = context("whole")
    want = STAGE.run(inputs, CONFIG, whole)
    for step in killed_at:
        ctx = context("killed")
        broken = StageContext(ctx.out, ctx.progress, 0, ctx.device, KillingReporter(step))
        with pytest.raises(KilledError):
            STAGE.run(inputs, CONFIG, broken)
    ctx = context("killed")
    got = STAGE.run(inputs, CONFIG, ctx)
    assert isinstance(ctx.report, SilentReporter)
    resumed_from = (killed_at[-1] - 1) // 8 * 8
    assert ctx.report.notes == [f"train_sae goes on from step {resumed_from} of 50"]
    assert files_of(ctx.out) == files_of(whole.out)
    same = {k: v for k, v in got.metrics.items() if not k.endswith("_per_second")}
    assert same == {k: v for k, v in want.metrics.items() if not k.endswith("_per_second")}


def test_seed_changes_the_result(inputs: SaeInputs, context: Context) -> None:
    one, other = context("one"), context("other", seed=1)
    STAGE.run(inputs, CONFIG, one)
    STAGE.run(inputs, CONFIG, other)
    assert files_of(one.out) != files_of(other.out)


def test_relu_variant_runs_and_alerts(inputs: SaeInputs, context: Context) -> None:
    config = TrainSaeConfig.model_validate(
        CONFIG.model_dump()
        | {
            "architecture": "relu",
            "sparsity_warmup_steps": 5,
            "sparsity_phases": [{"steps": 50, "coefficient": 0.01}],
            "resample_every_steps": 20,
            "alert_l0": (0.0, 1.0),
        }
    )
    ctx = context()
    STAGE.run(inputs, config, ctx)
    assert Sae.load(TrainedSae.sae.path(ctx.out)).spec.architecture == "relu"
    assert isinstance(ctx.report, SilentReporter)
    assert any("mean L0" in alert for alert in ctx.report.alerts)


def test_divergence_is_an_alert_and_an_error(
    inputs: SaeInputs, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = SaeTrainer.step

    def poisoned(trainer: SaeTrainer, raw: Tensor) -> StepResult:
        return original(trainer, raw * (float("nan") if trainer.step_index == 5 else 1.0))

    monkeypatch.setattr(SaeTrainer, "step", poisoned)
    ctx = context()
    with pytest.raises(NumericalError, match="diverged at step 5"):
        STAGE.run(inputs, CONFIG, ctx)
    assert isinstance(ctx.report, SilentReporter)
    assert any("diverged at step 5" in alert for alert in ctx.report.alerts)


def test_bad_input_is_refused_before_training(inputs: SaeInputs, context: Context) -> None:
    with pytest.raises(BadInputError, match="64 latents"):
        STAGE.run(inputs, CONFIG.model_copy(update={"k": 65}), context())
    with pytest.raises(BadInputError, match="larger than the split"):
        STAGE.run(inputs, CONFIG.model_copy(update={"batch_tokens": 5000}), context())


@pytest.mark.parametrize(
    "change",
    [
        {"lr_final": 1.0},
        {"architecture": "relu", "sparsity_phases": []},
        {"kk": 1},
        {"batch_tokens": 1000, "processes": 3},
    ],
)
def test_contradictory_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TrainSaeConfig.model_validate(change)


def retrained(
    folder: Path, flagged: dict[int, list[str]], reasons: tuple[str, ...] = ("dead",)
) -> TrainSaeConfig:
    """One step that hardly moves anything, from the SAE published in `folder`."""
    clusters = Clusters.clusters.path(folder)
    rows = [{"latent": latent, "reasons": why} for latent, why in flagged.items()]
    clusters.write_text(json.dumps({"sae_digest": "of-another", "flagged": rows}))
    retrain = {"sae": TrainedSae.sae.path(folder), "clusters": clusters, "reasons": reasons}
    changes = {"budget_tokens": 128, "lr": 1e-9, "lr_final": 1e-9, "retrain": retrain}
    return TrainSaeConfig.model_validate(CONFIG.model_dump() | changes)


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "relu"])
def test_retraining_goes_on_from_an_sae_and_resamples_what_was_flagged(
    architecture: str, inputs: SaeInputs, context: Context
) -> None:
    config = CONFIG.model_copy(update={"architecture": architecture})
    first = context("first")
    STAGE.run(inputs, config, first)
    old = Sae.load(TrainedSae.sae.path(first.out))
    flags = {3: ["dead"], 7: ["label_failed"], 9: ["ultra_dense", "dead"]}
    again = retrained(first.out, flags).model_copy(update={"architecture": architecture})
    second = context("second")
    STAGE.run(inputs, again, second)
    new = Sae.load(second.out / "sae")
    same = torch.ones(old.num_latents, dtype=torch.bool)
    same[[3, 9]] = False
    torch.testing.assert_close(new.W_dec[same], old.W_dec[same], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new.W_enc[:, same], old.W_enc[:, same], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new.b_dec, old.b_dec, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(new.W_dec[3], old.W_dec[3], atol=1e-2)
    assert not torch.allclose(new.W_dec[9], old.W_dec[9], atol=1e-2)


def test_retraining_is_fingerprinted_by_content(
    inputs: SaeInputs, context: Context, tmp_path: Path
) -> None:
    first = context("first")
    STAGE.run(inputs, CONFIG.model_copy(update={"budget_tokens": 256}), first)
    config = retrained(first.out, {3: ["dead"]})
    before = STAGE.fingerprint(config)
    assert before == STAGE.fingerprint(config)
    assert STAGE.fingerprint(CONFIG) == {}
    assert before != STAGE.fingerprint(retrained(first.out, {3: ["dead"]}, ("label_failed",)))
    assert before != STAGE.fingerprint(retrained(first.out, {4: ["dead"]}))
    Clusters.clusters.path(first.out).unlink()
    with pytest.raises(BadInputError, match=r"clusters\.json does not exist"):
        STAGE.fingerprint(config)


def test_retraining_from_another_kind_of_sae_is_refused(
    inputs: SaeInputs, context: Context
) -> None:
    first = context("first")
    STAGE.run(inputs, CONFIG.model_copy(update={"budget_tokens": 256}), first)
    other = retrained(first.out, {}).model_copy(update={"k": 5})
    with pytest.raises(BadInputError, match="has k 4, and 5 is to be trained"):
        STAGE.run(inputs, other, context("second"))
    with pytest.raises(BadInputError, match="Latent 1000 is flagged"):
        STAGE.run(inputs, retrained(first.out, {1000: ["dead"]}), context("third"))
    config = retrained(first.out, {})
    (first.out / MANIFEST).write_text("{}")  # as in a store: the folder's name is a digest
    with pytest.raises(BadInputError, match="flags latents of the SAE of-another"):
        STAGE.run(inputs, config, context("fifth"))
    Clusters.clusters.path(first.out).write_text("{}")
    with pytest.raises(DamagedFileError, match="which latents are flagged"):
        STAGE.run(inputs, config, context("fourth"))


def test_checkpoint_interval_is_not_in_the_digest() -> None:
    fields = TrainSaeConfig().digest_fields()
    assert "checkpoint_every_steps" not in fields
    assert fields["sparsity_phases"][1] == {"steps": 30_000, "coefficient": 0.01}
