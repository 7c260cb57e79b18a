"""From published artifacts to the report's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rldecoder import schemas
from rldecoder.dashboard import collect, figures
from rldecoder.dashboard.architecture import Sizes, architecture_plot
from rldecoder.dashboard.claims import METHOD_NAMES
from rldecoder.dashboard.collect import Published, format_value
from rldecoder.dashboard.figures import Bar, Line
from rldecoder.dashboard.report import FigureEntry
from rldecoder.explain.text import visible_text

MODEL_NAMES = {"frozen": "frozen model", "supervised": "supervised decoder", "rl": "RL decoder"}
PLAN_KL = {"supervised": 1.5, "rl": 0.5}


def build_figures(
    inputs: Mapping[str, Published],
    tasks: Sequence[Mapping[str, Any]],
    interpretability: Mapping[str, Any],
    label_controls: Mapping[str, Any],
) -> dict[str, FigureEntry]:
    """All figures by name, those that the run has data for.

    Args:
        inputs: the artifacts of all other stages, by stage name.
        tasks: rows of `tasks.parquet`.
        interpretability: `interpretability.json`.
        label_controls: `controls.json` of the labels.
    """
    drawn = {
        "architecture": _architecture(inputs),
        "lens": _lens(inputs["baselines"]),
        "sweep": _sweep(inputs["sweep_sae"]),
        "frontier": _frontier(inputs["frontier"]),
        "density": _density(inputs["gate_sae"]),
        "tasks": _tasks(tasks),
        "mass": _mass(interpretability["importance_mass"]),
        "top10_mass": _top10_mass(interpretability["importance_mass"]),
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


def _top10_mass(mass: Mapping[str, Any]) -> FigureEntry | None:
    groups: dict[str, list[Bar]] = {"frozen model": [], "decoder": []}
    for domain, by_target in mass.items():
        for target, name in zip(("frozen", "decoder"), groups, strict=True):
            top = by_target.get(target, {}).get("top_k")
            if top is not None and "10" in top:
                share = top["10"]["per_position"]
                groups[name].append(Bar(domain, share["value"], share["low"], share["high"]))
    if not any(groups.values()):
        return None
    return FigureEntry(
        figures.interval_plot(
            groups, x_label="share of all importance, with 95 % interval", target=0.3
        ),
        "The ten largest.",
        "Importance mass of the ten most important features of a position.",
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
        figures.interval_plot({"claims": bars}, x_label="share of claims that hold", target=0.8),
        "Are the claims true?",
        "Right sign and an effect above the noise floor, on held-out predictions.",
    )
