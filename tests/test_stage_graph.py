"""The stage graph as a snapshot: rewiring must show up in a diff."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys

from rldecoder.stages.overview import stage_table
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

# fmt: off
GRAPH = {
    "sync_tokenizer": (),
    "ingest": ("sync_tokenizer",),
    "baselines": ("sync_tokenizer", "ingest"),
    "sweep_sae": ("sync_tokenizer", "ingest"),
    "frontier": ("sync_tokenizer", "ingest", "sweep_sae"),
    "cache_activations": ("sync_tokenizer", "ingest"),
    "train_sae": ("sync_tokenizer", "ingest", "cache_activations"),
    "gate_sae": ("sync_tokenizer", "ingest", "cache_activations", "train_sae"),
    "train_decoder": (
        "sync_tokenizer", "ingest", "baselines", "frontier", "cache_activations", "train_sae",
        "gate_sae",
    ),
    "gate_decoder": ("sync_tokenizer", "cache_activations", "train_sae", "train_decoder"),
    "train_ppo": (
        "sync_tokenizer", "ingest", "cache_activations", "train_sae", "train_decoder",
        "gate_decoder",
    ),
    "control_ppo": (
        "sync_tokenizer", "ingest", "cache_activations", "train_sae", "train_decoder",
        "gate_decoder", "train_ppo",
    ),
    "freeze_decoder": (
        "sync_tokenizer", "cache_activations", "train_sae", "train_decoder", "train_ppo",
        "control_ppo",
    ),
    "rank_features": (
        "sync_tokenizer", "ingest", "cache_activations", "train_sae", "freeze_decoder",
    ),
    "label_features": (
        "sync_tokenizer", "ingest", "cache_activations", "train_sae", "freeze_decoder",
        "rank_features",
    ),
    "cluster_features": (
        "sync_tokenizer", "cache_activations", "train_sae", "freeze_decoder", "rank_features",
        "label_features",
    ),
    "train_explainer": (
        "sync_tokenizer", "ingest", "cache_activations", "train_sae", "freeze_decoder",
        "rank_features", "label_features", "cluster_features",
    ),
    "evaluate": (
        "sync_tokenizer", "cache_activations", "train_sae", "gate_sae", "train_decoder",
        "gate_decoder", "train_ppo", "control_ppo", "freeze_decoder", "rank_features",
        "label_features", "train_explainer",
    ),
    "report": (
        "sync_tokenizer", "ingest", "baselines", "sweep_sae", "frontier", "cache_activations",
        "train_sae", "gate_sae", "train_decoder", "gate_decoder", "train_ppo", "control_ppo",
        "freeze_decoder", "rank_features", "label_features", "cluster_features",
        "train_explainer", "evaluate",
    ),
}
# fmt: on


def test_graph_is_the_documented_one() -> None:
    assert {stage.name: stage.upstream for stage in STAGES} == GRAPH
    assert list(GRAPH) == [stage.name for stage in STAGES]


def test_stages_read_only_what_came_before() -> None:
    seen: set[str] = set()
    for stage in STAGES:
        assert set(stage.upstream) <= seen, stage.name
        seen.add(stage.name)


def test_every_artifact_is_read_or_reported() -> None:
    read = {name for stage in STAGES for name in stage.upstream}
    assert {stage.name for stage in STAGES} - read == {"report"}


def test_each_room_is_what_it_says() -> None:
    for stage in STAGES:
        module = importlib.import_module(f"rldecoder.stages.{stage.name}")
        assert callable(module.run)
        assert stage.module == module.__name__
        assert module.__doc__


def test_the_documented_table_is_the_catalogue() -> None:
    """docs/pipeline.md prints it: `python -m rldecoder.stages.overview`."""
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    shown = page.partition("overview` -->\n")[2].partition("<!-- end of stages -->")[0]
    assert shown == stage_table()


def test_planning_and_flows_import_no_torch() -> None:
    """Prefect imports every flow when `make ui` starts, and again for each run."""
    modules = {
        node.module
        for path in (ROOT / "flows").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rldecoder")
    }
    assert "rldecoder.interp.shown" in modules
    code = (
        f"import sys, {', '.join(sorted(map(str, modules)))}; from pathlib import Path\n"
        "from rldecoder.config.run import load_run_config; from rldecoder.runner import plan\n"
        "plan(load_run_config(Path('configs/debug.yaml'), []))\n"
        "print(sorted({'torch', 'transformers', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_gates() -> None:
    assert [s.name for s in STAGES if s.gate] == ["gate_sae", "gate_decoder", "control_ppo"]
