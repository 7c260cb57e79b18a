"""Stage train_explainer: Method B learns from exact ablations and is tested on held-out text.

Claims are about the frozen model, and so are the ablations. Fit on the `label` split and on
training prompts, without a share of the features; evaluated on the `test` split and on test
prompts. Publishes the explainer, its pairs, how well its claims hold, and example explanations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from rldecoder.artifacts.catalogue import ActivationCache, ModelFolder, TrainedExplainer
from rldecoder.config.explain import TrainExplainerConfig
from rldecoder.curves import Curves
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.evaluation import Settings, count_verdicts, evaluate_explainer
from rldecoder.explain.explainer import Explainer, ExplainerSpec, make_slots
from rldecoder.explain.explanation import ExampleExplanations, Explanation
from rldecoder.explain.frozen_effects import PROBES, why_slow
from rldecoder.explain.held_out_texts import PROSE, TOKENS_PER_BATCH
from rldecoder.explain.inputs import label_texts, mean_importance
from rldecoder.explain.pair_shards import PLACES, Drawing, PairShardSettings, PairWorker
from rldecoder.explain.pairs import (
    HeldOutFeatures,
    Pairs,
    PairSettings,
    ends_of_texts,
    held_out_latents,
    join_pairs,
    pair_columns,
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
TRAIN_REMOVALS = 1
"""Joint removals of a training pair."""


def run(inputs: ExplainerInputs, config: TrainExplainerConfig, ctx: StageContext) -> Output:
    """Make pairs, train, explain examples, evaluate."""
    # float32, as where explanations are shown (`PromptReader`): effects are small differences.
    lm = inputs.model.load(ctx.device, dtype=torch.float32)
    sae = inputs.sae.load(ctx.device)
    decoder = inputs.final.load(lm, sae)
    held_out = held_out_latents(
        sae.num_latents, config.held_out_features, torch_generator(ctx.seed, "held out")
    ).to(ctx.device)
    in_no_pair = HeldOutFeatures(tuple(held_out.nonzero()[:, 0].tolist()))
    train = _make_pairs(inputs, decoder, config, ctx, "train", in_no_pair.root)
    test = _make_pairs(inputs, decoder, config, ctx, "test", ())
    TrainedExplainer.pairs.save(ctx.out, pair_columns(train))
    TrainedExplainer.held_out.save(ctx.out, in_no_pair)

    explainer = _new_explainer(sae, train, config, ctx)
    explainer.scales.copy_(_scales(sae, inputs.cache, config))
    explainer.importance.copy_(mean_importance(inputs.importance.table, sae.num_latents, "frozen"))
    curves = _train(explainer, sae, train, config, ctx)
    curves.write(TrainedExplainer.curves.path(ctx.out))
    explainer.eval().requires_grad_(False)
    explainer.save(ctx.out)

    texts = label_texts(inputs.labels.labels, inputs.labels.descriptions)
    reader = PromptReader(lm, sae, decoder, texts, explainer)
    examples = _explain_examples(reader, ctx)
    TrainedExplainer.examples.save(ctx.out, ExampleExplanations(tuple(examples)))
    # The same examples under other labels: nothing but words may differ.
    renamed = replace(reader, labels=renamed_labels(reader.labels, ctx.seed))
    with ctx.report.track("evaluation", 1, "explainers") as bar:
        evaluation = evaluate_explainer(
            decoder,
            explainer,
            train,
            test,
            held_out,
            torch_generator(ctx.seed, "evaluation"),
            Settings(config.interventions_per_position, config.bootstrap_resamples, ctx.seed),
            example_verdicts=count_verdicts(examples),
            renamed_labels=count_unchanged(examples, renamed.explain),
        )
        bar.advance()
    TrainedExplainer.evaluation.save(ctx.out, evaluation)

    num_parameters = sum(parameter.numel() for parameter in explainer.parameters())
    return Output(
        evaluation.headline | {"num_parameters": num_parameters}, reasons=evaluation.reasons
    )


def _make_pairs(
    inputs: ExplainerInputs,
    decoder: SaeDecoderForCausalLM,
    config: TrainExplainerConfig,
    ctx: StageContext,
    split: Literal["train", "test"],
    excluded: tuple[int, ...],
) -> Pairs:
    """Positions of cached text and of task prompts, with their exact ablations."""
    drawing = Drawing(
        split,
        config.num_pairs if split == "train" else config.num_test_positions,
        derive_seed(ctx.seed, "positions", split),
    )
    positions = drawing.draw(decoder, inputs.cache.folder, inputs.corpus.folder)
    slow = why_slow(decoder.frozen, positions.frozen_places)
    if slow is not None:
        ctx.report.note(f"Every ablation runs a whole text, which is slow: {slow}.")

    settings = PairShardSettings(
        name="pairs",
        ends=ends_of_texts(positions, PLACES),
        model=inputs.model.model.absolute(),
        record=ModelFolder.record.path(inputs.model.folder).absolute(),
        sae=inputs.sae.sae.absolute(),
        decoder=inputs.final.decoder.absolute(),
        cache=inputs.cache.folder.absolute(),
        corpus=inputs.corpus.folder.absolute(),
        drawing=drawing,
        how=PairSettings(
            candidates=config.max_candidates,
            interventions=TRAIN_REMOVALS if split == "train" else config.interventions_per_position,
            # Training pairs have the noise floor of the first order, which costs nothing more.
            probes=0 if split == "train" else PROBES,
            seed=derive_seed(ctx.seed, "removals", split),
        ),
        excluded=excluded,
    )
    read = (inputs.model, inputs.sae, inputs.final, inputs.cache, inputs.corpus)
    shards = ctx.shards.results(
        PairWorker, settings, [artifact.folder for artifact in read], f"pairs-{split}",
        f"ablations ({split})",
        here=PairWorker(settings, ctx.device, ctx.report.note, (decoder, positions)),
    )  # fmt: skip
    return join_pairs(positions, shards)


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
    sae: Sae, train: Pairs, config: TrainExplainerConfig, ctx: StageContext
) -> Explainer:
    active = train.candidates.acts > 0
    unit = float(train.measured.single[active].square().mean().sqrt()) if active.any() else 0.0
    spec = ExplainerSpec(
        d_model=sae.d_model, num_latents=sae.num_latents, max_candidates=config.max_candidates,
        max_claims=config.max_claims, width=config.width, num_layers=config.num_layers,
        effect_unit=max(unit, 1e-6), min_effect=config.min_effect,
    )  # fmt: skip
    return Explainer(spec).to(ctx.device)


def _train(
    explainer: Explainer, sae: Sae, train: Pairs, config: TrainExplainerConfig, ctx: StageContext
) -> Curves:
    learner = Learner(explainer, config)
    order = torch_generator(ctx.seed, "batches")
    curves = Curves()
    with ctx.report.track("explainer", config.steps, "steps") as bar:
        for step in range(1, config.steps + 1):
            rows = torch.randint(
                len(train.positions.source), (config.batch_size,), generator=order
            ).to(ctx.device)
            candidates = Candidates(*(column[rows] for column in train.candidates))
            values = learner.step(make_slots(explainer, sae, candidates), train, rows)
            if step % LOG_EVERY == 0 or step == config.steps:
                curves.log(step, **values)
                ctx.report.metrics("train_explainer", step, values)
            bar.advance(1, f"loss {values['loss']:.3f}")
    return curves


def _explain_examples(reader: PromptReader, ctx: StageContext) -> list[Explanation]:
    """Ordinary prose, which people can judge without knowing the corpus."""
    examples = []
    with ctx.report.track("examples", len(PROSE), "prompts") as bar:
        for prompt in PROSE:
            examples.append(reader.explain(prompt))
            bar.advance()
    return examples
