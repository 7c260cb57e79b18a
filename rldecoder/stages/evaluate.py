"""Stage evaluate: frozen model, supervised decoder and RL decoder side by side on held-out data.

Publishes `tasks.parquet` (scores with intervals), `answers.parquet` (every completion),
`faithfulness.json` (test and ood), `interpretability.json` and `targets.json` (every target of
the plan, met, missed or unknown).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from rldecoder import schemas
from rldecoder.config.explain import EvaluateConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.faithfulness import Faithfulness, decoder_predictor, evaluate_predictors
from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import Places
from rldecoder.evals.generation import GenerateFunction, prefix_generate
from rldecoder.evals.interpretability import deletion_benchmark, label_coverage, ranking_orders
from rldecoder.evals.statistics import bootstrap_mean_ci, paired_bootstrap_pvalue, wilson_interval
from rldecoder.evals.suite import TaskSuite, check_lengths
from rldecoder.evals.targets import Measurement, targets_table
from rldecoder.evals.tasks import run_task
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.methods import BASELINES
from rldecoder.explain.pairs import positions_from_cache
from rldecoder.explain.patching import find_candidates
from rldecoder.interp.records import FeatureLabels
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents
from rldecoder.seeds import derive_seed, seed_everything, torch_generator
from rldecoder.stages.context import InputArtifact, Scalar, StageContext, StageOutput

FROZEN, SUPERVISED, RL = "frozen", "supervised", "rl"

TASKS = pa.schema(
    [
        ("task", pa.string()),
        ("model", pa.string()),
        ("n", pa.int32()),
        ("score", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("drop", pa.float64()),
        ("drop_low", pa.float64()),
        ("drop_high", pa.float64()),
    ]
)
"""One row a task and model. `drop` is the frozen model's score minus the model's on the same
prompts, with its paired bootstrap interval; 0 for the frozen model."""

ANSWERS = pa.schema(
    [
        ("task", pa.string()),
        ("model", pa.string()),
        ("prompt_index", pa.int32()),
        ("answer", pa.string()),
        ("completion", pa.string()),
        ("score", pa.float64()),
    ]
)
"""One row a prompt and model."""


class Answer(NamedTuple):
    """One row of ANSWERS."""

    task: str
    model: str
    prompt_index: int
    answer: str
    completion: str
    score: float


def run(
    inputs: Mapping[str, InputArtifact], config: EvaluateConfig, ctx: StageContext
) -> StageOutput:
    """Measure everything, then fill the targets."""
    seed_everything(ctx.seed)
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    decoders = {
        SUPERVISED: load_decoder(inputs["train_decoder"].path / "decoder", lm, sae),
        RL: load_decoder(inputs["train_ppo"].path / "decoder", lm, sae),
    }
    frozen_choice = schemas.read_json(inputs["freeze_decoder"].path / "freeze.json")["which"]
    final = decoders[SUPERVISED if frozen_choice == SUPERVISED else RL]

    answers, missing = _answer_tasks(lm, decoders, config, ctx)
    tasks = _task_rows(answers, config, ctx.seed)
    schemas.write_parquet(
        ctx.out / "tasks.parquet", {n: [row[n] for row in tasks] for n in TASKS.names}, TASKS
    )
    schemas.write_parquet(
        ctx.out / "answers.parquet",
        {name: [getattr(row, name) for row in answers] for name in ANSWERS.names},
        ANSWERS,
    )
    faithfulness = _faithfulness(inputs, decoders, lm, config, ctx)
    schemas.write_json(
        ctx.out / "faithfulness.json",
        {
            split: {name: found._asdict() for name, found in by_model.items()}
            for split, by_model in faithfulness.items()
        },
    )
    interpretability = _interpretability(inputs, final, config, ctx)
    schemas.write_json(ctx.out / "interpretability.json", interpretability)
    targets = targets_table(
        _measurements(inputs, tasks, faithfulness, interpretability, frozen_choice)
    )
    schemas.write_json(ctx.out / "targets.json", targets)
    return _output(targets, tasks, faithfulness, missing)


def _answer_tasks(
    lm: FrozenLM,
    decoders: Mapping[str, SaeDecoderForCausalLM],
    config: EvaluateConfig,
    ctx: StageContext,
) -> tuple[list[Answer], list[str]]:
    """Every model's answers to the generated tasks and to the files that are here."""
    generators: dict[str, GenerateFunction] = {FROZEN: prefix_generate(lm.model)}
    generators |= {name: prefix_generate(decoder) for name, decoder in decoders.items()}
    found = [task for task in config.file_tasks if task.path.is_file()]
    missing = [task.name for task in config.file_tasks if task not in found]
    suite = TaskSuite(config.tasks, found, lm)
    for note in suite.notes:
        ctx.report.note(note)
    prompts = [
        prompt
        for name in suite.names
        for prompt in suite.make(
            name,
            "test",
            config.num_prompts,
            derive_seed(ctx.seed, "prompts", name),
            fewer=True,
        )
    ]
    check_lengths(lm, prompts)
    answers: list[Answer] = []
    with ctx.report.track("tasks", len(generators) * len(prompts), "prompts") as bar:
        for name, generate in generators.items():
            result = run_task(
                generate,
                prompts,
                lm.tokenizer,
                batch_size=config.batch_size,
                device=ctx.device,
                end_ids=lm.end_token_ids,
            )
            answers += [
                Answer(row.task, name, row.prompt_index, row.answer, row.completion, row.score)
                for row in result.rows
            ]
            bar.advance(len(prompts), name)
    return answers, missing


