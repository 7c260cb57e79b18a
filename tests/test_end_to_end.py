"""The debug run, all stages: what it publishes, that it repeats, that it repairs itself.

That Prefect gives the same digests and bytes is tested in tests/flows/test_cli_run.py.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import yaml

from rldecoder import schemas
from rldecoder.artifacts.store import ArtifactStore
from rldecoder.config.run import load_run_config
from rldecoder.reporting import SilentReporter
from rldecoder.runner import plan, run_pipeline
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT
from tests.forked import ForkServer

CONFIG = ROOT / "configs" / "debug.yaml"

pytestmark = pytest.mark.slow


def test_all_stages_are_published_and_intact(debug_store: Path) -> None:
    store = ArtifactStore(debug_store)
    for ref in plan(load_run_config(CONFIG)).values():
        manifest = store.verify(ref)
        assert manifest.files, ref
        assert not store.progress_path(ref).exists()


def test_second_run_does_no_work(forks: ForkServer, debug_store: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in debug_store.rglob("*") if p.is_file()}
    result = forks.run("run", str(CONFIG), "--store", str(debug_store), "--no-prefect")
    assert result.returncode == 0, result.stderr
    assert "0 stages built, 19 reused" in result.stderr
    after = {p: p.stat().st_mtime_ns for p in debug_store.rglob("*") if p.is_file()}
    assert {
        p: t for p, t in after.items() if ".locks" not in p.parts and "wandb" not in p.parts
    } == {p: t for p, t in before.items() if ".locks" not in p.parts and "wandb" not in p.parts}


def test_summary_shows_targets_examples_and_report(debug_store: Path) -> None:
    shown = (debug_store / "stdout.txt").read_text()
    assert "Targets of the original plan" in shown
    # What was built in three lines, before all else; what to type next at the end.
    words = " ".join(shown.split("Targets of the original plan")[0].split())
    for part in (
        " decoder is not frozen: ",
        "nats a token",
        "Labels of high confidence",
        "PPO added",
    ):
        assert part in words, part
    assert "rldecoder explain" in shown.split("next:")[1]
    assert "report.html" in shown.strip().splitlines()[-1]
    targets = schemas.read_json(
        ArtifactStore(debug_store).path(plan(load_run_config(CONFIG))["evaluate"]) / "targets.json"
    )
    assert len(targets) >= 11
    assert any(row["met"] is False for row in targets), "a random model cannot meet everything"


def test_damaged_shard_is_rebuilt_and_nothing_else(debug_store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(debug_store, copy)
    run = load_run_config(CONFIG)
    store = ArtifactStore(copy)
    shard = store.path(plan(run)["cache_activations"]) / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    report = SilentReporter()
    results = run_pipeline(run, store=store, report=report, until="gate_sae", device="cpu")
    assert [r.ref.stage for r in results if not r.reused] == ["cache_activations"]
    assert any("not what was published" in note for note in report.notes)
    assert store.verify(results[3].ref)


def test_hook_layer_out_of_range_is_said_before_any_training(
    forks: ForkServer, debug_store: Path
) -> None:
    result = forks.run(
        "run", str(CONFIG), "--store", str(debug_store), "--no-prefect",
        "--set", "cache_activations.hook_layer=9", "--set", "baselines.lens_layers=[9]",
    )  # fmt: skip
    assert result.returncode == 2
    assert "The model has 4 blocks" in " ".join(result.stderr.split())


def test_status_of_a_finished_run(forks: ForkServer, debug_store: Path) -> None:
    result = forks.run("status", str(CONFIG), "--store", str(debug_store))
    assert result.returncode == 0
    assert result.stdout.count("published") == len(STAGES)


def test_explain_prints_both_predictions_and_claims(forks: ForkServer, debug_store: Path) -> None:
    result = forks.run("explain", str(CONFIG), "3 + 4 =", "--store", str(debug_store))
    assert result.returncode == 0, result.stderr
    assert "frozen" in result.stdout.lower()
    assert "decoder" in result.stdout.lower()
    assert "active" in result.stdout.lower()
    # How far the text is from the run's; caveats in one line, or all of them where asked for.
    said = " ".join(result.stdout.split())
    assert "on the run's held-out text" in said
    assert re.search(r"\d+ caveats of this run \(.*gate_sae \d.*\); --caveats lists them", said)
    asked = forks.run("explain", str(CONFIG), "3 + 4 =", "--caveats", "--store", str(debug_store))
    assert asked.stdout.count("caveat ") > 2


def test_explain_as_json_and_as_a_page(
    forks: ForkServer, debug_store: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    result = forks.run(
        "explain", str(CONFIG), "a </script>\u202e b", "--store", str(debug_store), "--json",
        "--html", str(page),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    value = json.loads(result.stdout)
    assert value["prompt"] == "a </script>\u202e b"
    assert value["run"] == "debug"
    assert value["artifacts"]["train_explainer"]
    for who in ("frozen", "decoder"):
        assert len(value[who]["top"]) == 3
    assert set(value["familiarity"]) == {"fvu", "of_run", "num_tokens", "verdict"}
    assert all(claim["sentence"] and claim["verdict"] for claim in value["claims"])
    assert {"latent", "label", "confidence"} <= set(value["ranked"][0])
    html = page.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert "script" not in re.findall(r"<([a-z0-9]+)", html)
    assert "&lt;/script&gt;" in html
    assert "\u202e" not in html
    for feature in value["ranked"]:
        assert f"#{feature['latent']}" in html
    refused = forks.run(
        "explain", str(CONFIG), "a b", "--store", str(debug_store), "--html", str(tmp_path)
    )
    assert refused.returncode == 2
    assert "cannot be written" in " ".join(refused.stderr.split())  # wrapped by width


def test_report_command_prints_the_path(forks: ForkServer, debug_store: Path) -> None:
    result = forks.run("report", str(CONFIG), "--store", str(debug_store))
    assert result.returncode == 0, result.stderr
    path = Path(result.stdout.strip().splitlines()[-1].removeprefix("report: "))
    assert "<html" in path.read_text(encoding="utf-8")[:2000].lower()


def test_labels_are_estimated_and_nothing_is_sent(
    forks: ForkServer, debug_store: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        endpoint = {
            "kind": "endpoint", "base_url": f"http://127.0.0.1:{server.getsockname()[1]}/v1",
            "model": "some", "api_key_env": None, "price_input": 1.0, "price_output": 2.0,
        }  # fmt: skip
        run = yaml.safe_load(CONFIG.read_text())
        wanted = {"labelers": ["predicate", "llm"], "llm": {"labeler": endpoint}}
        run["label_features"] = {**run["label_features"], **wanted}
        config = tmp_path / "mine.yaml"
        config.write_text(yaml.safe_dump(run))
        result = forks.run("estimate-labels", str(config), "--store", str(debug_store))
        assert result.returncode == 0, result.stderr
        with pytest.raises(TimeoutError):
            server.accept()
    shown = {
        cells[0].strip(): cells[1].strip()
        for cells in (line.strip("│ ").split("│") for line in result.stdout.splitlines())
        if len(cells) == 3
    }
    assert int(shown["requests still to send"].replace(",", "")) > 0
    assert float(shown["US dollars"]) > 0
    refs = plan(load_run_config(config))
    assert not ArtifactStore(debug_store).progress_path(refs["label_features"]).exists()
