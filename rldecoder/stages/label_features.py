"""Label the most important latents, score the labels on unseen text, and say how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.artifacts.catalogue import Labels
from rldecoder.config.interp import LabelFeaturesConfig
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.shards import read_token_table
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError
from rldecoder.interp.calibration import Acceptance, high_confidence_threshold, thresholds
from rldecoder.interp.corpus import SplitFirings, TokenGrid, sample_sequences
from rldecoder.interp.drawn import Drawn, SplitSource, draw_latents
from rldecoder.interp.example_pass import ExamplePass, PassResult
from rldecoder.interp.examples import ExampleSettings, contrasts, token_effects, top_examples
from rldecoder.interp.label_controls import label_controls
from rldecoder.interp.labelers import PredicateLabeler
from rldecoder.interp.labelling import (
    Confidences,
    Labelled,
    all_columns,
    calibrate,
    check_disjoint,
    label_and_score,
    random_sae,
    shuffled_control,
)
from rldecoder.interp.llm.estimate import Estimate
from rldecoder.interp.llm.models import FrozenModel, open_models
from rldecoder.interp.llm.procedure import LlmRun
from rldecoder.interp.llm.results import as_records, llm_summary
from rldecoder.interp.llm.storage import LEDGER, Spent
from rldecoder.interp.recalibration import recalibrated
from rldecoder.interp.records import (
    SCHEMA_MINOR,
    Example,
    FeatureLabel,
    FeatureLabels,
    Scores,
    TokenEffect,
)
from rldecoder.interp.review import merge_reviews, read_reviews
from rldecoder.interp.review_queue import draw_audit
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.sae.model import Sae, SparseLatents
from rldecoder.schemas import write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import LabelInputs

MEAN_TOKENS = 4096
"""Tokens whose mean residual centres the random SAE."""


class Ranked(NamedTuple):
    """The latents to label, most important first."""

    latents: NDArray[np.int64]
    importance: NDArray[np.float64]


class Material(NamedTuple):
    """What a record shows beside label and scores; rows as in `Ranked`."""

    density: NDArray[np.float64]
    shown: dict[int, list[Example]]
    contrasts: dict[int, list[Example]]
    effects: list[tuple[list[TokenEffect], list[TokenEffect]]]


def run(inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext) -> Output:
    """Label on one split, score on the other, calibrate, and take in what people said."""
    seed_everything(ctx.seed)
    ranked = _ranked(inputs, config)
    digest = inputs.sae.digest
    reviews = (
        [] if config.reviews is None else read_reviews(config.reviews, digest, ctx.report.note)
    )
    lm, sae = inputs.model.load(ctx.device), inputs.sae.load(ctx.device)
    vocabulary = Vocabulary.from_tokenizer(lm.tokenizer, lm.vocab_size)
    labeler = PredicateLabeler(config.predicate)
    acceptance = _acceptance(config)
    rng = np.random.default_rng(derive_seed(ctx.seed, "labels"))
    source = _source(inputs, config)

    sizes = ExampleSettings(
        config.window_tokens, config.num_top, config.num_quantile, config.num_negative
    )
    context = source.reader("label").meta.context_length
    found = ExamplePass(sae.num_latents, sizes, context, derive_seed(ctx.seed, "examples"))

    with ctx.report.track("labels", 5, "step") as bar:
        text, fit = _read_fit(inputs, config, ctx, sae, ranked.latents, found.add)
        scored = source.firings(sae, "test", ranked.latents, config.score_tokens)
        check_disjoint(text, scored.grid)
        bar.advance(note="text read")
        labelled = label_and_score(labeler, fit, scored, vocabulary, config.window_tokens, rng)
        bar.advance(note="labelled")
        confidences = calibrate(
            labeler, fit, labelled.drafts, vocabulary, config.window_tokens, acceptance,
            derive_seed(ctx.seed, "calibration"),
        )  # fmt: skip
        bar.advance(note="calibrated")
        drawn = _draw(inputs, config, ctx, sae)
        methods = {
            "label": labelled,
            "shuffled": shuffled_control(labelled, scored, vocabulary, config.window_tokens, rng),
        } | {
            name: label_and_score(labeler, *found, vocabulary, config.window_tokens, own_rng)
            for name, (found, own_rng) in drawn.items()
        }
        bar.advance(note="controls")
        decoder = inputs.final.load(lm, sae)
        examples = found.finish(text, ranked.latents)
        material = _material(examples, ranked.latents, decoder, vocabulary, config)
        bar.advance(note="examples")

    answered = None
    if config.llm is not None:
        controls_in_words = _for_words(drawn, config, ctx)
        with _llm_run(inputs, config, ctx, fit, scored, vocabulary, controls_in_words) as llm:
            answered = llm.label(ctx.report.track)
    data = confidences.model.data
    levels = thresholds(confidences.model.out_of_fold(), data.accepted, data.latents)
    tau = high_confidence_threshold(levels)
    features = [
        _record(row, ranked, labelled, confidences, material, tau)
        for row in range(ranked.latents.size)
    ]
    others = {} if answered is None else as_records(answered)
    features = [
        f.model_copy(update={"other_labels": [others[f.latent]]}) if f.latent in others else f
        for f in features
    ]
    # Drawn before people's labels count: reviews must not change who is in the sample.
    named = [f.latent for f in features if f.status == "labelled"]
    audit = draw_audit(named, config.review_audit_share, derive_seed(ctx.seed, "audit"))
    features = [f.model_copy(update={"audit": f.latent in audit}) for f in features]
    features, tau, people = recalibrated(merge_reviews(features, reviews), features, tau)

    controls = label_controls(
        methods,
        confidences,
        acceptance,
        levels,
        people,
        None if answered is None else llm_summary(answered),
    )
    labels = _file(digest, config, sae, features, tau).model_copy(
        update={"judge": None if answered is None else answered.trust}
    )
    Labels.labels.save(ctx.out, labels)
    Labels.controls.save(ctx.out, controls)
    table = examples.table
    Labels.examples.save(ctx.out, {name: table[name] for name in Labels.examples.schema.names})
    Labels.scores.save(ctx.out, all_columns(methods))
    if answered is not None:
        write_parquet(Labels.ledger.path(ctx.out), answered.ledger, LEDGER)

    reasons: tuple[str, ...] = ()
    if len(features) < config.num_features:
        reasons = (
            f"Only {len(features)} of the {config.num_features} requested latents have importance "
            "above 0.",
        )
    if controls.llm is not None:
        reasons += controls.llm.reasons
    return Output(labels.headline | controls.headline, reasons=reasons)


def estimate(
    inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext
) -> tuple[Estimate, Spent]:
    """What the language model would still be sent, and what it has cost; nothing is sent.

    `config.llm` must be set.
    """
    ranked = _ranked(inputs, config)
    lm, sae = inputs.model.load("cpu"), inputs.sae.load(ctx.device)
    vocabulary = Vocabulary.from_tokenizer(lm.tokenizer, lm.vocab_size)
    source = _source(inputs, config)
    with ctx.report.track("estimate", 4, "step") as bar:
        _, fit = _read_fit(inputs, config, ctx, sae, ranked.latents)
        bar.advance(note="label split read")
        scored = source.firings(sae, "test", ranked.latents, config.score_tokens)
        bar.advance(note="test split read")
        drawn = {}
        if config.llm is not None and config.llm.control_latents:
            drawn = _for_words(_draw(inputs, config, ctx, sae), config, ctx)
        bar.advance(note="controls drawn")
        with _llm_run(inputs, config, ctx, fit, scored, vocabulary, drawn) as llm:
            return llm.estimate(), llm.spent()


def _llm_run(
    inputs: LabelInputs,
    config: LabelFeaturesConfig,
    ctx: StageContext,
    fit: SplitFirings,
    scored: SplitFirings,
    vocabulary: Vocabulary,
    controls: Mapping[str, Drawn],
) -> LlmRun:
    """The dealings with the language model, opened."""
    assert config.llm is not None
    frozen = FrozenModel(inputs.model.model, inputs.model.digest)
    return LlmRun(
        config.llm,
        open_models(config.llm, frozen, ctx.device, ctx.report.note),
        fit,
        scored,
        vocabulary,
        window_tokens=config.window_tokens,
        min_firings=config.predicate.min_firings,
        acceptance=_acceptance(config),
        seed=derive_seed(ctx.seed, "llm"),
        progress=ctx.progress,
        controls=controls,
    )


def _acceptance(config: LabelFeaturesConfig) -> Acceptance:
    return Acceptance(detection=config.accept_detection, precision=config.accept_precision)


def _source(inputs: LabelInputs, config: LabelFeaturesConfig) -> SplitSource:
    """Where all text is read from."""
    return SplitSource(inputs.cache.folder, inputs.corpus.folder, config.batch_tokens)


def _material(
    examples: PassResult,
    latents: NDArray[np.int64],
    decoder: SaeDecoderForCausalLM,
    vocabulary: Vocabulary,
    config: LabelFeaturesConfig,
) -> Material:
    """What the records show of the examples and of the decoder."""
    return Material(
        examples.density[latents],
        top_examples(examples.table, vocabulary, config.num_shown),
        contrasts(examples.table, vocabulary) if config.num_shown else {},
        token_effects(decoder, latents, vocabulary, config.num_effects),
    )


def _ranked(inputs: LabelInputs, config: LabelFeaturesConfig) -> Ranked:
    """The top K latents of the configured domain and target; ties by id."""
    table = inputs.importance.table
    wanted = (np.asarray(table["domain"]) == config.rank_domain) & (
        np.asarray(table["target"]) == config.rank_target
    )
    latents = np.asarray(table["latent"], np.int64)[wanted]
    importance = np.asarray(table["importance"], np.float64)[wanted]
    order = np.lexsort((latents, -importance))
    order = order[importance[order] > 0][: config.num_features]
    if not order.size:
        raise BadInputError(
            f"No latent has importance in domain {config.rank_domain!r} for target "
            f"{config.rank_target!r}.",
            "`rank_features` did not measure this pair, or every importance is 0.",
            "Set label_features.rank_domain and rank_target to what rank_features measures.",
        )
    return Ranked(latents[order], importance[order])


def _read_fit(
    inputs: LabelInputs,
    config: LabelFeaturesConfig,
    ctx: StageContext,
    sae: Sae,
    latents: NDArray[np.int64],
    observe: Callable[[ActivationBatch, SparseLatents], None] | None = None,
) -> tuple[TokenGrid, SplitFirings]:
    """All of the text that `observe` saw, and the part of it that labels are fitted on."""
    reader = _source(inputs, config).reader("label")
    size = config.example_tokens or config.fit_tokens
    chosen = sample_sequences(
        read_token_table(inputs.corpus.folder, "label"),
        reader.meta.context_length - reader.meta.skip_first,
        of=min(size, reader.num_tokens),
        size=config.fit_tokens,
        seed=derive_seed(ctx.seed, "fit-sample"),
    )
    whole = _source(inputs, config).firings(
        sae, "label", latents, size, observe=observe, sequences=chosen
    )
    return whole.grid, whole if chosen is None else whole.only(
        np.intersect1d(chosen, whole.grid.seq_ids)
    )


def _draw(
    inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext, sae: Sae
) -> dict[str, tuple[Drawn, np.random.Generator]]:
    """Latents of an untrained SAE and of the trained one, drawn alike, and what draws from then."""
    source = _source(inputs, config)
    seed = derive_seed(ctx.seed, "random-sae")
    untrained = random_sae(sae.spec, source.reader("label"), MEAN_TOKENS, seed).to(ctx.device)
    seeds = {"random_sae": (untrained, seed), "drawn": (sae, derive_seed(ctx.seed, "drawn"))}
    found = {}
    for name, (which, start) in seeds.items():
        rng = np.random.default_rng(start)
        drawn = draw_latents(
            source,
            which,
            count=config.control_features,
            max_tokens=config.control_tokens,
            min_firings=config.predicate.min_firings,
            rng=rng,
        )
        found[name] = drawn, rng
    return found


def _for_words(
    drawn: Mapping[str, tuple[Drawn, np.random.Generator]],
    config: LabelFeaturesConfig,
    ctx: StageContext,
) -> dict[str, Drawn]:
    """Those of them that get labels in words too; none unless that is asked for."""
    assert config.llm is not None
    count, seed = config.llm.control_latents, derive_seed(ctx.seed, "drawn-words")
    return {name: found.sample(count, seed) for name, (found, _) in drawn.items() if count}


def _record(
    row: int,
    ranked: Ranked,
    labelled: Labelled,
    confidences: Confidences,
    material: Material,
    tau: float | None,
) -> FeatureLabel:
    """One latent's record, before reviews."""
    draft, scores = labelled.drafts[row], labelled.scores[row]
    promoted, suppressed = material.effects[row]
    p = float(confidences.p[row])
    return FeatureLabel(
        latent=draft.latent,
        status="failed" if draft.text is None else "labelled",
        label=draft.text,
        failure=draft.failure,
        predicate=draft.predicate,
        labeler=PredicateLabeler.name,
        confidence=p,
        confidence_low=float(confidences.low[row]),
        confidence_high=float(confidences.high[row]),
        high_confidence=draft.text is not None and tau is not None and p >= tau,
        importance=float(ranked.importance[row]),
        importance_rank=row + 1,
        density=float(material.density[row]),
        scores=Scores(**{name: getattr(scores, name) for name in Scores.model_fields}),
        examples=material.shown.get(draft.latent, []),
        contrasts=material.contrasts.get(draft.latent, []),
        promoted=promoted,
        suppressed=suppressed,
        audit=False,
    )


def _file(
    sae_digest: str,
    config: LabelFeaturesConfig,
    sae: Sae,
    features: list[FeatureLabel],
    tau: float | None,
) -> FeatureLabels:
    labelled = sum(feature.status == "labelled" for feature in features)
    return FeatureLabels(
        schema_minor=SCHEMA_MINOR,
        model_name=sae.spec.model_name,
        hook_layer=sae.spec.hook_layer,
        num_latents=sae.num_latents,
        sae_digest=sae_digest,
        requested=config.num_features,
        features=features,
        labelled=labelled,
        failed=len(features) - labelled,
        high_confidence_threshold=tau,
        coverage=sum(feature.high_confidence for feature in features) / len(features),
    )