def _task_rows(
    answers: Sequence[Answer], config: EvaluateConfig, seed: int
) -> list[dict[str, Any]]:
    """Scores with intervals, and the drop against the frozen model on the same prompts."""
    scores: dict[tuple[str, str], list[float]] = {}
    for answer in answers:
        scores.setdefault((answer.task, answer.model), []).append(answer.score)
    rows = []
    for (task, model), values in sorted(scores.items()):
        frozen = scores[task, FROZEN]
        if set(values) <= {0.0, 1.0}:
            low, high = wilson_interval(sum(values), len(values))
        else:  # partial credit (F1) is no proportion
            _, low, high = bootstrap_mean_ci(
                values, resamples=config.bootstrap_resamples, seed=seed
            )
        drop = paired_bootstrap_pvalue(
            frozen, values, resamples=config.bootstrap_resamples, seed=seed
        )
        rows.append(
            {
                "task": task,
                "model": model,
                "n": len(values),
                "score": float(np.mean(values)),
                "ci_low": low,
                "ci_high": high,
                "drop": drop.difference,
                "drop_low": drop.low,
                "drop_high": drop.high,
            }
        )
    return rows


def _faithfulness(
    inputs: Mapping[str, InputArtifact],
    decoders: Mapping[str, SaeDecoderForCausalLM],
    lm: FrozenLM,
    config: EvaluateConfig,
    ctx: StageContext,
) -> dict[str, dict[str, Faithfulness]]:
    predictors = {name: decoder_predictor(decoder) for name, decoder in decoders.items()}
    found = {}
    with ctx.report.track("faithfulness", 2, "splits") as bar:
        for split in ("test", "ood"):
            found[split] = evaluate_predictors(
                predictors,
                ActivationReader(inputs["cache_activations"].path, split),
                lm,
                max_tokens=config.num_tokens,
                seed=derive_seed(ctx.seed, "bootstrap"),
                precision=config.matmul_precision,
            )
            bar.advance()
    return found


