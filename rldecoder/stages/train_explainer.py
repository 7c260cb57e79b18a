"""Stage train_explainer: Method B learns from exact patches and is tested on held-out text.

Fit on the `label` split and on training prompts, without a share of the features; evaluated on
the `test` split and on test prompts. Publishes the explainer, its pairs, how well its claims hold,
and example explanations.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

from rldecoder.artifacts.catalogue import ActivationCache, TrainedExplainer
from rldecoder.config.explain import TrainExplainerConfig
from rldecoder.curves import Curves
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TASKS, make_prompts
from rldecoder.explain.evaluation import Settings, agreement_with_frozen, evaluate_explainer
from rldecoder.explain.explainer import Explainer, ExplainerSpec, make_slots
from rldecoder.explain.explanation import ExampleExplanations, Explanation
from rldecoder.explain.held_out_texts import (
    MAX_TASK_TEXTS,
    TOKENS_PER_BATCH,
    task_texts,
    text_beginnings,
)
from rldecoder.explain.inputs import label_texts, mean_importance
from rldecoder.explain.pairs import (
    HeldOutFeatures,
    Pairs,
    Positions,
    held_out_latents,
    join_positions,
    make_pairs,
    pair_columns,
    positions_from_cache,
    positions_from_prompts,
)
from rldecoder.explain.patching import Candidates
from rldecoder.explain.ranking import activation_scales
from rldecoder.explain.reading import PromptReader
from rldecoder.explain.renaming import count_unchanged, renamed_labels
from rldecoder.explain.training import Learner
from rldecoder.sae.model import Sae
from rldecoder.seeds import derive_seed, torch_generator
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import ExplainerInputs

LOG_EVERY = 10


def run(inputs: ExplainerInputs, config: TrainExplainerConfig, ctx: StageContext) -> Output:
    """Make pairs, train, explain examples, evaluate."""
    # float32, as where explanations are shown (`PromptReader`): effects are small differences.
    lm = inputs.model.load(ctx.device, dtype=torch.float32)
    sae = inputs.sae.load(ctx.device)
    decoder = inputs.final.load(lm, sae)
    held_out = held_out_latents(
        sae.num_latents, config.held_out_features, torch_generator(ctx.seed, "held out")
    ).to(ctx.device)
    train = _make_pairs(decoder, inputs.cache, config, ctx, "train", held_out)
    test = _make_pairs(decoder, inputs.cache, config, ctx, "test", None)
    TrainedExplainer.pairs.save(ctx.out, pair_columns(train))
    TrainedExplainer.held_out.save(
        ctx.out, HeldOutFeatures(tuple(held_out.nonzero()[:, 0].tolist()))
    )

    explainer = _new_explainer(decoder, train, config, ctx)
    explainer.scales.copy_(_scales(sae, inputs.cache, config))
    explainer.importance.copy_(mean_importance(inputs.importance.table, sae.num_latents))
    # The ablation starts from the same weights and sees the same positions in the same order.
    learners = {"": Learner(explainer, config, regularised=True)}
    if config.ablation:
        learners["ablation_"] = Learner(copy.deepcopy(explainer), config, regularised=False)
    curves = _train(learners, decoder, train, config, ctx)
    curves.write(TrainedExplainer.curves.path(ctx.out))
    for learner in learners.values():
        learner.explainer.eval().requires_grad_(False)
    explainer.save(ctx.out)

    reader = PromptReader(
        lm, sae, decoder, label_texts(inputs.labels.labels, inputs.labels.descriptions), explainer
    )
    examples = _explain_examples(reader, inputs.cache, config, ctx)
    TrainedExplainer.examples.save(ctx.out, ExampleExplanations(tuple(examples)))
    # The same examples under other labels: nothing but words may differ.
    renamed = replace(reader, labels=renamed_labels(reader.labels, ctx.seed))
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
            frozen_model=agreement_with_frozen(examples),
            renamed_labels=count_unchanged(examples, renamed.explain),
        )
        bar.advance()
    TrainedExplainer.evaluation.save(ctx.out, evaluation)

    num_parameters = sum(parameter.numel() for parameter in explainer.parameters())
    return Output(
        evaluation.headline | {"num_parameters": num_parameters}, reasons=evaluation.reasons
    )


def _make_pairs(
    decoder: SaeDecoderForCausalLM,
    cache: ActivationCache,
    config: TrainExplainerConfig,
    ctx: StageContext,
    split: Literal["train", "test"],
    excluded: torch.Tensor | None,
) -> Pairs:
    """Positions of cached text and of task prompts, with their exact patches."""
    count = config.num_pairs if split == "train" else config.num_test_positions
    reader = cache.reader("label" if split == "train" else "test")
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
def _scales(sae: Sae, cache: ActivationCache, config: TrainExplainerConfig) -> torch.Tensor:
    """Each latent's usual high on the label split."""
    indices, acts = [], []
    for batch in cache.reader("label").ordered(TOKENS_PER_BATCH, max_tokens=config.scale_tokens):
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


def _explain_examples(
    reader: PromptReader, cache: ActivationCache, config: TrainExplainerConfig, ctx: StageContext
) -> list[Explanation]:
    """One prompt a task and the first tokens of some test sequences."""
    prompts = task_texts(1, derive_seed(ctx.seed, "examples")) + text_beginnings(
        reader.lm, cache.reader("test"), config.num_text_examples, config.example_tokens
    )
    examples = []
    with ctx.report.track("examples", len(prompts), "prompts") as bar:
        for prompt in prompts:
            examples.append(reader.explain(prompt))
            bar.advance()
    return examples
