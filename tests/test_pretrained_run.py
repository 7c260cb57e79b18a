"""The debug run with somebody else's SAE: all stages, nothing trained, refusals before any work."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rldecoder.artifacts.catalogue import ActivationCache, Labels, Report, SaeGate, TrainedSae
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.reporting import SilentReporter
from rldecoder.runner import open_artifact, open_inputs, plan, run_pipeline
from rldecoder.seeds import derive_seed
from rldecoder.stages.table import STAGES, stage_named
from tests.conftest import ROOT, make_context
from tests.forked import ForkServer
from tests.sae.foreign_folders import Foreign, Weights, changed_config, write_foreign
from tests.smallest import smallest

CONFIG = ROOT / "configs" / "debug.yaml"
BEFORE = ("sync_tokenizer", "ingest", "baselines", "sweep_sae", "frontier", "cache_activations")
AFTERWARDS = (
    "train_decoder", "gate_decoder", "train_ppo", "control_ppo", "rank_features", "label_features",
    "cluster_features", "train_explainer", "evaluate", "report",
)  # fmt: skip
"""What has little to do with whose SAE it is."""

pytestmark = pytest.mark.slow


def configured(folder: Path, *overrides: str) -> RunConfig:
    """The debug run with this SAE."""
    chosen = f"train_sae.pretrained.folder={folder}"
    return load_run_config(CONFIG, [chosen, *overrides])


@pytest.fixture(scope="module")
def trained(debug_store: Path) -> tuple[Weights, torch.Tensor]:
    """The debug run's own SAE as one that keeps what exceeds a threshold, and residuals."""
    store, refs = ArtifactStore(debug_store), plan(load_run_config(CONFIG))
    artifact = open_artifact(TrainedSae, refs["train_sae"], store)
    cache = open_artifact(ActivationCache, refs["cache_activations"], store)
    held = load_file(artifact.sae / "sae_weights.safetensors")
    rows = next(cache.reader("validation").ordered(1024)).resid
    assert rows is not None
    resid = rows.float()
    b_enc = held["b_enc"] - held["b_dec"] @ held["W_enc"]
    pre_acts = resid @ held["W_enc"] + b_enc
    # Half way between two pre-activations: none of these residuals is on the brink.
    above = pre_acts.flatten().sort().values[-len(resid) * 16 - 1 :]
    threshold = (above[0] + above[1]) / 2
    weights = Weights(
        held["W_enc"], b_enc, held["W_dec"], held["b_dec"],
        threshold.clamp_min(0.01).expand(len(b_enc)),
    )  # fmt: skip
    return weights, resid


