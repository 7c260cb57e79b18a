"""Decoder training: it learns, it resumes bit for bit, it leaves the frozen parts alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rldecoder.artifacts.catalogue import Baselines, SupervisedDecoder
from rldecoder.config.decoder import TrainDecoderConfig
from rldecoder.decoder.faithfulness import EpochFaithfulness, evaluate_faithfulness
from rldecoder.decoder.training import schedule, steps_per_epoch
from rldecoder.errors import BadInputError, NumericalError
from rldecoder.reporting import SilentReporter
from rldecoder.stages import train_decoder
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import DecoderInputs
from tests.stages.decoder_inputs import make_inputs
from tests.stages.published import files_of, published

CONFIG = TrainDecoderConfig(
    budget_tokens=None, batch_tokens=32, lr=3e-3, checkpoint_every_steps=4, validation_tokens=80
)
Contexts = Callable[..., StageContext]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> DecoderInputs:
    return make_inputs(tmp_path_factory.mktemp("store"), tiny_lm_dir)


@pytest.fixture(scope="module")
def trained(
    inputs: DecoderInputs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Output, StageContext]:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "out").mkdir()
    ctx = StageContext(
        folder / "out", folder / "progress", 0, torch.device("cpu"), SilentReporter()
    )
    return train_decoder.run(inputs, CONFIG, ctx), ctx


class Killer(SilentReporter):
    """Stops the run when step `at` is reported."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if step == self.at and "lr" in values:
            raise KeyboardInterrupt


def test_training_lowers_held_out_kl(trained: tuple[Output, StageContext]) -> None:
    output, ctx = trained
    metrics = output.metrics
    assert metrics["best_epoch"] == 3
    assert metrics["validation_kl"] < 0.8 * metrics["start_validation_kl"]
    assert metrics["tokens_trained"] == 3 * 9 * 32
    assert output.verdict is None
    rows = SupervisedDecoder.epochs.read(ctx.out).to_pylist()
    assert [(row["epoch"], row["split"]) for row in rows] == [
        (epoch, split) for epoch in range(4) for split in ("validation", "ood")
    ]
    assert rows[-2]["kl"] == metrics["validation_kl"]
    assert rows[0]["num_tokens"] == 80
    curve = SupervisedDecoder.curves.read(ctx.out).to_pylist()
    assert sum(row["name"] == "loss" for row in curve) == 27


def test_published_decoder_is_the_best_one(
    trained: tuple[Output, StageContext], inputs: DecoderInputs
) -> None:
    output, ctx = trained
    decoder = published(SupervisedDecoder, ctx.out).load(inputs.model.load(), inputs.sae.load())
    reader = inputs.cache.reader("validation")
    found = evaluate_faithfulness(decoder, reader, max_tokens=80, precision="medium")
    assert found.kl == pytest.approx(output.metrics["validation_kl"], rel=1e-6)
    assert decoder.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape[1] <= 4


@pytest.mark.parametrize("killed_at", [2, 13, 27])
def test_a_killed_run_resumes_bit_for_bit(
    killed_at: int,
    trained: tuple[Output, StageContext],
    inputs: DecoderInputs,
    context: Contexts,
) -> None:
    ctx = context("killed")
    with pytest.raises(KeyboardInterrupt):
        train_decoder.run(inputs, CONFIG, replace(ctx, report=Killer(killed_at)))
    assert not files_of(ctx.out)
    output = train_decoder.run(inputs, CONFIG, ctx)
    undisturbed, undisturbed_ctx = trained
    assert files_of(ctx.out) == files_of(undisturbed_ctx.out)
    timing = "train_tokens_per_second"
    assert {**output.metrics, timing: 0} == {**undisturbed.metrics, timing: 0}


