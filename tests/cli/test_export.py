"""Exports of a tiny labelled run, read back by the projects they are for.

The readers' packages ask for other versions of torch's and transformers' companions than this
project pins, so they are not installed beside it: `make readers` puts them, without what they
depend on, into a folder that only the reading processes see.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from rldecoder.artifacts.catalogue import Labels
from rldecoder.cli.export import ExportInputs, Names, Tool, write_export
from rldecoder.config.interp import LabelFeaturesConfig, PredicateSettings, RankFeaturesConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.errors import BadInputError
from rldecoder.interp.corpus import SplitFirings, read_firings
from rldecoder.interp.exports import delphi_cache, neuronpedia
from rldecoder.interp.records import FeatureLabels
from rldecoder.interp.shown import shown
from rldecoder.sae.model import Sae
from rldecoder.schemas import read_json
from rldecoder.stages.table import stage_named
from tests.conftest import ROOT
from tests.forked import ForkServer
from tests.stages.interp_inputs import HOOK_LAYER, LENGTH, NUM_LATENTS, make_inputs, run_stage
from tests.stages.published import published

READERS = Path(os.environ.get("RLDECODER_EXPORT_READERS", ROOT / "build" / "export_readers"))
NAMES = Names("tiny-model", "res-test", "Ann", "user-1")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

needs_readers = pytest.mark.skipif(
    not (READERS / "delphi").is_dir(), reason="the readers are not here; run `make readers`"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("export")
    inputs = make_inputs(folder, tiny_lm_dir)
    rank = RankFeaturesConfig(
        domains=("label",), budget_tokens=256, validation_tokens=48, validation_top=3,
        validation_others=3,
    )  # fmt: skip
    run_stage(stage_named("rank_features"), inputs, rank, folder / "rank")
    label = LabelFeaturesConfig(
        num_features=24, control_features=5, control_tokens=300,
        predicate=PredicateSettings(min_score=0.35),
    )  # fmt: skip
    run_stage(stage_named("label_features"), inputs, label, folder / "label")
    return inputs


@pytest.fixture(scope="module")
def split(folders: dict[str, Path]) -> SplitFirings:
    """All firings on the `label` split, straight from cache and SAE."""
    sae = Sae.load(folders["train_sae"] / "sae")
    return read_firings(ActivationReader(folders["cache_activations"], "label"), sae, split="label")


def _inputs(folders: dict[str, Path]) -> ExportInputs:
    kinds = get_type_hints(ExportInputs)
    return ExportInputs(
        **{name: published(kind, folders[kind.stage]) for name, kind in kinds.items()}
    )


def _export(folders: dict[str, Path], tool: Tool, out: Path) -> Path:
    return write_export(
        _inputs(folders), tool, out, NAMES,
        fit_tokens=10**6, dataset="topics (split label)", created_at=NOW,
    )  # fmt: skip


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")]


def _read(code: str, *arguments: Path) -> Any:
    """Run a reader in a process of its own; what it prints last is JSON."""
    path = f"import json, sys; sys.path.append({str(READERS)!r}); folder = sys.argv[1]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + code, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_saedashboard_batches_hold_what_was_measured(
    folders: dict[str, Path], split: SplitFirings, tmp_path: Path
) -> None:
    out = _export(folders, Tool.SAEDASHBOARD, tmp_path / "out")
    (path,) = out.iterdir()
    assert path.name == "batch-0.json"
    batch = read_json(path)
    assert (batch["model_id"], batch["layer"]) == ("tiny-model", HOOK_LAYER - 1)
    labels = FeatureLabels.load(Labels.labels.path(folders["label_features"]))
    assert [f["feature_index"] for f in batch["features"]] == sorted(
        feature.latent for feature in labels.features
    )
    shown = {f["feature_index"]: f for f in batch["features"]}
    for record in labels.features:
        feature = shown[record.latent]
        acts = split.firings.row(record.latent)[1]
        assert feature["frac_nonzero"] == acts.size / split.grid.cells.size
        assert sum(feature["freq_hist_data_bar_heights"]) == acts.size
        assert feature["pos_str"] == [effect.token for effect in record.promoted]
        assert sum(feature["logits_hist_data_bar_heights"]) > 100
        top = feature["activations"][0]
        assert (top["bin_min"], top["bin_contains"]) == (-1, -1)
        assert max(top["values"]) == pytest.approx(acts.max(), rel=1e-3)
        assert top["values"][top["qualifying_token_index"]] == max(top["values"])
        for example in feature["activations"]:
            assert len(example["tokens"]) == len(example["values"])
            act = example["values"][example["qualifying_token_index"]]
            assert example["bin_min"] < act * 1.001
            assert act * 0.999 <= example["bin_max"]
            if example["bin_contains"] >= 0:
                inside = (acts > example["bin_min"]) & (acts <= example["bin_max"])
                assert example["bin_contains"] == pytest.approx(
                    inside.sum() / split.grid.cells.size
                )


def test_neuronpedia_files_follow_the_import(folders: dict[str, Path], tmp_path: Path) -> None:
    target = _export(folders, Tool.NEURONPEDIA, tmp_path / "out")
    assert target == tmp_path / "out" / "tiny-model" / f"{HOOK_LAYER - 1}-res-test"
    # What the site's importer asks for, and all that its tables know.
    for table, keys in METADATA.items():
        (line,) = [json.loads(text) for text in (target / f"{table}.jsonl").read_text().split("\n")
                   if text]  # fmt: skip
        assert keys <= set(line)
        assert line["createdAt"] == NOW.isoformat()
    labels = FeatureLabels.load(Labels.labels.path(folders["label_features"]))
    by_index = {str(feature.latent): feature for feature in labels.features}
    features = _lines(target / "features" / "batch-0.jsonl.gz")
    activations = _lines(target / "activations" / "batch-0.jsonl.gz")
    explanations = _lines(target / "explanations" / "batch-0.jsonl.gz")
    for rows, known in ((features, FEATURE), (activations, ACTIVATION), (explanations, EXPLAINED)):
        assert all(row.keys() == rows[0].keys() for row in rows)
        assert set(rows[0]) <= known
        assert {row["layer"] for row in rows} == {target.name}
    assert {row["index"] for row in features} == set(by_index)
    ids = [row["id"] for row in activations + explanations]
    assert len(set(ids)) == len(ids)
    assert {len(name) for name in ids} == {25}
    for row in activations:
        assert row["maxValue"] == max(row["values"]) == row["values"][row["maxValueTokenIndex"]]
    # What passed no test is described, and says so; nobody else's words stand in for it.
    assert {row["index"] for row in explanations} == set(by_index)
    for row in explanations:
        feature = by_index[row["index"]]
        notes = json.loads(row["notes"])
        said = shown(feature)
        assert (row["description"], notes["is_label"]) == (said.text, said.is_label)
        assert said.is_label or said.text.startswith("not labelled; ")
        assert notes["confidence"] == feature.confidence
        assert notes["raises"] == [gain.token for gain in feature.output.raised]
    again = _export(folders, Tool.NEURONPEDIA, tmp_path / "again")
    assert [path.read_bytes() for path in sorted(target.rglob("*.gz"))] == [
        path.read_bytes() for path in sorted(again.rglob("*.gz"))
    ]


def test_bad_neuronpedia_names_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in ("../up", "", ".hidden", "a/b"):
        with pytest.raises(BadInputError, match="Neuronpedia id"):
            write_export(
                _inputs(folders), Tool.NEURONPEDIA, tmp_path / "out",
                NAMES._replace(source_set=name), fit_tokens=1000, dataset="x", created_at=NOW,
            )  # fmt: skip
    assert not list(tmp_path.rglob("*"))


def test_delphi_has_no_name_for_the_embeddings() -> None:
    assert delphi_cache.hookpoint(24) == "layers.23"
    with pytest.raises(BadInputError, match="layer 0"):
        delphi_cache.hookpoint(0)


@needs_readers
def test_saedashboard_reads_its_batch(folders: dict[str, Path], tmp_path: Path) -> None:
    out = _export(folders, Tool.SAEDASHBOARD, tmp_path / "out")
    found = _read(
        "from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch\n"
        "print(json.dumps(NeuronpediaDashboardBatch(**json.load(open(folder))).to_dict()))",
        out / "batch-0.json",
    )
    assert found == read_json(out / "batch-0.json")


@needs_readers
def test_neuronpedia_client_reads_the_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    target = _export(folders, Tool.NEURONPEDIA, tmp_path / "out")
    # Its database calls `layer` what its client calls `source`. Its importer and its site mark top
    # activations by -1 as their interval and share; its client wants a share, or none.
    found = _read(
        "import dataclasses, gzip\n"
        "from neuronpedia.np_activation import Activation\n"
        "from neuronpedia.np_explanation import Explanation\n"
        "def rows(kind, reader):\n"
        "    lines = gzip.open(f'{folder}/{kind}/batch-0.jsonl.gz', 'rt')\n"
        "    rows = [json.loads(line) for line in lines]\n"
        "    for row in rows:\n"
        "        row['source'] = row['layer']\n"
        "        if row.get('binContains') == -1:\n"
        "            row['binContains'] = None\n"
        "    return [dataclasses.asdict(reader.from_np_db_json(row)) for row in rows]\n"
        "print(json.dumps([rows('activations', Activation), rows('explanations', Explanation)]))",
        target,
    )
    activations, explanations = found
    written = _lines(target / "activations" / "batch-0.jsonl.gz")
    assert [row["values"] for row in activations] == [row["values"] for row in written]
    assert [row["quantileMax"] for row in activations] == [row["binMax"] for row in written]
    assert [row["text"] for row in explanations] == [
        row["description"] for row in _lines(target / "explanations" / "batch-0.jsonl.gz")
    ]


@needs_readers
@pytest.mark.slow
def test_delphi_reads_its_cache(
    folders: dict[str, Path], split: SplitFirings, tmp_path: Path
) -> None:
    target = _export(folders, Tool.DELPHI, tmp_path / "latents")
    assert target.name == f"layers.{HOOK_LAYER - 1}"
    found = _read(
        "from delphi.config import ConstructorConfig, SamplerConfig\n"
        "from delphi.latents import LatentDataset\n"
        "from transformers import AutoTokenizer\n"
        "data = LatentDataset(folder, SamplerConfig(n_examples_train=4, n_examples_test=4,\n"
        "    n_quantiles=2), ConstructorConfig(min_examples=8, example_ctx_len=8,\n"
        "    n_non_activating=3), AutoTokenizer.from_pretrained(sys.argv[2]))\n"
        "read = {}\n"
        "for buffer in data.buffers:\n"
        "    for item in buffer:\n"
        "        part = item.activation_data\n"
        "        read[item.latent.latent_index] = [part.locations.tolist(),\n"
        "            part.activations.tolist()]\n"
        "records = [(r.latent.latent_index, r.max_activation, len(r.train)) for r in data]\n"
        "print(json.dumps([read, data.tokens.tolist(), records]))",
        tmp_path / "latents", folders["sync_tokenizer"] / "model",
    )  # fmt: skip
    read, tokens, records = found
    assert (np.array(tokens)[:, 1:] == split.grid.tokens[:, 1:]).all()
    alive = np.flatnonzero(split.firings.counts)
    assert sorted(map(int, read)) == alive.tolist()
    for latent in alive:
        cells, acts = split.firings.row(int(latent))
        locations, values = read[str(latent)]
        row, pos = np.divmod(cells, LENGTH)
        assert locations == [[r, p, latent] for r, p in zip(row, pos, strict=True)]
        np.testing.assert_array_equal(np.array(values, np.float32), acts)
    assert len(records) > 10
    for latent, strongest, examples in records:
        assert strongest == pytest.approx(float(split.firings.row(latent)[1].max()), rel=1e-6)
        assert examples > 0
    files = {tuple(map(int, path.stem.split("_"))) for path in target.glob("*.safetensors")}
    assert len(files) == 5
    assert max(last for _, last in files) == NUM_LATENTS - 1


METADATA = {
    "release": {"name", "description", "creatorName", "creatorId"},
    "model": {"id", "instruct", "creatorId", "layers", "neuronsPerLayer", "owner", "updatedAt"},
    "sourceset": {"modelId", "name", "creatorId", "description", "type", "creatorName"},
    "source": {"id", "modelId", "setName", "creatorId"},
}
"""Columns without a default in the site's tables, read from its `neuronpedia-utils`."""

