"""The stage gate_sae on a tiny real model: a good SAE passes, a random one fails, both publish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rldecoder.artifacts.catalogue import ModelFolder, SaeGate, TrainedSae
from rldecoder.config.sae import GateSaeConfig
from rldecoder.data.activations import ActivationWriter
from rldecoder.data.shards import write_token_shard
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import SaeGateInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import inputs_in, published
from tests.tiny_models import cache_meta

STAGE = stage_named("gate_sae")

LAYER, NUM_SEQUENCES, CONTEXT = 2, 12, 32
EASY = GateSaeConfig(
    max_normalised_mse=1e-6, max_splice_kl=1e-4, l0_range=(1, 200), eval_tokens=300
)
Context = Callable[..., StageContext]


def perfect_sae(lm: FrozenLM, resid: torch.Tensor) -> Sae:
    """Plus and minus the residuals' principal axes, from their mean: exact, no axis twice."""
    spec = SaeSpec(
        architecture="relu", d_model=lm.d_model, num_latents=2 * lm.d_model, hook_layer=LAYER
    )
    sae = Sae(spec).requires_grad_(False)
    axes = torch.linalg.qr(torch.randn(lm.d_model, lm.d_model))[0]
    sae.W_dec.copy_(torch.cat([axes, -axes]))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(resid.mean(0))
    return sae


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> SaeGateInputs:
    """Model, test tokens and their activations, as the earlier stages publish them."""
    root = tmp_path_factory.mktemp("gate")
    inputs = inputs_in(SaeGateInputs, root)
    inputs.model.folder.mkdir()
    ModelFolder.model.path(inputs.model.folder).symlink_to(tiny_lm_dir)
    lm = FrozenLM.load(tiny_lm_dir)
    ids = np.random.default_rng(0).integers(0, lm.vocab_size, (NUM_SEQUENCES, CONTEXT))
    inputs.corpus.folder.mkdir()
    columns = {
        "seq_id": np.arange(NUM_SEQUENCES),
        "split": ["test"] * NUM_SEQUENCES,
        "source": ["synthetic"] * NUM_SEQUENCES,
        "doc_ids": [[i] for i in range(NUM_SEQUENCES)],
        "doc_starts": [[0]] * NUM_SEQUENCES,
        "input_ids": ids.tolist(),
    }
    write_token_shard(inputs.corpus.folder, "test", 0, columns, lm.vocab_size)
    input_ids = torch.from_numpy(ids)
    resid, final = (x[:, 1:].flatten(0, 1) for x in lm.resid_and_final(input_ids, LAYER))
    meta = cache_meta(lm, LAYER, CONTEXT)
    index = torch.arange(len(resid))
    with ActivationWriter(inputs.cache.folder, "test", meta, shard_rows=200) as writer:
        writer.add(
            index // (CONTEXT - 1),
            index % (CONTEXT - 1) + 1,
            input_ids[:, 1:].flatten(),
            resid,
            final,
        )
    perfect_sae(lm, resid).save(TrainedSae.sae.path(root / "good"))
    spec = SaeSpec(d_model=lm.d_model, num_latents=640, k=16, hook_layer=LAYER)
    Sae.random_init(spec, 0).save(TrainedSae.sae.path(root / "bad"))
    return inputs


def with_sae(base: SaeGateInputs, which: str) -> SaeGateInputs:
    return base._replace(sae=published(TrainedSae, base.sae.folder.parent / which))


def test_a_perfect_sae_passes(base: SaeGateInputs, context: Context) -> None:
    ctx = context()
    output = STAGE.run(with_sae(base, "good"), EASY, ctx)
    assert (output.verdict, output.reasons) == ("pass", ())
    report = SaeGate.report.read(ctx.out)
    assert report["fvu"].value < 1e-6
    assert report["splice_kl"].value < 1e-5
    assert report["splice_agreement"].value == 1.0
    assert report["ce_recovered_zero"].value == pytest.approx(1.0, abs=1e-3)
    assert report["near_duplicate_fraction"].value == 0.0
    assert report["l0_mean"].value == pytest.approx(64)
    assert report["random_l0_mean"].value == pytest.approx(64, rel=0.05)
    assert report["random_splice_kl"].value > report["splice_kl"].value
    assert report["num_tokens"].value == 300
    assert report["splice_tokens"].value == NUM_SEQUENCES * (CONTEXT - 1)


def test_density_is_that_of_the_sae(base: SaeGateInputs, context: Context) -> None:
    ctx = context()
    STAGE.run(with_sae(base, "bad"), GateSaeConfig(random_control=False), ctx)
    table = SaeGate.density.read(ctx.out)
    assert table["latent"].to_pylist() == list(range(640))
    assert sum(table["density"].to_pylist()) == pytest.approx(
        SaeGate.report.read(ctx.out)["l0_mean"].value
    )
    assert SaeGate.density_figure.path(ctx.out).stat().st_size > 1000


def test_a_random_sae_fails_and_is_published(base: SaeGateInputs, context: Context) -> None:
    ctx = context()
    output = STAGE.run(with_sae(base, "bad"), GateSaeConfig(), ctx)
    assert output.verdict == "fail"
    assert any("explained_variance" in reason for reason in output.reasons)
    assert any("l0_mean" in reason for reason in output.reasons)
    report = SaeGate.report.read(ctx.out)
    assert report["explained_variance"].passed is False
    assert output.metrics["fvu"] == report["fvu"].value


def test_two_runs_publish_the_same_bytes(base: SaeGateInputs, context: Context) -> None:
    folders = []
    for name in ("one", "two"):
        ctx = context(name)
        STAGE.run(with_sae(base, "bad"), EASY, ctx)
        folders.append(ctx.out)
    for path in sorted(folders[0].iterdir()):
        assert path.read_bytes() == (folders[1] / path.name).read_bytes(), path.name
