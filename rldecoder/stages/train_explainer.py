"""Stage train_explainer: Method B learns from exact patches and is tested on held-out text.

Fit on the `label` split and on training prompts, without a share of the features; evaluated on
the `test` split and on test prompts. Publishes the explainer, its pairs, `evaluation.json` and
example explanations.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from rldecoder import schemas
from rldecoder.config.explain import TrainExplainerConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TASKS, make_prompts
from rldecoder.explain.claims import Verdict
from rldecoder.explain.evaluation import Settings, evaluate_explainer
from rldecoder.explain.explainer import Explainer, ExplainerSpec, make_slots
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.held_out_texts import (
    MAX_TASK_TEXTS,
    TOKENS_PER_BATCH,
    task_texts,
    text_beginnings,
)
from rldecoder.explain.inputs import read_importance, read_labels
from rldecoder.explain.pairs import (
    Pairs,
    Positions,
    held_out_latents,
    join_positions,
    make_pairs,
    positions_from_cache,
    positions_from_prompts,
    write_pairs,
)
from rldecoder.explain.patching import Candidates
from rldecoder.explain.ranking import activation_scales
from rldecoder.explain.reading import PromptReader
from rldecoder.explain.renaming import renamed_labels, without_words
from rldecoder.explain.training import Learner
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.seeds import derive_seed, torch_generator
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

LOG_EVERY = 10


def run(
    inputs: Mapping[str, InputArtifact], config: TrainExplainerConfig, ctx: StageContext
) -> StageOutput:
    """Make pairs, train, evaluate, explain examples."""
    # float32, as where explanations are shown (`PromptReader`): effects are small differences.
    lm = FrozenLM.load(
        inputs["sync_tokenizer"].path / "model", device=ctx.device, dtype=torch.float32
    )
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    decoder = load_decoder(inputs["freeze_decoder"].path / "decoder", lm, sae)
    cache = inputs["cache_activations"].path
    held_out = held_out_latents(
        sae.num_latents, config.held_out_features, torch_generator(ctx.seed, "held out")
    ).to(ctx.device)
    train = _make(decoder, cache, config, ctx, "train", held_out)
    test = _make(decoder, cache, config, ctx, "test", None)
    write_pairs(ctx.out / "pairs.parquet", train)
    schemas.write_json(ctx.out / "held_out_features.json", held_out.nonzero()[:, 0].tolist())

    explainer = _new_explainer(decoder, train, config, ctx)
    explainer.scales.copy_(_scales(sae, cache, config))
    explainer.importance.copy_(
        read_importance(inputs["rank_features"].path / "importance.parquet", sae.spec.num_latents)
    )
    # The ablation starts from the same weights and sees the same positions in the same order.
    learners = {"": Learner(explainer, config, regularised=True)}
    if config.ablation:
        learners["ablation_"] = Learner(copy.deepcopy(explainer), config, regularised=False)
    curves = _train(learners, decoder, train, config, ctx)
    curves.write(ctx.out / "curves.parquet")
    for learner in learners.values():
        learner.explainer.eval().requires_grad_(False)
    explainer.save(ctx.out)

    with ctx.report.track("evaluation", 1, "explainers") as bar:
        evaluation = evaluate_explainer(
            decoder,
            explainer,
            learners["ablation_"].explainer if config.ablation else None,
            train,
            test,
            held_out,
            torch_generator(ctx.seed, "evaluation"),
            Settings(config.interventions_per_position, config.bootstrap_resamples, ctx.seed),
        )
        bar.advance()
    labels = read_labels(inputs["label_features"].path)
    reader = PromptReader(lm, sae, decoder, labels, explainer)
    examples = _examples(reader, cache, config, ctx)
    evaluation["frozen_model"] = _frozen_agreement(examples)
    evaluation["renamed_labels"] = _renaming(reader, examples, ctx)
    schemas.write_json(ctx.out / "evaluation.json", evaluation)
    schemas.write_json(ctx.out / "examples.json", [example.to_json() for example in examples])
    return _output(evaluation, explainer)


def _make(
    decoder: SaeDecoderForCausalLM,
    cache: Path,
    config: TrainExplainerConfig,
    ctx: StageContext,
    split: Literal["train", "test"],
    excluded: torch.Tensor | None,
) -> Pairs:
    """Positions of cached text and of task prompts, with their exact patches."""
    count = config.num_pairs if split == "train" else config.num_test_positions
    reader = ActivationReader(cache, "label" if split == "train" else "test")
    num_prompts = math.ceil(count * config.task_share / len(TASKS))
    if split == "test":
        num_prompts = min(num_prompts, MAX_TASK_TEXTS)
    seed = derive_seed(ctx.seed, "positions", split)
    parts: list[Positions] = []
    if count > num_prompts * len(TASKS):
        parts.append(positions_from_cache(reader, decoder, count - num_prompts * len(TASKS), seed))
    for task in TASKS if num_prompts else ():
        prompts = [prompt.prompt for prompt in make_prompts(task, split, num_prompts, seed)]
        parts.append(positions_from_prompts(decoder, prompts, task))
    positions = join_positions(parts)
    with ctx.report.track(f"patches ({split})", len(positions.source), "positions") as bar:
        pairs = make_pairs(
            decoder,
            positions,
            max_candidates=config.max_candidates,
            interventions=config.interventions_per_position,
            generator=torch_generator(ctx.seed, "removals", split),
            excluded=excluded,
        )
        bar.advance(len(positions.source))
    return pairs


@torch.no_grad()
def _scales(sae: Sae, cache: Path, config: TrainExplainerConfig) -> torch.Tensor:
    """Each latent's usual high on the label split."""
    indices, acts = [], []
    reader = ActivationReader(cache, "label")
    for batch in reader.ordered(TOKENS_PER_BATCH, max_tokens=config.scale_tokens):
        assert batch.resid is not None
        latents = sae.encode(batch.resid.to(sae.W_enc.device).float())
        indices.append(latents.indices.flatten().cpu())
        acts.append(latents.acts.flatten().cpu())
    return activation_scales(torch.cat(indices), torch.cat(acts), sae.spec.num_latents)


