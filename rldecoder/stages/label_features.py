"""Label the most important latents, score the labels on unseen text, and say how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rldecoder.artifacts.catalogue import Labels
from rldecoder.config.interp import LabelFeaturesConfig
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.shards import read_token_table
from rldecoder.errors import BadInputError
from rldecoder.interp.calibration import Acceptance, high_confidence_threshold, thresholds
from rldecoder.interp.control_latents import ControlLatents, SplitSource, draw_latents
from rldecoder.interp.corpus import SplitFirings, TokenGrid, sample_sequences
from rldecoder.interp.example_pass import ExamplePass
from rldecoder.interp.examples import ExampleSettings, contrasts, token_effects, top_examples
from rldecoder.interp.imported_labels import Ours, TokenReader, score_imported
from rldecoder.interp.label_controls import label_controls
from rldecoder.interp.labelers import PredicateLabeler
from rldecoder.interp.labelling import (
    calibrate,
    check_disjoint,
    label_and_score,
    random_sae,
    score_rows,
    shuffled_control,
)
from rldecoder.interp.llm.estimate import Estimate
from rldecoder.interp.llm.models import FrozenModel, open_models
from rldecoder.interp.llm.procedure import LlmRun
from rldecoder.interp.llm.results import as_records, llm_summary
from rldecoder.interp.llm.storage import LEDGER, Spent
from rldecoder.interp.neuronpedia_labels import check_latents, check_source, read_explanations
from rldecoder.interp.recalibration import recalibrated
from rldecoder.interp.records import (
    SCHEMA_MINOR,
    FeatureLabel,
    FeatureLabels,
)
from rldecoder.interp.review import merge_reviews, read_reviews
from rldecoder.interp.review_queue import draw_audit
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.sae.model import SparseLatents
from rldecoder.schemas import Scalar, write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import LabelInputs

MEAN_TOKENS = 4096
"""Tokens whose mean residual centres the random SAE."""


def run(inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext) -> Output:
    """Label on one split, score on the other, calibrate, and take in what people said."""
    seed_everything(ctx.seed)
    task = _Labelling(inputs, config, ctx)
    sae, vocabulary, latents = task.sae, task.vocabulary, task.latents
    digest = inputs.sae.digest
    reviews = [] if config.reviews is None else read_reviews(
        config.reviews, digest, ctx.report.note
    )  # fmt: skip
    labeler = PredicateLabeler(config.predicate)
    window, acceptance = config.window_tokens, task.acceptance
    rng = np.random.default_rng(derive_seed(ctx.seed, "labels"))
    settings = ExampleSettings(window, config.num_top, config.num_quantile, config.num_negative)
    context = task.source.reader("label").meta.context_length
    seeker = ExamplePass(
        sae.num_latents, settings, context, derive_seed(ctx.seed, "examples"), latents
    )

    with ctx.report.track("labels", 5, "step") as bar:
        text, fit = task.read_fit(seeker.add)
        scored = task.read_scored()
        check_disjoint(text, scored.grid)
        bar.advance(note="text read")

        labelled = label_and_score(labeler, fit, scored, vocabulary, window, rng)
        bar.advance(note="labelled")
        confidences = calibrate(
            labeler, fit, labelled.drafts, vocabulary, window, acceptance,
            derive_seed(ctx.seed, "calibration"),
        )  # fmt: skip
        bar.advance(note="calibrated")

        methods = {
            "label": labelled,
            "shuffled": shuffled_control(labelled, scored, vocabulary, window, rng),
        }
        drawn = task.draw_controls()
        for name, (control, own_rng) in drawn.items():
            methods[name] = label_and_score(labeler, *control, vocabulary, window, own_rng)
        bar.advance(note="controls")

        examples = seeker.finish(text)
        effects = token_effects(
            inputs.final.load(task.lm, sae), latents, vocabulary, config.num_effects
        )
        bar.advance(note="examples")

    answered = None
    if config.llm is not None:
        with task.open_llm(fit, scored, task.for_words(drawn)) as llm:
            answered = llm.label(ctx.report.track)
    others = {} if answered is None else as_records(answered)

    data = confidences.model.data
    levels = thresholds(confidences.model.out_of_fold(), data.accepted, data.latents)
    tau = high_confidence_threshold(levels)
    # Drawn before people's labels count: reviews must not change who is in the sample.
    named = [draft.latent for draft in labelled.drafts if draft.text is not None]
    audit = draw_audit(named, config.review_audit_share, derive_seed(ctx.seed, "audit"))
    strongest = top_examples(examples.table, vocabulary, config.num_shown)
    contrasting = contrasts(examples.table, vocabulary) if config.num_shown else {}
    drafted = []
    for row, (draft, scores) in enumerate(zip(*labelled, strict=True)):
        latent, p = draft.latent, float(confidences.p[row])
        promoted, suppressed = effects[row]
        drafted.append(
            FeatureLabel(
                latent=latent,
                status="failed" if draft.text is None else "labelled",
                label=draft.text,
                failure=draft.failure,
                predicate=draft.predicate,
                labeler=PredicateLabeler.name,
                confidence=p,
                confidence_low=float(confidences.low[row]),
                confidence_high=float(confidences.high[row]),
                high_confidence=draft.text is not None and tau is not None and p >= tau,
                importance=float(task.importance[row]),
                importance_rank=row + 1,
                density=float(examples.density[row]),
                scores=scores.published,
                examples=strongest.get(latent, []),
                contrasts=contrasting.get(latent, []),
                promoted=promoted,
                suppressed=suppressed,
                audit=latent in audit,
                other_labels=[others[latent]] if latent in others else [],
            )
        )
    features, tau, people = recalibrated(merge_reviews(drafted, reviews), drafted, tau)

    num_labelled = sum(feature.status == "labelled" for feature in features)
    labels = FeatureLabels(
        schema_minor=SCHEMA_MINOR,
        model_name=sae.spec.model_name,
        hook_layer=sae.spec.hook_layer,
        num_latents=sae.num_latents,
        sae_digest=digest,
        requested=config.num_features,
        features=features,
        labelled=num_labelled,
        failed=len(features) - num_labelled,
        high_confidence_threshold=tau,
        coverage=sum(feature.high_confidence for feature in features) / len(features),
        judge=None if answered is None else answered.trust,
    )
    in_words = None if answered is None else llm_summary(answered)
    controls = label_controls(methods, confidences, acceptance, levels, people, in_words)
    Labels.labels.save(ctx.out, labels)
    Labels.controls.save(ctx.out, controls)
    table = examples.table
    Labels.examples.save(ctx.out, {name: table[name] for name in Labels.examples.schema.names})
    Labels.scores.save_rows(ctx.out, score_rows(methods))
    if answered is not None:
        write_parquet(Labels.ledger.path(ctx.out), answered.ledger, LEDGER)
    imported = task.score_imported(scored, drawn["random_sae"][0].scored, features)

    reasons: tuple[str, ...] = () if in_words is None else in_words.reasons
    if len(features) < config.num_features:
        few = (
            f"Only {len(features)} of the {config.num_features} requested latents have importance "
            "above 0."
        )
        reasons = (few, *reasons)
    return Output(labels.headline | controls.headline | imported, reasons=reasons)


def estimate(
    inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext
) -> tuple[Estimate, Spent]:
    """What the language model would still be sent, and what it has cost; nothing is sent.

    `config.llm` must be set.
    """
    task = _Labelling(inputs, config, ctx)
    with ctx.report.track("estimate", 4, "step") as bar:
        _, fit = task.read_fit()
        bar.advance(note="label split read")
        scored = task.read_scored()
        bar.advance(note="test split read")
        drawn = {}
        if config.llm is not None and config.llm.control_latents:
            drawn = task.for_words(task.draw_controls())
        bar.advance(note="controls drawn")
        with task.open_llm(fit, scored, drawn) as llm:
            return llm.estimate(), llm.spent()


class _Labelling:
    """What labelling and its estimate begin with: the latents, and the text they are read on."""

    def __init__(self, inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext) -> None:
        self.inputs, self.config, self.ctx = inputs, config, ctx
        self.latents, self.importance = _most_important(inputs, config)
        self.lm, self.sae = inputs.model.load(ctx.device), inputs.sae.load(ctx.device)
        self.vocabulary = Vocabulary.from_tokenizer(self.lm.tokenizer, self.lm.vocab_size)
        self.source = SplitSource(inputs.cache.folder, inputs.corpus.folder, config.batch_tokens)
        self.acceptance = Acceptance(
            detection=config.accept_detection, precision=config.accept_precision
        )

    def read_fit(
        self, observe: Callable[[ActivationBatch, SparseLatents], None] | None = None
    ) -> tuple[TokenGrid, SplitFirings]:
        """All of the text that `observe` saw, and the part of it that labels are fitted on."""
        reader = self.source.reader("label")
        size = self.config.example_tokens or self.config.fit_tokens
        chosen = sample_sequences(
            read_token_table(self.inputs.corpus.folder, "label"),
            reader.meta.context_length - reader.meta.skip_first,
            of=min(size, reader.num_tokens),
            size=self.config.fit_tokens,
            seed=derive_seed(self.ctx.seed, "fit-sample"),
        )
        whole = self.source.firings(
            self.sae, "label", self.latents, size, observe=observe, sequences=chosen
        )
        if chosen is None:
            return whole.grid, whole
        return whole.grid, whole.only(np.intersect1d(chosen, whole.grid.seq_ids))

    def read_scored(self) -> SplitFirings:
        """The text that labels are scored on."""
        return self.source.firings(self.sae, "test", self.latents, self.config.score_tokens)

    def draw_controls(self) -> dict[str, tuple[ControlLatents, np.random.Generator]]:
        """Latents of an untrained SAE and of the trained one, drawn alike, each with the generator
        that its scores go on with."""
        seed = derive_seed(self.ctx.seed, "random-sae")
        untrained = random_sae(self.sae, self.source.reader("label"), MEAN_TOKENS, seed)
        kinds = {
            "random_sae": (untrained.to(self.ctx.device), seed),
            "drawn": (self.sae, derive_seed(self.ctx.seed, "drawn")),
        }
        found = {}
        for name, (sae, start) in kinds.items():
            rng = np.random.default_rng(start)
            drawn = draw_latents(
                self.source,
                sae,
                count=self.config.control_features,
                max_tokens=self.config.control_tokens,
                min_firings=self.config.predicate.min_firings,
                rng=rng,
            )
            found[name] = drawn, rng
        return found

    def score_imported(
        self, scored: SplitFirings, untrained: SplitFirings, features: Sequence[FeatureLabel]
    ) -> dict[str, Scalar]:
        """Publish labels of others beside ours, if there are any; returns their headline."""
        if self.config.imported is None:
            return {}
        found = read_explanations(self.config.imported)
        check_source(found.source, self.sae.spec.hook_layer)
        check_latents(found, self.sae.num_latents)
        tokenizer = self.lm.tokenizer
        rows, summary = score_imported(
            found,
            scored,
            untrained,
            {feature.latent: Ours(feature.label, feature.scores) for feature in features},
            TokenReader(
                self.vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False)
            ),
            self.vocabulary,
            window_tokens=self.config.window_tokens,
            acceptance=self.acceptance,
            rng=np.random.default_rng(derive_seed(self.ctx.seed, "imported")),
        )
        Labels.imported_rows.save_rows(self.ctx.out, rows)
        summary.save(Labels.imported.path(self.ctx.out))
        return summary.headline

    def for_words(
        self, drawn: Mapping[str, tuple[ControlLatents, np.random.Generator]]
    ) -> dict[str, ControlLatents]:
        """Those of them that get labels in words too; none unless that is asked for."""
        assert self.config.llm is not None
        count, seed = self.config.llm.control_latents, derive_seed(self.ctx.seed, "drawn-words")
        return {name: found.sample(count, seed) for name, (found, _) in drawn.items() if count}

    def open_llm(
        self, fit: SplitFirings, scored: SplitFirings, controls: Mapping[str, ControlLatents]
    ) -> LlmRun:
        """The dealings with the language model."""
        assert self.config.llm is not None
        frozen = FrozenModel(self.inputs.model.model, self.inputs.model.digest)
        return LlmRun(
            self.config.llm,
            open_models(self.config.llm, frozen, self.ctx.device, self.ctx.report.note),
            fit,
            scored,
            self.vocabulary,
            window_tokens=self.config.window_tokens,
            min_firings=self.config.predicate.min_firings,
            acceptance=self.acceptance,
            seed=derive_seed(self.ctx.seed, "llm"),
            progress=self.ctx.progress,
            controls=controls,
        )


def _most_important(
    inputs: LabelInputs, config: LabelFeaturesConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The top K latents of the configured domain and target, and their importance; ties by id."""
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
    return latents[order], importance[order]
