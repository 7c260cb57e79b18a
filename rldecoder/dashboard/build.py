"""From published artifacts to the report's data: tables, words, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rldecoder import schemas
from rldecoder.dashboard import collect
from rldecoder.dashboard.build_figures import MODEL_NAMES, build_figures
from rldecoder.dashboard.claims import (
    precision_note,
    precision_rows,
    simulation_columns,
    simulation_note,
    simulation_rows,
)
from rldecoder.dashboard.collect import Published
from rldecoder.dashboard.label_table import label_columns, label_rows
from rldecoder.dashboard.report import ReportData
from rldecoder.explain.text import visible_text


def build_report(
    inputs: Mapping[str, Published], *, title: str, max_features: int, contexts: int
) -> ReportData:
    """Gather everything that the page shows.

    Args:
        inputs: the artifacts of all other stages, by stage name.
        title: heading.
        max_features: features in the browser.
        contexts: example contexts a feature.
    """
    model = schemas.read_json(inputs["sync_tokenizer"].path / "model.json")
    meta = schemas.read_json(inputs["cache_activations"].path / "meta.json")
    faithfulness = schemas.read_json(inputs["evaluate"].path / "faithfulness.json")
    tasks = schemas.read_parquet(inputs["evaluate"].path / "tasks.parquet").to_pylist()
    targets = schemas.read_json(inputs["evaluate"].path / "targets.json")
    interpretability = schemas.read_json(inputs["evaluate"].path / "interpretability.json")
    label_controls = schemas.read_json(inputs["label_features"].path / "controls.json")
    freeze = schemas.read_json(inputs["freeze_decoder"].path / "freeze.json")
    claims = interpretability["claims"]
    return ReportData(
        title=visible_text(title, 120),
        subtitle=_subtitle(model, meta, inputs),
        facts=_facts(targets, faithfulness, interpretability["label_coverage"]["all"], inputs),
        caveats=collect.caveats(inputs),
        targets=[_visible_target(row) for row in targets],
        pipeline=collect.pipeline(inputs),
        faithfulness=_faithfulness_rows(faithfulness),
        tasks=[{**row, "model": MODEL_NAMES[row["model"]]} for row in tasks],
        freeze_note=_freeze_note(freeze),
        controls=_controls(inputs["control_ppo"]),
        label_columns=label_columns(),
        label_methods=label_rows(label_controls),
        claim_methods=precision_rows(claims),
        claim_note=precision_note(claims),
        simulation_columns=simulation_columns(),
        simulation_rows=simulation_rows(claims),
        simulation_note=simulation_note(claims),
        examples=collect.examples(inputs["train_explainer"].path / "examples.json"),
        features=collect.features(
            inputs["label_features"].path,
            inputs["cluster_features"].path,
            max_features=max_features,
            contexts=contexts,
        ),
        configs=collect.config_rows(inputs),
        figures=build_figures(inputs, tasks, interpretability, label_controls),
    )


def summary(data: ReportData, inputs: Mapping[str, Published]) -> dict[str, Any]:
    """`summary.json`: what the page says in numbers, without times."""
    return {
        "title": data.title,
        "targets": data.targets,
        "caveats": data.caveats,
        "faithfulness": data.faithfulness,
        "tasks": data.tasks,
        "stages": {
            name: {
                "digest": artifact.digest,
                "verdict": artifact.verdict,
                "metrics": {
                    key: value
                    for key, value in artifact.metrics.items()
                    if not key.endswith(collect.WALL_SUFFIXES)
                },
            }
            for name, artifact in inputs.items()
        },
    }


def _subtitle(
    model: Mapping[str, Any], meta: Mapping[str, Any], inputs: Mapping[str, Published]
) -> str:
    sae = inputs["train_sae"].config
    name = visible_text(str(model.get("name") or meta["model_name"]), 80)
    tokens = meta["tokens"].get("train")
    trained = f", SAE trained on {tokens:,} cached tokens" if tokens else ""
    return (
        f"{name}, hook layer {meta['hook_layer']} of {meta['num_layers']}, "
        f"{sae.get('architecture', '')} SAE{trained}."
    )


def _facts(
    targets: Sequence[Mapping[str, Any]],
    faithfulness: Mapping[str, Any],
    coverage: Mapping[str, Any],
    inputs: Mapping[str, Published],
) -> list[dict[str, str]]:
    value = {row["key"]: row["value"] for row in targets}
    met = sum(row["met"] is True for row in targets)
    unknown = sum(row["met"] is None for row in targets)
    test = faithfulness["test"]

    def fact(name: str, text: str, more: str = "") -> dict[str, str]:
        return {"name": name, "value": text, "more": more}

    def share(key: str) -> str:
        return "–" if value[key] is None else f"{100 * value[key]:.0f} %"

    wall = sum(artifact.wall_seconds for artifact in inputs.values())
    return [
        fact("targets met", f"{met} of {len(targets)}", f"{unknown} unknown" if unknown else ""),
        fact("KL, supervised", f"{test['supervised']['kl']:.2f}", "nats/token"),
        fact("KL, after RL", f"{test['rl']['kl']:.2f}", "nats/token"),
        fact("agreement", share("agreement"), "first choice"),
        fact("SAE variance explained", share("explained_variance")),
        fact(
            "labels sure",
            share("label_coverage"),
            f"Wilson 95 %: {100 * coverage['low']:.0f} to {100 * coverage['high']:.0f} %, "
            f"of {coverage['features']}",
        ),
        fact("wall time", collect.format_seconds(wall), "all stages"),
    ]


def _visible_target(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "note": visible_text(row["note"], 400)}


def _model_order(item: tuple[str, Any]) -> int:
    return [*MODEL_NAMES].index(item[0])


def _faithfulness_rows(faithfulness: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"model": MODEL_NAMES[model], "split": split, **values}
        for split in ("test", "ood")
        for model, values in sorted(faithfulness[split].items(), key=_model_order)
    ]


def _freeze_note(freeze: Mapping[str, Any]) -> str:
    which = {"ppo": "the RL decoder", "supervised": "the supervised decoder"}[freeze["which"]]
    if freeze["frozen"]:
        return f"Frozen: {which} is final."
    reasons = "; ".join(visible_text(reason, 300) for reason in freeze["reasons"])
    return f"Not frozen. {which[0].upper()}{which[1:]} is published as final, because {reasons}."


def _controls(control: Published) -> dict[str, Any]:
    rows = schemas.read_parquet(control.path / "controls.parquet").to_pylist()
    verdict = schemas.read_json(control.path / "verdict.json")
    shown = [
        (
            row["system"].replace("_", " ") + (" (control)" if row["gates"] else ""),
            f"{row['score']:.3f}",
            f"{row['score_low']:.3f} – {row['score_high']:.3f}",
            f"{row['num_prompts']}",
            f"{row['kl']:.3f}",
            f"{row['kl_low']:.3f} – {row['kl_high']:.3f}",
        )
        for row in rows
        if row["task"] == "all"
    ]
    return {
        "columns": ("system", "task score", "95 %", "prompts", "KL, nats/token", "95 %"),
        "rows": shown,
        "verdict": verdict["verdict"],
        "reasons": "; ".join(visible_text(reason, 300) for reason in verdict["reasons"]),
    }