def _new_explainer(
    decoder: SaeDecoderForCausalLM, train: Pairs, config: TrainExplainerConfig, ctx: StageContext
) -> Explainer:
    active = train.candidates.acts > 0
    unit = float(train.measured.single[active].square().mean().sqrt()) if active.any() else 0.0
    spec = ExplainerSpec(
        d_model=decoder.config.d_model,
        num_latents=decoder.config.num_latents,
        max_candidates=config.max_candidates,
        max_claims=config.max_claims,
        width=config.width,
        num_layers=config.num_layers,
        effect_unit=max(unit, 1e-6),
        min_effect=config.min_effect,
    )
    return Explainer(spec).to(ctx.device)


def _train(
    learners: Mapping[str, Learner],
    decoder: SaeDecoderForCausalLM,
    train: Pairs,
    config: TrainExplainerConfig,
    ctx: StageContext,
) -> Curves:
    """All learners on the same batches; curves carry the learner's name as a prefix."""
    order = torch_generator(ctx.seed, "batches")
    curves = Curves()
    with ctx.report.track("explainer", config.steps, "steps") as bar:
        for step in range(1, config.steps + 1):
            rows = torch.randint(
                len(train.positions.source), (config.batch_size,), generator=order
            ).to(ctx.device)
            candidates = Candidates(*(column[rows] for column in train.candidates))
            # What the explainers read does not depend on their weights.
            slots = make_slots(learners[""].explainer, decoder, candidates)
            values = {
                f"{prefix}{name}": value
                for prefix, learner in learners.items()
                for name, value in learner.step(slots, train, rows).items()
            }
            if step % LOG_EVERY == 0 or step == config.steps:
                curves.log(step, **values)
                ctx.report.metrics("train_explainer", step, values)
            bar.advance(1, f"loss {values['loss']:.3f}")
    return curves


def _examples(
    reader: PromptReader, cache: Path, config: TrainExplainerConfig, ctx: StageContext
) -> list[Explanation]:
    """One prompt a task and the first tokens of some test sequences."""
    prompts = task_texts(1, derive_seed(ctx.seed, "examples")) + text_beginnings(
        reader.lm,
        ActivationReader(cache, "test"),
        config.num_text_examples,
        config.example_tokens,
    )
    with ctx.report.track("examples", len(prompts), "prompts") as bar:
        examples = []
        for prompt in prompts:
            examples.append(reader.explain(prompt))
            bar.advance()
    return examples


def _renaming(
    reader: PromptReader, examples: list[Explanation], ctx: StageContext
) -> dict[str, Any]:
    """The examples explained again with all labels renamed: nothing but words may differ."""
    renamed = replace(reader, labels=renamed_labels(reader.labels, ctx.seed))
    same = [
        without_words(renamed.explain(example.prompt)) == without_words(example)
        for example in examples
    ]
    return {"num_examples": len(same), "num_unchanged": sum(same)}


def _frozen_agreement(examples: list[Explanation]) -> dict[str, Any]:
    """The examples' claims by verdict: what holds on both models, and on the decoder alone."""
    claims = [checked for example in examples for checked in example.claims]
    verdicts = Counter(checked.verdict for checked in claims)
    by_decoder = [c for c in claims if c.verdict in ("supported", "decoder only")]
    same = sum((c.frozen_effect or 0.0) * c.effect > 0 for c in by_decoder)
    return {
        "num_claims": len(claims),
        "verdicts": {verdict: verdicts[verdict] for verdict in get_args(Verdict)},
        "precision": verdicts["supported"] / len(claims) if claims else None,
        "precision_decoder": len(by_decoder) / len(claims) if claims else None,
        "same_sign": same / len(by_decoder) if by_decoder else None,
        "note": "claims of the examples, tested on both models; `same_sign`: of those that the "
        "decoder supports",
    }


def _output(evaluation: dict[str, Any], explainer: Explainer) -> StageOutput:
    methods = evaluation["methods"]
    ours = methods.get("method_b", {})
    unseen = ours.get("held_out_features") or {}
    simulated = evaluation["simulatability"]["kinds"].get("all", {}).get("methods", {})
    metrics = {
        "claim_precision": ours.get("precision"),
        "claim_precision_both_models": evaluation["frozen_model"]["precision"],
        "claim_precision_method_a": methods.get("method_a", {}).get("precision"),
        "claim_precision_attribution": methods.get("attribution_top_k", {}).get("precision"),
        "claim_precision_held_out_features": unseen.get("precision"),
        "abstention": evaluation["abstention"],
        "simulatability_auroc": simulated.get("method_b", {}).get("auroc"),
        "reconstruction_mae_nats": evaluation["reconstruction"]["removal"]["claims_mae_nats"],
        "strength_mae_nats": ours.get("strength_mae_nats"),
        "num_pairs": evaluation["num_pairs"],
        "num_parameters": sum(parameter.numel() for parameter in explainer.parameters()),
    }
    reasons = [] if methods else ["no held-out prediction got any claim"]
    renamed = evaluation["renamed_labels"]
    if renamed["num_unchanged"] < renamed["num_examples"]:
        reasons.append("renaming labels changed claims or their verdicts")
    return StageOutput(metrics, reasons=tuple(reasons))
