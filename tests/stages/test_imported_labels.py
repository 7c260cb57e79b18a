"""label_features.import: labels of others are published beside ours, with their controls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rldecoder.artifacts.catalogue import Labels
from rldecoder.config.interp import LabelFeaturesConfig, PredicateSettings, RankFeaturesConfig
from rldecoder.dashboard.label_table import OTHERS, OTHERS_OUTPUT, imported_rows, label_columns
from rldecoder.errors import BadInputError
from rldecoder.stages.fingerprints import label_features
from rldecoder.stages.table import stage_named
from tests.stages.interp_inputs import HOOK_LAYER, make_inputs, run_stage
from tests.stages.published import published

RANK = RankFeaturesConfig(
    budget_tokens=128, num_prompts=2, validation_tokens=64, validation_top=4, validation_others=4,
    domains=("label",),
)  # fmt: skip


def explanations(folder: Path, source: str = f"{HOOK_LAYER - 1}-res-tiny") -> Path:
    """One of every latent: a list of tokens, tokens to say, or free words."""
    texts = ('the words "the", "of"', 'say "the"', "something about prepositions")
    path = folder / "neuronpedia.jsonl"
    path.write_text(
        "".join(
            json.dumps({
                "modelId": "tiny", "layer": source, "index": str(latent),
                "description": texts[latent % 3], "typeName": "t", "explanationModelName": "m",
            }) + "\n"
            for latent in range(90)
        ),
        encoding="utf-8",
    )  # fmt: skip
    return path


def config(path: Path | None) -> LabelFeaturesConfig:
    """Small, with or without labels of others."""
    return LabelFeaturesConfig.model_validate(
        {"num_features": 24, "control_features": 10, "control_tokens": 600,
         "predicate": PredicateSettings(min_score=0.35)} | ({"import": path} if path else {})
    )  # fmt: skip


def test_they_are_published_and_shown_beside_ours(tmp_path: Path, tiny_lm_dir: Path) -> None:
    made = make_inputs(tmp_path, tiny_lm_dir)
    run_stage(stage_named("rank_features"), made, RANK, tmp_path / "rank")
    stage = stage_named("label_features")
    _, before = run_stage(stage, dict(made), config(None), tmp_path / "before")
    path = explanations(tmp_path)
    output, out = run_stage(stage, made, config(path), tmp_path / "after")
    artifact = published(Labels, out, output)

    # Our own labels are what they were.
    ours = {file.name: file.read_bytes() for file in before.iterdir()}
    assert not any(name.startswith("imported") for name in ours)
    assert all((out / name).read_bytes() == data for name, data in ours.items())

    found = artifact.imported
    assert found is not None
    assert found.latents == 24
    assert found.rows == found.covered == artifact.imported_rows.num_rows
    assert 0 < found.read_as_input < found.rows
    inputs, outputs = (kind["imported"].latents for kind in (found.methods, found.outputs))
    assert inputs == found.read_as_input == found.methods["ours"].latents
    assert outputs == found.read_as_output == found.outputs["ours"].latents > 0
    assert found.outputs["shuffled"].latents == found.outputs["random_sae"].latents == outputs
    assert inputs + outputs + sum(found.unscored.values()) == found.rows
    assert output.metrics["imported_scored"] == inputs + outputs
    assert found.unscored.keys() == {"not judged: in free words"}
    assert found.words == {}
    # All of them are the same set: its scores are of the latents.
    table = artifact.imported_rows.to_pylist()
    aurocs = [row["output_auroc"] for row in table if row["reading"] == "output"]
    assert any(aurocs)
    assert not any(row["output_auroc"] for row in table if row["reading"] != "output")
    mean = found.outputs["imported"].means["auroc"]
    assert output.metrics["imported_imported_output_auroc"] == mean
    rows = imported_rows(found)
    assert [row[0] for row in rows[:4]] == list(OTHERS.values())
    assert [row[0].split(":")[0] for row in rows[4:8:3]] == [
        OTHERS_OUTPUT["imported"], OTHERS_OUTPUT["ours"],
    ]  # fmt: skip
    assert rows[-1][0] == "labels of others without scores: not judged: in free words"
    assert {len(row) for row in rows} == {len(label_columns())}
    assert imported_rows(published(Labels, before).imported) == []


def test_they_must_be_of_this_sae(tmp_path: Path) -> None:
    path = explanations(tmp_path)
    first = label_features(config(path))["imported"]
    path.write_text(path.read_text().replace("prepositions", "verbs"))
    assert label_features(config(path))["imported"] != first
    with pytest.raises(BadInputError, match=r"label_features\.import"):
        label_features(config(tmp_path / "nothing.jsonl"))


def test_the_setting_survives_a_worker() -> None:
    """A stage's process gets its config as JSON."""
    before = config(Path("x.jsonl"))
    assert LabelFeaturesConfig.model_validate(before.model_dump(mode="json")) == before
