"""From published artifacts to the report's figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from rldecoder.artifacts.catalogue import Baselines, Frontier, SaeGate, Sweep
from rldecoder.curves import read_curves
from rldecoder.dashboard import figures
from rldecoder.dashboard.architecture import Sizes, architecture_plot
from rldecoder.dashboard.claims import METHOD_NAMES
from rldecoder.dashboard.collect import format_value
from rldecoder.dashboard.control_figures import arms_figure, coverage_figure
from rldecoder.dashboard.figures import Dot, Line, Style
from rldecoder.dashboard.report import FigureEntry
from rldecoder.decoder.frontier import FrontierCell
from rldecoder.evals.comparison import FROZEN, RL, SUPERVISED, TaskScore
from rldecoder.explain.claim_scores import ClaimEvaluation
from rldecoder.explain.interpretability import DeletionBenchmark
from rldecoder.explain.plan_values import TOP_K
from rldecoder.interp.calibration import Reliability
from rldecoder.interp.tally import ImportanceMass
from rldecoder.visible_text import visible_text

if TYPE_CHECKING:
    from rldecoder.stages.inputs import ReportInputs

MODEL_NAMES = {FROZEN: "frozen model", SUPERVISED: "supervised decoder", RL: "RL decoder"}
FRONTIER_STYLES: tuple[tuple[Style, Style, str], ...] = (
    ("-", ":", "x"),
    ("--", "-.", "+"),
    ((0, (8, 2, 2, 2)), (0, (1, 4)), "1"),
)
"""For each size of an SAE: style of the decoders, of the splice, marker of the random SAEs."""
PLAN_KL = {SUPERVISED: 1.5, RL: 0.5}
ALL_TASKS = "all"
"""What the controls call the rows over all tasks."""


def build_figures(inputs: ReportInputs, tasks: Sequence[TaskScore]) -> dict[str, FigureEntry]:
    """All figures by name, those that the run has data for.

    Args:
        tasks: every model on every task.
    """
    interpretability = inputs.evaluation.interpretability
    drawn = {
        "architecture": _architecture(inputs),
        "lens": _lens(inputs.baselines),
        "sweep": _sweep(inputs.sweep),
        "frontier": _frontier(inputs.frontier),
        "density": _density(inputs.sae_gate),
        "tasks": _tasks(tasks),
        "arms": arms_figure(inputs.controls.systems.to_pylist(), ALL_TASKS),
        "coverage": coverage_figure(inputs.labels.controls.coverage),
        "mass": _mass(interpretability.importance_mass),
        "top10_mass": _top10_mass(interpretability.importance_mass),
        "calibration": _calibration(inputs.labels.controls.calibration.test),
        "deletion": _deletion(interpretability.deletion),
        "precision": _precision(interpretability.claims),
        **_training(inputs),
    }
    return {name: entry for name, entry in drawn.items() if entry is not None}


def _architecture(inputs: ReportInputs) -> FigureEntry:
    meta = inputs.cache.meta
    active, depth = inputs.sae.metrics["validation_l0"], inputs.supervised.metrics["depth"]
    assert active is not None
    assert depth is not None
    sizes = Sizes(
        model=visible_text(meta.model_name, 24),
        hook_layer=meta.hook_layer,
        num_layers=meta.num_layers,
        d_model=meta.d_model,
        num_latents=inputs.sae_gate.density.num_rows,
        active=format_value(round(float(active))),
        depth=int(depth),
    )
    return FigureEntry(
        architecture_plot(sizes),
        "What was trained on what.",
        "Grey is frozen. The decoder sees the latents alone: no residual, no error term.",
    )


def _lens(baselines: Baselines) -> FigureEntry:
    rows = baselines.lens.to_pylist()
    lines = []
    for lens in sorted({row["lens"] for row in rows}):
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


def _sweep(sweep: Sweep) -> FigureEntry | None:
    """Decoder KL by layer for every SAE size; None where no sweep was asked for."""
    if sweep.cells is None:
        return None
    rows = sweep.cells.to_pylist()
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
        f"Small SAEs, each read by the best affine decoder. Chosen: {sweep.verdict_record.why}.",
    )


def _frontier(frontier: Frontier) -> FigureEntry | None:
    """Decoder KL by depth for every SAE; None where no frontier was asked for."""
    if frontier.cells is None:
        return None
    lines = frontier_lines([FrontierCell(**cell) for cell in frontier.cells.to_pylist()])
    drawn = figures.line_plot(lines, x_label="blocks of the decoder", y_label="KL")
    return FigureEntry(
        drawn,
        "How deep must a decoder be?",
        "Every decoder with the same token budget. Splice: the frozen model itself from the SAE’s "
        f"reconstruction on. Crosses: decoders of random SAEs. {frontier.verdict_record.why}.",
    )


def frontier_lines(cells: Sequence[FrontierCell]) -> list[Line]:
    """A colour a layer and a style an SAE's size: decoders, the splice below them, random SAEs as
    crosses."""
    layers = list(dict.fromkeys(cell.layer for cell in cells))
    sizes = list(dict.fromkeys((cell.k, cell.expansion) for cell in cells))
    several = len({expansion for _, expansion in sizes}) > 1
    trained, splices, random = [], [], []
    for layer, size in dict.fromkeys((cell.layer, (cell.k, cell.expansion)) for cell in cells):
        colour = figures.PALETTE[layers.index(layer) % len(figures.PALETTE)]
        solid, dotted, cross = FRONTIER_STYLES[sizes.index(size) % len(FRONTIER_STYLES)]
        here = sorted(
            (cell for cell in cells if (cell.layer, (cell.k, cell.expansion)) == (layer, size)),
            key=lambda cell: cell.depth,
        )
        own = [cell for cell in here if cell.sae == "trained"]
        lot = [cell for cell in here if cell.sae == "random"]
        name = f"layer {layer}, k {size[0]}" + (f", {size[1]:g}x" if several else "")
        depths = [cell.depth for cell in own]
        trained.append(Line(name, depths, [c.kl for c in own], False, colour, solid, "o"))
        floor = [cell.splice_kl for cell in own]
        splices.append(Line(f"{name}, splice", depths, floor, False, colour, dotted))
        if lot:
            at, kl = [cell.depth for cell in lot], [cell.kl for cell in lot]
            random.append(Line(f"{name}, random", at, kl, False, colour, "none", cross))
    return [*trained, *splices, *random]


def _calibration(test: Reliability) -> FigureEntry:
    def number(value: float | None) -> str:
        return "unknown" if value is None else f"{value:.3f}"

    return FigureEntry(
        figures.reliability_plot([(bin.n, bin.mean_p, bin.accepted) for bin in test.bins]),
        "Is the confidence honest?",
        "Stated confidence of a label against the share accepted on unseen text. "
        f"ECE {number(test.ece)}, Brier score {number(test.brier)}, {test.n} labels.",
    )


def _density(gate: SaeGate) -> FigureEntry:
    return FigureEntry(
        figures.density_plot(gate.density["density"].to_pylist()),
        "How often latents fire",
        "on test text.",
    )


def _training(inputs: ReportInputs) -> dict[str, FigureEntry | None]:
    """Curves of the SAE, the decoder and PPO, from what each of them logged."""
    sae, decoder, ppo = (
        read_curves(type(trained).curves.path(trained.folder))
        for trained in (inputs.sae, inputs.supervised, inputs.policy)
    )
    lengths = [stage["steps"] for stage in inputs.policy.config["stages"]]
    stages = stage_boundaries(lengths, ppo)

    # A curve that a run did not log is left out of its figure, and the figure without curves too.
    return {
        "sae": _curves(
            {
                "unexplained variance": sae.get("validation_fvu"),
                "dead latents": sae.get("dead_fraction"),
            },
            "step",
            "share",
            "SAE training.",
            "Share of the residual’s variance left unexplained, on validation text, and of the "
            "latents that are dead.",
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
            target=PLAN_KL[SUPERVISED],
        ),
        "ppo": _curves(
            {"held-out text": ppo.get("eval_kl")},
            "PPO step",
            "KL, nats/token",
            "RL: faithfulness.",
            "KL(frozen || decoder) on validation text during PPO. The plan asks for 0.5.",
            target=PLAN_KL[RL],
            boundaries=stages,
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
            boundaries=stages,
        ),
    }


def stage_boundaries(
    lengths: Sequence[int], curves: Mapping[str, tuple[list[int], list[float]]]
) -> list[int]:
    """The PPO steps after which other reward weights held, as far as the training came.

    Args:
        lengths: steps of each stage of the training.
        curves: what the training logged, steps and values by name.
    """
    ends = list(accumulate(lengths))[:-1]
    last = max((steps[-1] for steps, _ in curves.values() if steps), default=0)
    return [end for end in ends if end < last]


def _curves(
    series: Mapping[str, tuple[list[int], list[float]] | None],
    x_label: str,
    y_label: str,
    title: str,
    caption: str,
    target: float | None = None,
    boundaries: Sequence[int] = (),
) -> FigureEntry | None:
    lines = [Line(name, *found) for name, found in series.items() if found is not None]
    if not lines:
        return None
    drawn = figures.line_plot(
        lines,
        x_label=x_label,
        y_label=y_label,
        target=target,
        boundaries=boundaries,
        boundary_name="other reward weights",
    )
    return FigureEntry(drawn, title, caption)


def _tasks(tasks: Sequence[TaskScore]) -> FigureEntry | None:
    groups = {
        name: [
            Dot(row.task, row.score, row.ci_low, row.ci_high) for row in tasks if row.model == name
        ]
        for name in MODEL_NAMES.values()
    }
    if not tasks:
        return None
    return FigureEntry(
        figures.interval_plot(groups, x_label="score on test prompts, with 95 % interval"),
        "Tasks.",
        "Greedy answers to held-out prompts.",
    )


def _mass(mass: ImportanceMass) -> FigureEntry | None:
    lines = []
    for domain, by_target in mass.root.items():
        for target, found in by_target.items():
            # Every domain on the frozen model; the decoder, which reads no error term, on text.
            if found.top_k is not None and (target == FROZEN or domain == "label"):
                shares = {k: found.top_k[k].per_position.value for k in sorted(found.top_k)}
                known = {k: share for k, share in shares.items() if share is not None}
                name = f"{domain}, {target}"
                lines.append(Line(name, [*known], [*known.values()], dashed=target == "decoder"))
    if not lines:
        return None
    return FigureEntry(
        figures.line_plot(
            lines,
            x_label="top k features of a position",
            y_label="share of all importance",
            markers=True,
            target=0.3,
        ),
        "Importance mass.",
        "The SAE’s error term counts in the whole for the frozen model.",
    )


def _top10_mass(mass: ImportanceMass) -> FigureEntry | None:
    groups: dict[str, list[Dot]] = {"frozen model": [], "decoder": []}
    for domain, by_target in mass.root.items():
        for target, name in zip((FROZEN, "decoder"), groups, strict=True):
            found = by_target.get(target)
            if found is not None and found.top_k is not None and TOP_K in found.top_k:
                share = found.top_k[TOP_K].per_position
                if share.value is not None and share.low is not None and share.high is not None:
                    groups[name].append(Dot(domain, share.value, share.low, share.high))
    if not any(groups.values()):
        return None
    return FigureEntry(
        figures.interval_plot(
            groups, x_label="share of all importance, with 95 % interval", target=0.3
        ),
        "The ten largest.",
        "Importance mass of the ten most important features of a position.",
    )


def _deletion(deletion: DeletionBenchmark) -> FigureEntry:
    rankings = {
        "attribution": deletion.attribution,
        "most active": deletion.method_a,
        "random order": deletion.random,
    }
    lines = [
        Line(name, deletion.ks, scores.comprehensiveness.by_k) for name, scores in rankings.items()
    ]
    return FigureEntry(
        figures.line_plot(
            lines, x_label="features removed", y_label="probability lost", markers=True
        ),
        "Comprehensiveness.",
        "What the prediction loses when the top k features of a ranking go.",
    )


def _precision(claims: ClaimEvaluation) -> FigureEntry | None:
    dots = [
        Dot(shown, scores.precision, scores.precision_low, scores.precision_high)
        for name, shown in METHOD_NAMES.items()
        if (scores := claims.methods.get(name)) is not None
    ]
    if not dots:
        return None
    return FigureEntry(
        figures.interval_plot({"claims": dots}, x_label="share of claims that hold", target=0.8),
        "Are the claims true?",
        "Right sign and an effect above the noise floor, on held-out predictions.",
    )
