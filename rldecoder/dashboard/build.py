"""From published artifacts to the report's data: tables, words, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rldecoder import schemas
from rldecoder.dashboard import collect, figures
from rldecoder.dashboard.architecture import Sizes, architecture_plot
from rldecoder.dashboard.collect import Published, format_value
from rldecoder.dashboard.figures import Bar, Line
from rldecoder.dashboard.report import FigureEntry, ReportData
from rldecoder.explain.text import visible_text

MODEL_NAMES = {"frozen": "frozen model", "supervised": "supervised decoder", "rl": "RL decoder"}
METHOD_NAMES = {
    "method_b": "Method B",
    "method_a": "Method A (most active)",
    "attribution_above_noise": "attribution above noise",
    "attribution_top_k": "first-order attribution",
    "mean_explanation": "mean explanation",
    "prompt_only": "prompt only",
    "random_features": "random features",
}
LABEL_METHODS = {
    "label": "labels",
    "shuffled": "control: shuffled labels",
    "random_sae": "control: random SAE",
}
PLAN_KL = {"supervised": 1.5, "rl": 0.5}


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
        facts=_facts(targets, faithfulness, meta, inputs),
        caveats=collect.caveats(inputs),
        targets=[_visible_target(row) for row in targets],
        pipeline=collect.pipeline(inputs),
        faithfulness=_faithfulness_rows(faithfulness),
        tasks=[{**row, "model": MODEL_NAMES[row["model"]]} for row in tasks],
        freeze_note=_freeze_note(freeze),
        controls=_controls(inputs["control_ppo"]),
        label_methods=_label_methods(label_controls["methods"]),
        claim_methods=_claim_methods(claims),
        claim_note=_claim_note(claims),
        examples=collect.examples(inputs["train_explainer"].path / "examples.json"),
        features=collect.features(
            inputs["label_features"].path, max_features=max_features, contexts=contexts
        ),
        configs=collect.config_rows(inputs),
        figures=_figures(inputs, tasks, interpretability, label_controls),
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
    meta: Mapping[str, Any],
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
        fact("labels sure", share("label_coverage"), "high confidence"),
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


def _label_methods(methods: Mapping[str, Any]) -> list[list[str]]:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    return [
        [
            shown,
            format_value(found["latents"]),
            format_value(found["labelled"]),
            format_value(found["accepted"]),
            number(found["mean_detection"]),
            number(found["mean_fuzzing"]),
            number(found["mean_f1"]),
        ]
        for name, shown in LABEL_METHODS.items()
        if (found := methods.get(name)) is not None
    ]


def _claim_methods(claims: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, shown in METHOD_NAMES.items():
        found = claims["methods"].get(name)
        if found is None:
            continue
        against = claims["method_b_against"].get(name)
        rows.append(
            [
                shown,
                f"{found['precision']:.3f}",
                f"{found['sign_accuracy']:.3f}",
                f"{found['contradicted']:.3f}",
                f"{found['effect_share']:.3f}",
                "" if found["strength_mae_nats"] is None else f"{found['strength_mae_nats']:.3f}",
                "" if against is None else f"{against['difference']:+.3f}",
                "" if against is None else f"{against['pvalue']:.4f}",
            ]
        )
    return rows


def _claim_note(claims: Mapping[str, Any]) -> str:
    removal = claims["reconstruction"]["removal"]
    halving = claims["reconstruction"]["halving"]
    frozen = claims["frozen_model"]
    parts = [
        f"{claims['num_explained']:,} of {claims['num_positions']:,} held-out predictions got "
        f"claims; trained on {claims['num_pairs']:,} pairs. An effect counts when it exceeds "
        f"{claims['min_effect_nats']:.2f} nats and what 95 % of equally long random directions do "
        f"at the same position (median {claims['median_noise_nats']:.3f} nats).",
        f"From the claims alone, effects of joint removals are predicted with a mean error of "
        f"{removal['claims_mae_nats']:.3f} nats (predicting none: {removal['zero_mae_nats']:.3f}), "
        f"of halving, never seen in training, {halving['claims_mae_nats']:.3f} "
        f"({halving['zero_mae_nats']:.3f}).",
    ]
    if frozen["same_sign"] is not None:
        parts.append(
            f"Of the examples' {frozen['num_claims']} supported claims, "
            f"{100 * frozen['same_sign']:.0f} % have the same sign on the frozen model."
        )
    return " ".join(parts)


def _figures(
    inputs: Mapping[str, Published],
    tasks: Sequence[Mapping[str, Any]],
    interpretability: Mapping[str, Any],
    label_controls: Mapping[str, Any],
) -> dict[str, FigureEntry]:
    drawn = {
        "architecture": _architecture(inputs),
        "lens": _lens(inputs["baselines"]),
        "sweep": _sweep(inputs["sweep_sae"]),
        "frontier": _frontier(inputs["frontier"]),
        "density": _density(inputs["gate_sae"]),
        "tasks": _tasks(tasks),
        "mass": _mass(interpretability["importance_mass"]),
        "calibration": FigureEntry(
            figures.reliability_plot(label_controls["calibration"]["test"]["bins"]),
            "Is the confidence honest?",
            "Stated confidence of a label against the share accepted on unseen text.",
        ),
        "deletion": _deletion(interpretability["deletion"]),
        "precision": _precision(interpretability["claims"]),
        **_training(inputs),
    }
    return {name: entry for name, entry in drawn.items() if entry is not None}


def _architecture(inputs: Mapping[str, Published]) -> FigureEntry:
    meta = schemas.read_json(inputs["cache_activations"].path / "meta.json")
    density = schemas.read_parquet(inputs["gate_sae"].path / "density.parquet", ["density"])
    sizes = Sizes(
        model=visible_text(str(meta["model_name"]), 24),
        hook_layer=meta["hook_layer"],
        num_layers=meta["num_layers"],
        d_model=meta["d_model"],
        num_latents=density.num_rows,
        active=format_value(round(float(inputs["train_sae"].metrics["validation_l0"]))),
        depth=int(inputs["train_decoder"].metrics["depth"]),
    )
    return FigureEntry(
        architecture_plot(sizes),
        "What was trained on what.",
        "Grey is frozen. The decoder sees the latents alone: no residual, no error term.",
    )


def _lens(baselines: Published) -> FigureEntry:
    rows = schemas.read_parquet(baselines.path / "lens.parquet").to_pylist()
    lines = []
    for lens in ("affine", "logit"):
        for split in dict.fromkeys(row["split"] for row in rows):
            points = [row for row in rows if row["lens"] == lens and row["split"] == split]
            lines.append(
                Line(
                    f"{lens} lens, {split}",
                    [row["layer"] for row in points],
                    [row["kl"] for row in points],
                    dashed=split != "test",
                )
            )
    return FigureEntry(
        figures.line_plot(lines, x_label="layer", y_label="KL to the final layer", markers=True),
        "What a layer knows.",
        "KL between the frozen model and a lens on the raw residual stream, nats per token.",
    )


def _sweep(sweep: Published) -> FigureEntry | None:
    """Decoder KL by layer for every SAE size; None where no sweep was asked for."""
    if not (sweep.path / "sweep.parquet").is_file():
        return None
    rows = schemas.read_parquet(sweep.path / "sweep.parquet").to_pylist()
    verdict = schemas.read_json(sweep.path / "verdict.json")
    lines = []
    for size in dict.fromkeys((row["k"], row["expansion"]) for row in rows):
        points = [row for row in rows if (row["k"], row["expansion"]) == size]
        layers = [row["layer"] for row in points]
        name = f"k {size[0]}, {size[1]:g}x"
        lines.append(Line(name, layers, [row["decoder_kl"] for row in points]))
    bare = sorted({row["layer"]: row["residual_lens_kl"] for row in rows}.items())
    lines.append(Line("no SAE", [x for x, _ in bare], [y for _, y in bare], dashed=True))
    return FigureEntry(
        figures.line_plot(lines, x_label="layer", y_label="KL of an affine decoder", markers=True),
        "Which layer to decode?",
        f"Small SAEs, each read by the best affine decoder. Chosen: {verdict['why']}.",
    )


def _frontier(frontier: Published) -> FigureEntry | None:
    """Decoder KL by depth for every SAE; None where no frontier was asked for."""
    if not (frontier.path / "frontier.parquet").is_file():
        return None
    rows = schemas.read_parquet(frontier.path / "frontier.parquet").to_pylist()
    verdict = schemas.read_json(frontier.path / "verdict.json")
    lines = []
    for layer, k in dict.fromkeys((row["layer"], row["k"]) for row in rows):
        own = [row for row in rows if (row["layer"], row["k"]) == (layer, k)]
        points = sorted((r for r in own if r["sae"] == "trained"), key=lambda row: row["depth"])
        depths = [row["depth"] for row in points]
        lines.append(Line(f"layer {layer}, k {k}", depths, [row["kl"] for row in points]))
        floor = [row["splice_kl"] for row in points]
        lines.append(Line(f"layer {layer}, splice", depths, floor, dashed=True))
    return FigureEntry(
        figures.line_plot(lines, x_label="blocks of the decoder", y_label="KL", markers=True),
        "How deep must a decoder be?",
        f"Every decoder with the same token budget. {verdict['why']}.",
    )


def _density(gate: Published) -> FigureEntry:
    density = schemas.read_parquet(gate.path / "density.parquet")["density"].to_pylist()
    return FigureEntry(
        figures.density_plot(density),
        "How often latents fire",
        "on test text.",
    )


def _training(inputs: Mapping[str, Published]) -> dict[str, FigureEntry | None]:
    """Curves of the SAE, the decoder and PPO, from what each of them logged."""
    sae, decoder, ppo = (
        collect.curves(inputs[name].path) for name in ("train_sae", "train_decoder", "train_ppo")
    )
    return {
        "sae": _curves(
            {"validation": sae.get("validation_fvu")},
            "step",
            "unexplained variance",
            "SAE training.",
            "Share of the residual’s variance left unexplained, on validation text.",
        ),
        "decoder": _curves(
            {
                "training batch": decoder.get("kl"),
                "validation": decoder.get("validation_kl"),
                "out of domain": decoder.get("ood_kl"),
            },
            "step",
            "KL, nats/token",
            "Decoder training.",
            "KL(frozen || decoder); training starts from the affine lens. The plan asks for 1.5.",
            target=PLAN_KL["supervised"],
        ),
        "ppo": _curves(
            {"held-out text": ppo.get("eval_kl")},
            "PPO step",
            "KL, nats/token",
            "RL: faithfulness.",
            "KL(frozen || decoder) on validation text during PPO. The plan asks for 0.5.",
            target=PLAN_KL["rl"],
        ),
        "ppo_task": _curves(
            {
                "rollouts, sampled": ppo.get("task_score"),
                "held-out prompts, greedy": ppo.get("eval_task_score"),
            },
            "PPO step",
            "task score",
            "RL: tasks.",
            "Share of prompts answered correctly.",
        ),
    }


def _curves(
    series: Mapping[str, tuple[list[int], list[float]] | None],
    x_label: str,
    y_label: str,
    title: str,
    caption: str,
    target: float | None = None,
) -> FigureEntry | None:
    lines = [Line(name, *found) for name, found in series.items() if found is not None]
    if not lines:
        return None
    drawn = figures.line_plot(lines, x_label=x_label, y_label=y_label, target=target)
    return FigureEntry(drawn, title, caption)


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> FigureEntry | None:
    groups: dict[str, list[Bar]] = {}
    for model, name in MODEL_NAMES.items():
        groups[name] = [
            Bar(row["task"], row["score"], row["ci_low"], row["ci_high"])
            for row in tasks
            if row["model"] == model
        ]
    if not any(groups.values()):
        return None
    return FigureEntry(
        figures.interval_plot(groups, x_label="score on test prompts, with 95 % interval"),
        "Tasks.",
        "Greedy answers to held-out prompts.",
    )


def _mass(mass: Mapping[str, Any]) -> FigureEntry | None:
    lines = []
    for domain, by_target in mass.items():
        for target, found in by_target.items():
            top = found["top_k"]
            # Every domain on the frozen model; the decoder, which reads no error term, on text.
            if top is not None and (target == "frozen" or domain == "label"):
                ks = sorted(top, key=int)
                lines.append(
                    Line(
                        f"{domain}, {target}",
                        [int(k) for k in ks],
                        [top[k]["per_position"]["value"] for k in ks],
                        dashed=target == "decoder",
                    )
                )
    if not lines:
        return None
    return FigureEntry(
        figures.line_plot(
            lines[: len(figures.PALETTE)],
            x_label="top k features of a position",
            y_label="share of all importance",
            markers=True,
            target=0.3,
        ),
        "Importance mass.",
        "The SAE’s error term counts in the whole for the frozen model.",
    )


def _deletion(deletion: Mapping[str, Any]) -> FigureEntry:
    names = {"attribution": "attribution", "method_a": "most active", "random": "random order"}
    lines = [
        Line(names[name], deletion["ks"], deletion[name]["comprehensiveness"]["by_k"])
        for name in names
    ]
    return FigureEntry(
        figures.line_plot(
            lines, x_label="features removed", y_label="probability lost", markers=True
        ),
        "Comprehensiveness.",
        "What the prediction loses when the top k features of a ranking go.",
    )


def _precision(claims: Mapping[str, Any]) -> FigureEntry | None:
    bars = [
        Bar(shown, m["precision"], m["precision_low"], m["precision_high"])
        for name, shown in METHOD_NAMES.items()
        if (m := claims["methods"].get(name)) is not None
    ]
    if not bars:
        return None
    return FigureEntry(
        figures.interval_plot({"claims": bars}, x_label="share of claims that hold"),
        "Are the claims true?",
        "Right sign and an effect above the noise floor, on held-out predictions.",
    )