def _interpretability(
    inputs: Mapping[str, InputArtifact],
    decoder: SaeDecoderForCausalLM,
    config: EvaluateConfig,
    ctx: StageContext,
) -> dict[str, Any]:
    """Label coverage, importance mass, and how faithful feature rankings and claims are."""
    labels = FeatureLabels.load(inputs["label_features"].path)
    explainer = Explainer.load(inputs["train_explainer"].path, device=ctx.device)
    claims = schemas.read_json(inputs["train_explainer"].path / "evaluation.json")
    positions = positions_from_cache(
        ActivationReader(inputs["cache_activations"].path, "test"),
        decoder,
        config.deletion_positions,
        derive_seed(ctx.seed, "deletion"),
    )
    # All active latents as candidates, in the order of the slots: find_candidates sorts them.
    everything = find_candidates(decoder, positions.places, positions.latents.acts.shape[-1])
    latents = SparseLatents(everything.acts, everything.indices)
    scales = explainer.scales[latents.indices]
    normalised = torch.where(scales > 0, latents.acts / scales.clamp_min(1e-9), 0.0)
    with ctx.report.track("deletion", 1, "benchmarks") as bar:
        deletion = deletion_benchmark(
            decoder,
            Places(latents, positions.past),
            ranking_orders(
                latents, everything.attributions, normalised, torch_generator(ctx.seed, "lot")
            ),
            resamples=config.bootstrap_resamples,
            seed=ctx.seed,
        )
        bar.advance()
    return {
        "label_coverage": label_coverage([feature.high_confidence for feature in labels.features]),
        "importance_mass": schemas.read_json(inputs["rank_features"].path / "mass.json"),
        "deletion": deletion,
        "claims": claims,
    }


def _measurements(
    inputs: Mapping[str, InputArtifact],
    tasks: Sequence[Mapping[str, Any]],
    faithfulness: Mapping[str, Mapping[str, Faithfulness]],
    interpretability: Mapping[str, Any],
    frozen_choice: str,
) -> dict[str, Measurement]:
    """The values of the targets, with the thresholds that this run's own gates used."""
    test, ood = faithfulness["test"], faithfulness["ood"]
    freeze = inputs["freeze_decoder"].config
    final = SUPERVISED if frozen_choice == SUPERVISED else RL
    final_note = f"the published final decoder is the {frozen_choice} one"
    measured = {
        "kl_supervised": Measurement(
            test[SUPERVISED].kl, "", inputs["gate_decoder"].config.get("max_kl")
        ),
        "kl_rl": Measurement(test[RL].kl, final_note, freeze.get("max_kl")),
        "task_drop": _task_drop(tasks, freeze.get("max_task_drop")),
        "ood_ratio": _ood_ratio(test[final], ood[final]),
        "agreement": Measurement(test[final].agreement, final_note),
        "label_coverage": _coverage(interpretability["label_coverage"]["all"]),
        "top10_mass": _top10_mass(interpretability["importance_mass"]),
        "controls": Measurement(float(inputs["control_ppo"].verdict == "pass")),
        "claims": _claims(interpretability["claims"]),
        "claim_precision": _claim_precision(interpretability["claims"]),
        "simulatability": _simulatability(interpretability["claims"]),
    }
    return measured | _sae_measurements(inputs["gate_sae"])


def _sae_measurements(gate: InputArtifact) -> dict[str, Measurement]:
    report = schemas.read_json(gate.path / "report.json")
    names = {
        "l0": "l0_mean",
        "mse": "normalised_mse",
        "explained_variance": "explained_variance",
        "dead_fraction": "dead_fraction",
        "splice_kl": "splice_kl",
        "near_duplicates": "near_duplicate_fraction",
    }
    measured = {}
    for key, name in names.items():
        entry = report.get(name, {"value": None})
        threshold = entry.get("threshold")
        profile = tuple(threshold) if isinstance(threshold, list) else threshold
        measured[key] = Measurement(entry["value"], "", profile)
    return measured


def _task_drop(tasks: Sequence[Mapping[str, Any]], profile: float | None) -> Measurement:
    drops = {row["task"]: row["drop"] for row in tasks if row["model"] == RL}
    frozen = {row["task"]: row["score"] for row in tasks if row["model"] == FROZEN}
    able = [task for task, score in frozen.items() if score > 0]
    if not able:
        return Measurement(None, "the frozen model answers nothing: there is nothing to drop")
    detail = ", ".join(f"{task} {drops[task]:+.2f}" for task in able)
    left_out = [task for task in frozen if task not in able]
    note = detail + (f"; frozen scores 0 on {', '.join(left_out)}" if left_out else "")
    return Measurement(float(np.mean([drops[task] for task in able])), note, profile)


