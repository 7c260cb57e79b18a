"""Gate: does the trained decoder beat policies that learned nothing?

Controls: a uniform policy, a randomly initialised decoder, and training of equal length on a
random reward. The supervised decoder and the frozen model are measured beside them, and on
request a continuation with the differentiable losses alone; these are reported, not gated.
Publishes `verdict.json`, `controls.parquet` (test split) and `curves.parquet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rldecoder.config.rl import ControlPpoConfig, TrainPpoConfig
from rldecoder.curves import Curves
from rldecoder.decoder.faithfulness import Predictor, decoder_predictor
from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.evals.tasks import TaskResult
from rldecoder.lm.frozen import FrozenLM
from rldecoder.rl.controls import (
    CONTROLS,
    FROZEN,
    SUPERVISED,
    TRAINED,
    Comparison,
    System,
    compare,
    control_rows,
    sequence_kl,
    uniform_policy,
    uniform_predictor,
)
from rldecoder.rl.evaluation import Evaluator
from rldecoder.rl.session import Kind, Session
from rldecoder.sae.model import Sae
from rldecoder.schemas import write_json, write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, Scalar, StageContext, StageOutput

UNIFORM = "uniform_policy"
RANDOM_INIT = "random_decoder"
RANDOM_REWARD = "random_reward"
LOSSES_ONLY = "losses_only"
GATING = (UNIFORM, RANDOM_INIT, RANDOM_REWARD)


def run(
    inputs: Mapping[str, InputArtifact], config: ControlPpoConfig, ctx: StageContext
) -> StageOutput:
    """Train the controls, measure every system on the test split, and judge."""
    seed_everything(ctx.seed)
    training = TrainPpoConfig.model_validate(dict(inputs["train_ppo"].config))
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    supervised = inputs["train_decoder"].path / "decoder"
    curves = Curves()
    seed_everything(derive_seed(ctx.seed, RANDOM_INIT))
    decoders: dict[str, SaeDecoderForCausalLM] = {
        TRAINED: load_decoder(inputs["train_ppo"].path / "decoder", lm, sae),
        SUPERVISED: load_decoder(supervised, lm, sae),
    }
    decoders[RANDOM_INIT] = new_decoder(lm, sae, decoders[SUPERVISED].config.blocks or ())
    kinds: list[Kind] = ["random_reward"]
    kinds += ["losses_only"] if config.supervised_continuation else []
    for kind in kinds:
        decoder = load_decoder(supervised, lm, sae)
        decoders[kind] = _train(kind, decoder, inputs, training, config, ctx, curves)
    systems = _measure(decoders, lm, inputs, training, config, ctx)
    trained = systems[TRAINED]
    comparisons = [
        compare(trained, system, derive_seed(ctx.seed, "bootstrap"))
        for system in systems.values()
        if system.name not in (TRAINED, FROZEN)
    ]
    failures = [c.reason() for c in comparisons if c.control in GATING and not c.beaten]
    verdict: Literal["pass", "fail"] = "fail" if failures else "pass"
    # A random reward can do harm, so beating it does not prove that anything was learned.
    start = next(c for c in comparisons if c.control == SUPERVISED)
    notes = [] if start.beaten else [start.no_gain()]
    reasons = (*failures, *notes)
    curves.write(ctx.out / "curves.parquet")
    metrics = _publish(systems, comparisons, verdict, reasons, ctx)
    return StageOutput(metrics, verdict, reasons)


def _train(
    kind: Kind,
    decoder: SaeDecoderForCausalLM,
    inputs: Mapping[str, InputArtifact],
    training: TrainPpoConfig,
    config: ControlPpoConfig,
    ctx: StageContext,
    curves: Curves,
) -> SaeDecoderForCausalLM:
    """Train a control as long as the decoder was trained; its curves get the kind as prefix."""
    session = Session(
        name=f"control_ppo {kind}",
        kind=kind,
        config=training,
        decoder=decoder,
        activations=inputs["cache_activations"].path,
        progress=ctx.progress / kind,
        seed=derive_seed(ctx.seed, kind),
        watcher=ctx.report,
        checkpoint_every_steps=config.checkpoint_every_steps,
    )
    size = training.ppo.batch_size
    title = f"control: {kind.replace('_', ' ')}"
    total, done = session.total_steps * size, session.done * size
    with ctx.report.track(title, total, unit="rollout", done=done) as bar:
        session.run(lambda note: bar.advance(size, note))
    for row in session.curves.rows:
        curves.log(row.step, **{f"{kind}/{row.name}": row.value})
    return decoder


def _measure(
    decoders: Mapping[str, SaeDecoderForCausalLM],
    lm: FrozenLM,
    inputs: Mapping[str, InputArtifact],
    training: TrainPpoConfig,
    config: ControlPpoConfig,
    ctx: StageContext,
) -> dict[str, System]:
    """Task score and KL of every system on the same test prompts and test text."""
    evaluator = Evaluator(
        lm,
        inputs["cache_activations"].path,
        split="test",
        tasks=training.tasks,
        num_prompts=config.test_prompts,
        num_tokens=config.test_tokens,
        seed=derive_seed(ctx.seed, "test"),
    )
    predictors: dict[str, Predictor] = {
        name: decoder_predictor(decoder) for name, decoder in decoders.items()
    }
    predictors[UNIFORM] = uniform_predictor(lm)
    scores: dict[str, TaskResult] = {UNIFORM: uniform_policy(evaluator.prompts, lm, ctx.seed)}
    with ctx.report.track("test of controls", len(decoders) + 2, unit="system") as bar:
        for name, decoder in decoders.items():
            scores[name] = evaluator.tasks(decoder)
            bar.advance(1, name)
        scores[FROZEN] = evaluator.tasks(lm.model)
        bar.advance(1, FROZEN)
        kl = sequence_kl(predictors, evaluator.reader, lm, config.test_tokens)
        bar.advance(1, "KL")
    kl[FROZEN] = 0.0 * kl[UNIFORM]
    return {name: System(name, scores[name], kl[name], name in GATING) for name in scores}


def _publish(
    systems: Mapping[str, System],
    comparisons: list[Comparison],
    verdict: str,
    reasons: tuple[str, ...],
    ctx: StageContext,
) -> dict[str, Scalar]:
    """Write the verdict and the table; returns the headline numbers."""
    seed = derive_seed(ctx.seed, "bootstrap")
    rows = [row for system in systems.values() for row in control_rows(system, seed)]
    write_parquet(
        ctx.out / "controls.parquet",
        {name: [row[name] for row in rows] for name in CONTROLS.names},
        CONTROLS,
    )
    overall = {row["system"]: row for row in rows if row["task"] == "all"}
    write_json(
        ctx.out / "verdict.json",
        {
            "verdict": verdict,
            "reasons": list(reasons),
            "comparisons": [comparison._asdict() for comparison in comparisons],
            "systems": overall,
        },
    )
    metrics: dict[str, Scalar] = {}
    for name, row in overall.items():
        metrics[f"{name}_task_score"] = row["score"]
        metrics[f"{name}_kl"] = row["kl"]
    return metrics
