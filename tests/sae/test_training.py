"""The training step: a known dictionary is found, resume is exact, divergence is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rldecoder.checkpoints import Checkpoints
from rldecoder.config.sae import SparsityPhase, TrainSaeConfig
from rldecoder.errors import BadInputError, NumericalError
from rldecoder.sae.architectures import JumpRelu
from rldecoder.sae.metrics import random_control, reconstruction_quality
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.training import SaeTrainer, StepResult, input_statistics

D_MODEL, NUM_TRUE = 32, 48
TOPK = SaeSpec(architecture="topk", d_model=D_MODEL, num_latents=96, k=4)
RELU = SaeSpec(architecture="relu", d_model=D_MODEL, num_latents=96)
JUMP = SaeSpec(architecture="jumprelu", d_model=D_MODEL, num_latents=96)
CONFIG = TrainSaeConfig(
    k=4, lr=1e-2, lr_final=1e-3, warmup_steps=10, dead_after_tokens=2000, matmul_dtype="float32"
)
RELU_CONFIG = CONFIG.model_copy(
    update={
        "architecture": "relu",
        "sparsity_warmup_steps": 20,
        "sparsity_phases": (SparsityPhase(steps=1000, coefficient=0.02),),
        "resample_every_steps": 25,
        "dead_after_tokens": 1000,
    }
)


BATCH_CONFIG = CONFIG.model_copy(update={"architecture": "batchtopk", "threshold_decay": 0.9})
MATRYOSHKA_CONFIG = BATCH_CONFIG.model_copy(
    update={"architecture": "matryoshka", "matryoshka_prefixes": (0.25, 0.5, 1.0)}
)
JUMP_CONFIG = CONFIG.model_copy(
    update={
        "architecture": "jumprelu",
        "sparsity_warmup_steps": 100,
        "threshold_init": 0.01,
        "bandwidth": 0.02,
    }
)


def true_dictionary() -> Tensor:
    rows = torch.randn(NUM_TRUE, D_MODEL, generator=torch.Generator().manual_seed(7))
    return torch.nn.functional.normalize(rows, dim=1)


def batches(num_tokens: int, seed: int = 0) -> Iterator[Tensor]:
    """Sparse combinations of a known dictionary, shifted and scaled: raw residuals."""
    generator = torch.Generator().manual_seed(seed)
    rows = true_dictionary()
    while True:
        active = torch.rand(num_tokens, NUM_TRUE, generator=generator) < 4 / NUM_TRUE
        size = 1 + torch.rand(num_tokens, NUM_TRUE, generator=generator)
        yield 20 * (active * size) @ rows + 7.0


def train(spec: SaeSpec, config: TrainSaeConfig, steps: int) -> tuple[SaeTrainer, StepResult]:
    stream = batches(256)
    trainer = SaeTrainer(spec, config, steps, input_statistics(next(stream)), seed=0)
    result = None
    for _ in range(steps):
        result = trainer.step(next(stream))
    assert result is not None
    return trainer, result


def test_a_known_dictionary_is_found() -> None:
    trainer, _ = train(TOPK, CONFIG, 250)
    held_out = [next(batches(1000, seed=99))]
    sae = trainer.sae()
    quality = reconstruction_quality(sae, held_out)
    control = reconstruction_quality(random_control(TOPK, 5, held_out[0], 4.0), held_out)
    assert quality.fvu < 0.2 < 0.4 < control.fvu
    best_cosine = (true_dictionary() @ sae.W_dec.T).amax(1)
    assert float((best_cosine > 0.9).float().mean()) > 0.8
    random_cosine = (true_dictionary() @ random_control(TOPK, 5, held_out[0], 4.0).W_dec.T).amax(1)
    assert float((random_cosine > 0.9).float().mean()) < 0.1


def test_the_sparsity_coefficient_makes_relu_sparse() -> None:
    held_out = [next(batches(1000, seed=99))]
    l0 = {}
    for coefficient in (0.002, 0.05):
        phases = (SparsityPhase(steps=1000, coefficient=coefficient),)
        config = RELU_CONFIG.model_copy(update={"sparsity_phases": phases})
        trainer, _ = train(RELU, config, 150)
        quality = reconstruction_quality(trainer.sae(), held_out)
        assert quality.fvu < 0.4
        l0[coefficient] = quality.l0_mean
    assert l0[0.05] < 0.6 * l0[0.002]


def test_decoder_rows_keep_unit_norm_and_l0_is_k() -> None:
    trainer, result = train(TOPK, CONFIG, 20)
    torch.testing.assert_close(trainer.weights.dec.norm(dim=1), torch.ones(96))
    torch.testing.assert_close(trainer.sae().W_dec.norm(dim=1), torch.ones(96))
    assert 3.5 < result.l0 <= 4


@pytest.mark.parametrize("config", [CONFIG, RELU_CONFIG, JUMP_CONFIG])
def test_what_the_first_step_does(config: TrainSaeConfig) -> None:
    """Mean start, projected and clipped gradient, and the rate that Adam is given."""
    stream = batches(256)
    config = config.model_copy(update={"grad_clip": 1e-3, "lr_reference_latents": 24})
    spec = {"topk": TOPK, "relu": RELU, "jumprelu": JUMP}[config.architecture]
    statistics = input_statistics(next(stream))
    trainer = SaeTrainer(spec, config, 100, statistics, seed=0)
    torch.testing.assert_close(trainer.weights.b_dec.detach(), statistics.mean * statistics.scale)
    rows = trainer.weights.dec.detach().clone()
    result = trainer.step(next(stream))
    grad = trainer.weights.dec.grad
    assert grad is not None
    assert float(grad.norm()) > 0
    assert float(torch.linalg.vecdot(grad, rows).abs().max()) < 1e-6 * float(grad.norm())
    everything = torch.cat([p.grad.flatten() for p in trainer.optimizer.param_groups[0]["params"]])
    assert result.grad_norm > 1e-3  # before clipping
    assert float(everything.norm()) == pytest.approx(1e-3, rel=1e-3)
    # Warm-up of 10 steps, a fourfold dictionary.
    want = config.lr / 11 / 2
    assert result.lr == trainer.optimizer.param_groups[0]["lr"] == pytest.approx(want)


def test_resampling_revives_dead_latents_of_jumprelu() -> None:
    def alive(every: int) -> int:
        config = JUMP_CONFIG.model_copy(
            update={"resample_every_steps": every, "dead_after_tokens": 512}
        )
        stream = batches(256)
        trainer = SaeTrainer(JUMP, config, 60, input_statistics(next(stream)), seed=0)
        assert isinstance(trainer.architecture, JumpRelu)
        with torch.no_grad():
            trainer.architecture.log_threshold[:40] = math.log(50.0)
        for _ in range(32):
            trainer.step(next(stream))
        trainer.tokens_since_fired.fill_(512)
        for _ in range(2):
            trainer.step(next(stream))
        return int((trainer.tokens_since_fired[:40] < 512).sum())

    assert alive(1000) == 0
    assert alive(30) > 30


def test_a_smaller_encoder_and_less_momentum_learn_faster() -> None:
    held_out = [next(batches(1000, seed=99))]
    fvu = []
    for changes in ({"encoder_init": 1.0, "adam_beta1": 0.9}, {}):
        config = CONFIG.model_copy(update={"lr": 3e-3, **changes})
        trainer, _ = train(TOPK, config, 60)
        fvu.append(reconstruction_quality(trainer.sae(), held_out).fvu)
    assert fvu[1] < 0.95 * fvu[0]


def test_raw_sae_equals_the_trainers_scaled_one() -> None:
    """What is published reconstructs raw residuals as training reconstructed scaled ones."""
    trainer, _ = train(TOPK, CONFIG, 30)
    x = next(batches(200, seed=5))
    scaled = trainer.weights
    pre_acts = (x * trainer.scale - scaled.b_dec) @ scaled.enc.T + scaled.b_enc
    acts = torch.zeros_like(pre_acts)
    kept = pre_acts.topk(4)
    acts.scatter_(1, kept.indices, kept.values.relu())
    want = (acts @ scaled.dec + scaled.b_dec) / trainer.scale
    torch.testing.assert_close(trainer.sae()(x).recon, want.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [BATCH_CONFIG, MATRYOSHKA_CONFIG, JUMP_CONFIG])
def test_thresholds_keep_about_k_latents_on_single_tokens(config: TrainSaeConfig) -> None:
    """Trained on batches, read token by token: L0 near k, the known dictionary found."""
    trainer, _ = train(JUMP, config, 400)
    sae = trainer.sae()
    quality = reconstruction_quality(sae, [next(batches(1000, seed=99))])
    assert 0.75 * config.k < quality.l0_mean < 1.25 * config.k
    assert quality.fvu < 0.3
    best_cosine = (true_dictionary() @ sae.W_dec.T).amax(1)
    assert float(best_cosine.mean()) > 0.85


def test_a_short_training_forgets_the_thresholds_of_its_first_batches() -> None:
    """With a mean over a hundred batches from the first on, L0 would be 10 after 60 steps."""
    config = BATCH_CONFIG.model_copy(update={"threshold_decay": 0.99})
    trainer, _ = train(JUMP, config, 60)
    quality = reconstruction_quality(trainer.sae(), [next(batches(1000, seed=99))])
    assert 0.85 * config.k < quality.l0_mean < 1.15 * config.k


def test_nested_dictionaries_explain_most_first() -> None:
    """The first quarter of a matryoshka dictionary does more alone than that of a plain one."""
    held_out = next(batches(1000, seed=99))
    fvu = {}
    for config in (BATCH_CONFIG, MATRYOSHKA_CONFIG):
        sae = train(JUMP, config, 300)[0].sae()
        dense = sae.encode_dense(held_out)
        part = dense[:, :24] @ sae.W_dec[:24] + sae.b_dec
        centred = held_out - held_out.mean(0)
        fvu[config.architecture] = float((held_out - part).square().sum() / centred.square().sum())
    assert fvu["matryoshka"] < 0.8 * fvu["batchtopk"]


@pytest.mark.parametrize(
    ("spec", "config"),
    [
        (TOPK, CONFIG),
        (RELU, RELU_CONFIG),
        (JUMP, BATCH_CONFIG),
        (JUMP, MATRYOSHKA_CONFIG),
        (JUMP, JUMP_CONFIG),
    ],
    ids=lambda value: value.architecture,
)
def test_resume_is_bit_identical(spec: SaeSpec, config: TrainSaeConfig, tmp_path: object) -> None:
    """60 steps at once, against 33, a checkpoint on disk, and 27 more in a new trainer."""
    stream = batches(128)
    data = [next(stream) for _ in range(60)]
    held_out = [next(batches(300, seed=9))]
    statistics = input_statistics(data[0])

    def start() -> SaeTrainer:
        trainer = SaeTrainer(spec, config, 60, statistics, seed=3)
        with torch.no_grad():
            trainer.weights.b_enc[:20] = -50.0
        return trainer

    def go(trainer: SaeTrainer, first: int, last: int) -> list[StepResult]:
        results = []
        for index in range(first, last):
            results.append(trainer.step(data[index]))
            if index % 10 == 9:
                trainer.evaluate(held_out)
        return results

    whole = start()
    want = go(whole, 0, 60)
    if spec is RELU:
        assert sum(result.revived for result in want) > 0, "resampling must be part of this test"

    half = start()
    go(half, 0, 33)
    tensors, state = half.pack()
    Checkpoints(tmp_path).save(33, tensors, json.loads(json.dumps(state)))  # type: ignore[arg-type]
    found = Checkpoints(tmp_path).load()  # type: ignore[arg-type]
    assert found is not None
    torch.manual_seed(12345)
    resumed = SaeTrainer(spec, config, 60, input_statistics(data[5]), seed=3)
    resumed.unpack(found.tensors, found.state)
    assert go(resumed, 33, 60) == want[33:]
    one, other = whole.pack(), resumed.pack()
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


def test_best_is_kept_by_held_out_fvu() -> None:
    trainer, _ = train(TOPK, CONFIG, 30)
    held_out = [next(batches(300, seed=9))]
    fvu, _ = trainer.evaluate(held_out)
    with torch.no_grad():
        trainer.weights.dec.copy_(-trainer.weights.dec)
    worse, _ = trainer.evaluate(held_out)
    assert worse > fvu == trainer.best_fvu
    assert trainer.best_step == 30
    again = reconstruction_quality(trainer.sae(best=True), held_out)
    assert again.fvu == fvu


def test_dead_latents_are_counted_and_auxk_starts() -> None:
    config = CONFIG.model_copy(update={"dead_after_tokens": 256})
    stream = batches(256)
    trainer = SaeTrainer(TOPK, config, 10, input_statistics(next(stream)), seed=0)
    with torch.no_grad():
        trainer.weights.b_enc[:10] = -100.0
    result = trainer.step(next(stream))
    assert result.dead_fraction >= 10 / 96
    assert result.penalty > 0
    assert trainer.tokens_since_fired[:10].tolist() == [256] * 10


def test_jumprelu_starts_at_its_l0_and_stays_near() -> None:
    config = JUMP_CONFIG.model_copy(update={"threshold_init": None})
    stream = batches(512)
    trainer = SaeTrainer(JUMP, config, 200, input_statistics(next(stream)), seed=0)
    levels = [trainer.step(next(stream)).l0 for _ in range(200)]
    assert levels[0] == pytest.approx(4, rel=0.1)
    assert max(levels) < 24  # while the penalty warms up; the paper's start fires half of 96
    assert sum(levels[-20:]) / 20 == pytest.approx(4, rel=0.25)


def test_auxk_revives_the_dead() -> None:
    """Latents pushed out of every top k come back with AuxK, and do not without it."""
    alive = {}
    for coefficient in (0.0, 1 / 32):
        config = CONFIG.model_copy(
            update={"auxk_coefficient": coefficient, "dead_after_tokens": 1024}
        )
        stream = batches(256)
        trainer = SaeTrainer(TOPK, config, 120, input_statistics(next(stream)), seed=0)
        with torch.no_grad():
            trainer.weights.b_enc[:60] = -1.0
        for _ in range(120):
            trainer.step(next(stream))
        alive[coefficient] = 1 - trainer.dead_fraction
    assert alive[1 / 32] > alive[0.0] + 0.2


def test_nan_is_an_error_with_its_step() -> None:
    trainer, _ = train(TOPK, CONFIG, 3)
    with pytest.raises(NumericalError, match="diverged at step 3"):
        trainer.step(torch.full((8, D_MODEL), float("nan")))


def test_unusable_statistics() -> None:
    with pytest.raises(NumericalError, match="NaN or infinity"):
        input_statistics(torch.tensor([[1.0, float("inf")], [0.0, 0.0]]))
    with pytest.raises(BadInputError, match="equal"):
        input_statistics(torch.ones(5, 3))


def test_training_goes_on_with_an_sae_of_the_same_model_alone() -> None:
    def start(mine: str, theirs: str) -> None:
        stream = batches(64)
        spec = TOPK.model_copy(update={"model_name": mine})
        trainer = SaeTrainer(spec, CONFIG, 10, input_statistics(next(stream)), seed=0)
        other = Sae.random_init(TOPK.model_copy(update={"model_name": theirs}), seed=1)
        trainer.start_from(other, torch.empty(0, dtype=torch.long))

    start("gpt2", "gpt2-small")
    start("openai-community/gpt2", "GPT2")
    start("gpt2", "")
    with pytest.raises(BadInputError, match="model pythia-70m"):
        start("gpt2", "EleutherAI/pythia-70m")