def _ood_ratio(test: Faithfulness, ood: Faithfulness) -> Measurement:
    if test.accuracy <= 0:
        return Measurement(None, "in-domain accuracy is 0")
    frozen = ood.frozen_accuracy / test.frozen_accuracy if test.frozen_accuracy > 0 else None
    note = "" if frozen is None else f"frozen model: {frozen:.2f}"
    return Measurement(ood.accuracy / test.accuracy, note)


def _coverage(found: Mapping[str, Any]) -> Measurement:
    return Measurement(found["coverage"], f"of {found['features']} features")


def _top10_mass(mass: Mapping[str, Any]) -> Measurement:
    """The frozen model's on text where measured, else the first there is; the note has intervals.

    Frozen model and decoder stand beside each other in the note, on the same domain.
    """
    shares = {
        (domain, target): found["top_k"]["10"]["per_position"]
        for domain, by_target in mass.items()
        for target, found in by_target.items()
        if found["top_k"] is not None and "10" in found["top_k"]
    }
    if not shares:
        return Measurement(None, "no importance was measured")
    best = min(shares, key=lambda place: (place[1] != FROZEN, place[0] != "label"))
    note = "; ".join(
        f"{target} {share['value']:.3f}, 95 % interval {share['low']:.3f} to {share['high']:.3f}"
        for (domain, target), share in shares.items()
        if domain == best[0]
    )
    return Measurement(shares[best]["value"], f"domain {best[0]}: {note}")


def _claims(evaluation: Mapping[str, Any]) -> Measurement:
    against = evaluation["method_b_against"].get("method_a")
    if against is None:
        return Measurement(None, "Method B made no claim")
    note = f"95 % interval {against['low']:+.2f} to {against['high']:+.2f}"
    return Measurement(against["difference"], f"{note}, one-sided p {against['pvalue']:.4f}")


def _claim_precision(evaluation: Mapping[str, Any]) -> Measurement:
    ours = evaluation["methods"].get("method_b")
    if ours is None:
        return Measurement(None, "Method B made no claim")
    note = (
        f"95 % interval {ours['precision_low']:.2f} to {ours['precision_high']:.2f}; says nothing "
        f"at {100 * evaluation['abstention']:.0f} % of the positions"
    )
    frozen = evaluation["frozen_model"]
    if frozen["num_claims"]:
        note += (
            f"; of the examples' {frozen['num_claims']} claims {frozen['verdicts']['supported']} "
            "hold on the frozen model, too"
        )
    return Measurement(ours["precision"], note)


def _simulatability(evaluation: Mapping[str, Any]) -> Measurement:
    """The largest p against a listed baseline where all readers know the same context."""
    everywhere = evaluation["simulatability"]["kinds"].get("all")
    if everywhere is None or not everywhere["methods"]:
        return Measurement(None, "no claim, or no intervention that changed the first choice")
    worst = {
        table: max(
            (everywhere[table][name]["method_b_ahead"]["pvalue"], name) for name in BASELINES
        )
        for table in ("methods", "with_context")
    }
    pvalue, name = worst["with_context"]
    ours, theirs = (everywhere["with_context"][who]["auroc"] for who in ("method_b", name))
    alone, rival = worst["methods"]
    note = (
        f"all readers know log p and the intervention's size: AUROC {ours:.3f}, hardest baseline "
        f"{name} {theirs:.3f}; from the claims alone the largest p is {alone:.4f} ({rival})"
    )
    return Measurement(pvalue, note)


def _output(
    targets: Sequence[Mapping[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    faithfulness: Mapping[str, Mapping[str, Faithfulness]],
    missing: Sequence[str],
) -> StageOutput:
    metrics: dict[str, Scalar] = {
        "targets_met": sum(row["met"] is True for row in targets),
        "targets_missed": sum(row["met"] is False for row in targets),
        "targets_unknown": sum(row["met"] is None for row in targets),
    }
    for model in (SUPERVISED, RL):
        metrics[f"{model}_kl"] = faithfulness["test"][model].kl
        metrics[f"{model}_agreement"] = faithfulness["test"][model].agreement
    metrics |= {f"{row['task']}_{row['model']}": row["score"] for row in tasks}
    reasons = (f"task files not found: {', '.join(missing)}",) if missing else ()
    return StageOutput(metrics, reasons=reasons)
