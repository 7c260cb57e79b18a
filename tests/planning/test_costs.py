"""The arithmetic of plans, against torch's count of FLOPs and what the debug run has written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rldecoder.config.model import SyncTokenizerConfig
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.lm.frozen import FrozenLM
from rldecoder.planning.costs import replay_stream_tokens, stage_cost, streamed_tokens
from rldecoder.planning.sizes import ModelSizes, model_sizes
from rldecoder.planning.sizing import Cost, Sizing
from rldecoder.sae.model import Sae
from rldecoder.sae.spec import SaeSpec
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

LENGTH = 64


def debug(*overrides: str) -> RunConfig:
    return load_run_config(ROOT / "configs" / "debug.yaml", list(overrides))


def cost(stage: str, *overrides: str) -> Cost:
    run = debug(*overrides)
    return stage_cost(stage, Sizing(run, model_sizes(run.sync_tokenizer)))


def of_folder(folder: Path) -> ModelSizes:
    return model_sizes(SyncTokenizerConfig(model="folder", path=str(folder)))


@pytest.mark.parametrize("fixture", ["tiny_lm_dir", "tiny_llama_dir"])
def test_sizes_and_flops_are_the_models_own(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    sizes, lm = of_folder(folder), FrozenLM.load(folder)
    assert sizes.constants.parameters == sum(p.numel() for p in lm.model.parameters())
    assert sizes.weight_bytes == (folder / "model.safetensors").stat().st_size

    lm.model.set_attn_implementation("eager")  # fused attention is not counted on a CPU
    ids = torch.randint(0, 500, (2, LENGTH))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.model(ids)
    counted = counter.get_total_flops() / ids.numel()
    # Of learned positions and norms, which multiply nothing, a large model has next to none.
    idle = 2 * sum(
        p.numel() for name, p in lm.model.named_parameters() if p.ndim == 1 or "wpe" in name
    )
    assert sizes.forward_flops(LENGTH) - idle == pytest.approx(counted, rel=0.01)


def test_encoding_is_one_dense_product() -> None:
    sae = Sae(SaeSpec(d_model=64, num_latents=256, k=16, architecture="topk"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        sae.encode(torch.randn(8, 64))
    run = debug()
    sizing = Sizing(run, model_sizes(run.sync_tokenizer))
    assert sizing.encode == pytest.approx(counter.get_total_flops() / 8, rel=0.01)


def written(store: Path, stage: str) -> dict[str, int]:
    (path,) = store.glob(f"{stage}/*/manifest.json")
    return {name: entry["size"] for name, entry in json.loads(path.read_text())["files"].items()}


@pytest.mark.parametrize(
    ("stage", "within"),
    [
        ("sync_tokenizer", 0.1),
        ("baselines", 0.1),
        ("sweep_sae", 0.1),
        ("cache_activations", 0.01),
        ("train_sae", 0.1),
        ("train_decoder", 0.1),
        ("train_ppo", 0.1),
        ("freeze_decoder", 0.1),
        ("ingest", 0.3),
        ("label_features", 0.5),
    ],
)
def test_disk_is_what_the_debug_run_has_written(
    debug_store: Path, stage: str, within: float
) -> None:
    assert cost(stage).disk_bytes == pytest.approx(
        sum(written(debug_store, stage).values()), rel=within
    )


def test_the_whole_run_fits_what_is_planned(debug_store: Path) -> None:
    for stage in STAGES:
        planned = cost(stage.name).disk_bytes
        assert sum(written(debug_store, stage.name).values()) <= 1.3 * planned, stage.name


def test_tokens_of_the_cache_are_those_that_ran(debug_store: Path) -> None:
    (path,) = debug_store.glob("cache_activations/*/manifest.json")
    metrics = json.loads(path.read_text())["metrics"]
    rows = sum(
        metrics[f"tokens_{name}"] for name in ("train", "validation", "label", "test", "ood")
    )
    # The rows are without each sequence's first position, and without sinks.
    assert (
        cost("cache_activations").tokens * (LENGTH - 1) // LENGTH == rows + metrics["sink_tokens"]
    )


def test_work_grows_as_its_settings_say() -> None:
    base = cost("train_sae")
    twice = cost("train_sae", "train_sae.budget_tokens=131072")
    assert twice.flops / base.flops == pytest.approx(2, rel=0.05)
    assert twice.disk_bytes == base.disk_bytes
    assert cost("train_sae", "train_sae.expansion=8").disk_bytes == pytest.approx(
        2 * base.disk_bytes, rel=0.01
    )
    deep = cost("train_decoder", "train_decoder.depth=2")
    assert deep.disk_bytes > 2 * cost("train_decoder").disk_bytes
    both = cost("control_ppo").flops
    assert cost("control_ppo", "control_ppo.supervised_continuation=false").flops < both / 2
    many = cost("train_ppo", "train_ppo.seeds=3")
    assert many.flops == pytest.approx(3 * cost("train_ppo").flops)
    assert cost("sweep_sae", "sweep_sae.layers=[]", "frontier.depths=[]").flops == 0


def test_a_stream_runs_the_model_once_an_epoch() -> None:
    def streamed(*overrides: str) -> int:
        run = debug("train_sae.source=stream", *overrides)
        return streamed_tokens(Sizing(run, model_sizes(run.sync_tokenizer)))

    assert streamed() == 16384  # fits one window, so four epochs read it from memory
    assert streamed("train_sae.window_bytes=100000") == 65536
    assert streamed("train_sae.stream_tokens=8192") == 8192
    run = debug("train_sae.source=stream")
    sizing = Sizing(run, model_sizes(run.sync_tokenizer))
    more = stage_cost("train_sae", sizing).flops - cost("train_sae").flops
    assert more == pytest.approx(16384 * sizing.trunk)


def test_a_streamed_buffer_is_computed_in_whole_windows() -> None:
    def streamed(visits: int, *overrides: str) -> int:
        run = debug("train_ppo.ppo.replay_source=stream", *overrides)
        return replay_stream_tokens(Sizing(run, model_sizes(run.sync_tokenizer)), visits)

    run = debug()
    text, shard = run.ingest.budget_tokens.train, run.cache_activations.shard_tokens
    assert streamed(100) == streamed(10 * text) == text  # one window, read from memory again
    small = "train_ppo.ppo.replay_window_bytes=1"
    more = f"ingest.budget_tokens.train={100 * shard}"
    assert streamed(1, small, more) == shard
    assert streamed(3 * shard + 1, small, more) == 4 * shard
    assert streamed(0) == replay_stream_tokens(Sizing(run, model_sizes(run.sync_tokenizer)), 9) == 0
    sizing = Sizing(run, model_sizes(run.sync_tokenizer))
    stream = cost("train_ppo", "train_ppo.ppo.replay_source=stream").flops
    blocks = sizing.forward - sizing.model.unembed_flops
    assert stream - cost("train_ppo").flops == pytest.approx(text * blocks)