FEATURE = {
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "createdAt", "creatorId", "decoder_weights_dist", "frac_nonzero",
    "freq_hist_data_bar_heights", "freq_hist_data_bar_values", "hasVector", "hookName", "index",
    "layer", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "maxActApprox",
    "modelId", "neg_str", "neg_values", "neuron_alignment_indices", "neuron_alignment_l1",
    "neuron_alignment_values", "pos_str", "pos_values", "topkCosSimIndices", "topkCosSimValues",
    "vector", "vectorDefaultSteerStrength", "vectorLabel",
}  # fmt: skip
ACTIVATION = {
    "binContains", "binMax", "binMin", "createdAt", "creatorId", "dataIndex", "dataSource",
    "dfaMaxValue", "dfaTargetIndex", "dfaValues", "id", "index", "layer", "logitContributions",
    "lossValues", "maxValue", "maxValueTokenIndex", "minValue", "modelId",
    "qualifyingTokenIndex", "tokens", "values",
}  # fmt: skip
EXPLAINED = {
    "authorId", "createdAt", "description", "embedding", "explanationModelName", "id", "index",
    "layer", "modelId", "notes", "triggeredById", "typeName",
}  # fmt: skip
"""All columns that the importer knows, of three tables."""


def test_export_wants_a_finished_run_and_an_empty_folder(forks: ForkServer, tmp_path: Path) -> None:
    def export(*arguments: str) -> str:
        done = forks.run(
            "export", "configs/debug.yaml", *arguments, "--store", str(tmp_path / "store")
        )
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    out = str(tmp_path / "out")
    assert "has not come far enough to export" in export("delphi", out)
    assert "neuronpedia, saedashboard, delphi" in export("excel", out)
    assert "Add --author-id" in export("neuronpedia", out)  # never under someone else's account
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert "not an empty folder" in export("delphi", out)


def test_ids_of_a_source_name_layer_and_set() -> None:
    names = neuronpedia.Publication("m", "set", "u", "Ann", "title", NOW)
    material = type("Material", (), {"layer": 7})()
    assert neuronpedia.source_id(material, names) == "7-set"