@pytest.fixture(scope="module")
def gemma_scope(
    trained: tuple[Weights, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Foreign:
    """That SAE as Gemma Scope publishes its own."""
    return write_foreign("gemma_npz", tmp_path_factory.mktemp("hub"), trained[0])


def test_the_whole_run(
    gemma_scope: Foreign,
    trained: tuple[Weights, torch.Tensor],
    debug_store: Path,
    forks: ForkServer,
    tmp_path: Path,
) -> None:
    for stage in BEFORE:
        shutil.copytree(debug_store / stage, tmp_path / "store" / stage)
    line = {"modelId": "x", "layer": "2-gemmascope-res-16k", "description": 'the word "the"'}
    labels = tmp_path / "neuronpedia.jsonl"
    labels.write_text("".join(json.dumps(line | {"index": i}) + "\n" for i in range(256)))
    settings = [
        f"label_features.import={labels}", "train_sae.pretrained.accept=[bos]",
        *smallest(*AFTERWARDS),
    ]  # fmt: skip
    chosen = f"train_sae.pretrained.folder={gemma_scope.folder}"
    done = forks.run(
        "run", str(CONFIG), "--no-prefect", "--store", str(tmp_path / "store"),
        *(part for setting in (chosen, *settings) for part in ("--set", setting)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{len(STAGES) - len(BEFORE)} stages built, {len(BEFORE)} reused" in done.stderr
    assert "nothing is trained" in " ".join(done.stderr.split())
    run = configured(gemma_scope.folder, *settings)
    store, refs = ArtifactStore(tmp_path / "store"), plan(run)
    again = run_pipeline(run, store=store, report=SilentReporter(), device="cpu")
    assert all(result.reused for result in again)

    # What was published is the folder's, to the bit, and computes the same.
    artifact = open_artifact(TrainedSae, refs["train_sae"], store)
    held = load_file(artifact.sae / "sae_weights.safetensors")
    weights, resid = trained
    assert all(torch.equal(held[name], tensor) for name, tensor in weights._asdict().items())
    sae = artifact.load()
    torch.testing.assert_close(
        sae.encode_dense(resid).double(), gemma_scope.acts(resid), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        sae(resid).recon.double(), gemma_scope.recon(resid), rtol=1e-5, atol=1e-5
    )
    assert artifact.source is not None
    assert (artifact.source.form, artifact.source.hook_layer) == ("gemma_scope", 3)
    assert artifact.metrics["steps"] == 0

    # Built again it is the same, in seconds (of the processor: a busy machine is no fault).
    stage = stage_named("train_sae")
    for name in ("libraries are imported", "again"):
        ctx = make_context(tmp_path / name, seed=derive_seed(run.seed, stage.name))
        started = time.process_time()
        stage.run(open_inputs(stage, refs, store), run.train_sae, ctx)
        seconds = time.process_time() - started
    assert seconds < 5
    for path in ctx.out.rglob("*.*"):
        assert path.read_bytes() == (artifact.folder / path.relative_to(ctx.out)).read_bytes()

    gate = open_artifact(SaeGate, refs["gate_sae"], store)
    assert gate.metrics["l0_mean"] == pytest.approx(16, rel=0.5)

    others = open_artifact(Labels, refs["label_features"], store).imported
    assert others is not None
    assert others.methods["imported"].latents == others.covered > 0
    report = open_artifact(Report, refs["report"], store).page.read_text(encoding="utf-8")
    assert "pretrained jumprelu SAE of gemma-2-2b, blocks.2.hook_resid_post" in report
    assert "labels of others, control: shuffled" in report

    # The model is another than Gemma, and the text has no BOS: told with every result.
    assert any("gemma-2-2b" in caveat for caveat in gate.caveats)
    assert any("BOS" in caveat for caveat in gate.caveats)


def test_the_digest_is_of_the_content(
    trained: tuple[Weights, torch.Tensor], tmp_path: Path
) -> None:
    def digest(folder: Path, *overrides: str) -> str:
        return plan(configured(folder, *overrides))["train_sae"].digest

    first = write_foreign("sae_lens", tmp_path / "a", trained[0]).folder
    again = write_foreign("sae_lens", tmp_path / "b", trained[0]).folder
    assert digest(first) == digest(again)
    assert digest(first) == digest(first, "train_sae.lr=0.002", "train_sae.processes=4")
    other = trained[0]._replace(b_dec=trained[0].b_dec + 1)
    moved = write_foreign("sae_lens", tmp_path / "c", other).folder
    changed_config(again, metadata={"context_size": 128})
    assert len({digest(first), digest(again), digest(moved)}) == 3


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"hook_name": "blocks.2.hook_mlp_out"}, (), "hook_mlp_out"),
        ({"hook_name": "blocks.3.hook_resid_post"}, (), "hook_layer: 4"),
        ({"context_size": 32}, (), "context_length: 32"),
        ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, (), "center_writing"),
        ({}, ("train_sae.retrain={sae: x}",), "give one of them"),
        ({}, ("train_sae.pretrained.release=x",), "give either"),
        ({}, ("sweep_sae.training.pretrained={folder: x}",), "sweep trains"),
    ],
)  # fmt: skip
def test_misfits_are_refused_before_the_first_stage(
    changes: dict[str, Any],
    overrides: tuple[str, ...],
    said: str,
    trained: tuple[Weights, torch.Tensor],
    tmp_path: Path,
) -> None:
    folder = write_foreign("sae_lens", tmp_path, trained[0]).folder
    changed_config(folder, metadata=changes)
    store = ArtifactStore(tmp_path / "store")
    with pytest.raises(BadInputError, match=said):
        run_pipeline(configured(folder, *overrides), store=store, report=SilentReporter())
    assert not (tmp_path / "store" / "sync_tokenizer").exists()


@pytest.mark.parametrize(
    ("changes", "width", "said"),
    [({"prepend_bos": True}, 64, "BOS"), ({}, 32, "width 32")],
)
def test_what_needs_the_model_is_refused_before_any_text(
    changes: dict[str, Any],
    width: int,
    said: str,
    trained: tuple[Weights, torch.Tensor],
    debug_store: Path,
    tmp_path: Path,
) -> None:
    W_enc, b_enc, W_dec, b_dec, threshold = trained[0]
    narrow = Weights(W_enc[:width], b_enc, W_dec[:, :width], b_dec[:width], threshold)
    folder = write_foreign("sae_lens", tmp_path, narrow).folder
    changed_config(folder, metadata=changes)
    shutil.copytree(debug_store / "sync_tokenizer", tmp_path / "store" / "sync_tokenizer")
    store = ArtifactStore(tmp_path / "store")
    with pytest.raises(BadInputError, match=said):
        run_pipeline(configured(folder), store=store, report=SilentReporter())
    assert not list((tmp_path / "store" / "ingest").glob("*"))