def test_resume_repeats_only_the_steps_since_the_checkpoint(
    inputs: DecoderInputs, context: Contexts
) -> None:
    class Counter(SilentReporter):
        steps: list[int] = []  # noqa: RUF012

        def metrics(self, stage: str, step: int, values: Mapping[str, float]) -> None:
            if "lr" in values:
                self.steps.append(step)

    ctx = context("killed")
    with pytest.raises(KeyboardInterrupt):
        train_decoder.run(inputs, CONFIG, replace(ctx, report=Killer(15)))
    counter = Counter()
    train_decoder.run(inputs, CONFIG, replace(ctx, report=counter))
    assert counter.steps == list(range(13, 28))


DEEP = CONFIG.model_copy(
    update={"depth": "auto", "fit_tokens": 256, "lr": 1e-3, "blocks_lr": 3e-3, "epochs": 2}
)


def test_a_decoder_with_blocks_learns_and_resumes_bit_for_bit(
    inputs: DecoderInputs, context: Contexts
) -> None:
    """Its depth is the frontier's; it is killed in the second epoch."""
    whole, killed = context("whole"), context("killed")
    output = train_decoder.run(inputs, DEEP, whole)
    metrics = output.metrics
    assert metrics["depth"] == 1
    assert metrics["tokens_trained"] == 2 * 10 * 2 * 15
    curve = SupervisedDecoder.curves.read(whole.out).to_pylist()
    kl = [row["value"] for row in curve if row["name"] == "kl"]
    # 300 random tokens can be learnt by heart; that held-out text gains is for real text to show.
    assert sum(kl[-5:]) < 0.8 * sum(kl[:5])
    assert SupervisedDecoder.origin.read(whole.out).blocks == (3,)
    with pytest.raises(KeyboardInterrupt):
        train_decoder.run(inputs, DEEP, replace(killed, report=Killer(14)))
    train_decoder.run(inputs, DEEP, killed)
    assert files_of(killed.out) == files_of(whole.out)


def test_more_blocks_than_the_model_has_are_refused(
    inputs: DecoderInputs, context: Contexts
) -> None:
    with pytest.raises(BadInputError, match="2 blocks to start from"):
        train_decoder.run(inputs, DEEP.model_copy(update={"depth": 3}), context())


def test_a_worse_epoch_is_not_published(inputs: DecoderInputs, context: Contexts) -> None:
    ctx = context()
    config = CONFIG.model_copy(update={"lr": 5.0, "epochs": 1})
    output = train_decoder.run(inputs, config, ctx)
    assert output.metrics["best_epoch"] == 0
    assert output.metrics["validation_kl"] == output.metrics["start_validation_kl"]
    W = load_file(SupervisedDecoder.decoder.path(ctx.out) / "model.safetensors")["model.W"]
    sae = inputs.sae.load()
    torch.testing.assert_close(W, sae.W_dec.data)


def test_missing_lens_is_a_clear_error(
    inputs: DecoderInputs, context: Contexts, tmp_path: Path
) -> None:
    lens = {"A.1": torch.eye(64), "c.1": torch.zeros(64)}
    save_file(lens, Baselines.affine_lens.path(tmp_path))
    other = inputs._replace(baselines=published(Baselines, tmp_path))
    with pytest.raises(BadInputError, match="layer 2"):
        train_decoder.run(other, CONFIG, context())


def test_divergence_is_an_error(inputs: DecoderInputs, context: Contexts) -> None:
    config = CONFIG.model_copy(update={"lr": 1e37, "warmup_fraction": 0.0})
    with pytest.raises(NumericalError, match="lr"):
        train_decoder.run(inputs, config, context())


def test_budget_is_shared_by_the_epochs() -> None:
    config = TrainDecoderConfig(epochs=3, batch_tokens=100, budget_tokens=1500)
    assert steps_per_epoch(100, config) == 5
    assert steps_per_epoch(2, config) == 2
    assert steps_per_epoch(100, config.model_copy(update={"budget_tokens": None})) == 100
    assert steps_per_epoch(100, config.model_copy(update={"budget_tokens": 1})) == 1


def test_learning_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3


def test_epoch_columns_have_the_names_of_the_measures() -> None:
    names = set(SupervisedDecoder.epochs.schema.names)
    assert names == set(EpochFaithfulness.model_fields)
