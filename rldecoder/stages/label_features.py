"""Label the most important latents, score the labels on unseen text, and say how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rldecoder.artifacts.catalogue import Labels, ModelFolder
from rldecoder.config.interp import LabelFeaturesConfig
from rldecoder.data.activations import ActivationBatch
from rldecoder.data.shards import read_token_table
from rldecoder.errors import BadInputError
from rldecoder.interp.ablation_shards import AblationCrew
from rldecoder.interp.assembly import Material, records
from rldecoder.interp.calibration import Acceptance, high_confidence_threshold
from rldecoder.interp.control_latents import ControlLatents, SplitSource, draw_latents
from rldecoder.interp.corpus import SplitFirings, TokenGrid, sample_sequences
from rldecoder.interp.descriptions import StrongestTokens, description_rows
from rldecoder.interp.encoding_shards import EncodingSettings, EncodingWorker
from rldecoder.interp.example_pass import ExamplePass
from rldecoder.interp.examples import ExampleSettings, token_effects
from rldecoder.interp.imported_labels import Ours, score_imported, words_of_others
from rldecoder.interp.imported_outputs import OutputTrials
from rldecoder.interp.imported_reader import TokenReader
from rldecoder.interp.kind_confidence import output_confidences, pick
from rldecoder.interp.kinds import BothKinds, output_rows, passing
from rldecoder.interp.label_controls import label_controls
from rldecoder.interp.labelers import PredicateLabeler
from rldecoder.interp.labelling import (
    calibrate,
    check_disjoint,
    label_and_score,
    random_sae,
    score_rows,
    score_weak,
    shuffled_control,
)
from rldecoder.interp.llm.estimate import Estimate
from rldecoder.interp.llm.models import FrozenModel, open_models
from rldecoder.interp.llm.others import JudgedOthers
from rldecoder.interp.llm.procedure import LlmRun
from rldecoder.interp.llm.results import as_records, llm_summary
from rldecoder.interp.llm.storage import LEDGER, Spent
from rldecoder.interp.neuronpedia_labels import Explanations, explanations_of
from rldecoder.interp.output_labels import OutputLabeler
from rldecoder.interp.recalibration import recalibrated
from rldecoder.interp.records import SCHEMA_MINOR, FeatureLabel, FeatureLabels
from rldecoder.interp.review import merge_reviews, read_reviews
from rldecoder.interp.review_queue import draw_audit
from rldecoder.interp.set_phrases import name_words
from rldecoder.interp.strong import at_least, usual_highs
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.sae.model import Sae, SparseLatents
from rldecoder.schemas import Scalar, write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import LabelInputs

MEAN_TOKENS = 4096
"""Tokens whose mean residual centres the random SAE."""
Drawn = dict[str, tuple[Sae, ControlLatents, np.random.Generator]]
"""Latents of an untrained SAE and of the trained one, each with the SAE and a generator."""
RANK_TARGET = "decoder"
"""Whose prediction chooses the latents."""
NUM_SHOWN = 3
"""Strongest examples of a record; beside them stand two weaker ones and two near misses."""
NUM_EFFECTS = 10
"""Promoted, and suppressed, tokens of a record."""


def run(inputs: LabelInputs, config: LabelFeaturesConfig, ctx: StageContext) -> Output:
    """Label on one split, score on the other, calibrate, and take in what people said."""
    seed_everything(ctx.seed)
    task = _Labelling(inputs, config, ctx)
    sae, vocabulary, latents = task.sae, task.vocabulary, task.latents
    digest = inputs.sae.digest
    reviews = [] if config.reviews is None else read_reviews(
        config.reviews, digest, ctx.report.note
    )  # fmt: skip
    window, acceptance = config.window_tokens, task.acceptance
    rng = np.random.default_rng(derive_seed(ctx.seed, "labels"))
    settings = ExampleSettings(window, config.num_top, config.num_quantile, config.num_negative)
    context = task.source.reader("label").meta.context_length
    seeker = ExamplePass(
        sae.num_latents, settings, context, derive_seed(ctx.seed, "examples"), latents
    )
    strongest = StrongestTokens(sae.num_latents)

    def observe(batch: ActivationBatch, found: SparseLatents) -> None:
        seeker.add(batch, found)
        strongest.add(batch, found)

    with ctx.report.track("labels", 5, "step") as bar:
        text, fit = task.read_fit(observe)
        scored = task.read_scored()
        check_disjoint(text, scored.grid)
        bar.advance(note="text read")

        found = task.label("label", sae, fit, scored, rng, rotate=True)
        inputs_sure = calibrate(
            task.labeler, task.strong(fit, fit), found.inputs.drafts, vocabulary, window,
            acceptance, derive_seed(ctx.seed, "calibration"),
        )  # fmt: skip
        outputs_sure = output_confidences(
            found.outputs, acceptance, derive_seed(ctx.seed, "output-calibration")
        )
        picked = pick(inputs_sure, outputs_sure, latents.tolist())
        bar.advance(note="labelled")

        methods = {"label": found}
        drawn = task.draw_controls()
        for name, (kind_sae, control, own_rng) in drawn.items():
            methods[name] = task.label(name, kind_sae, *control, own_rng, rotate=False)
        shuffled = shuffled_control(found.inputs, task.strong(fit, scored), vocabulary, window, rng)
        bar.advance(note="controls")

        examples = seeker.finish(text)
        decoder = inputs.final.load(task.lm, sae)
        effects = token_effects(decoder, latents, vocabulary, NUM_EFFECTS)
        bar.advance(note="examples")
        descriptions = description_rows(strongest, decoder, vocabulary)
        bar.advance(note="descriptions")

    answered = None
    if config.llm is not None:
        with task.open_llm(fit, scored, drawn) as llm:
            answered = llm.label(ctx.report.track)
    others = {} if answered is None else as_records(answered)

    passed = {name: passing(method, acceptance) for name, method in methods.items()}
    passed["shuffled"] = passing(found, acceptance, shuffled)
    tau = high_confidence_threshold(picked.levels)
    # Drawn before people's labels count: reviews must not change who is in the sample.
    named = [
        int(latent)
        for latent, draft, held in zip(
            latents, found.inputs.drafts, found.outputs.sets, strict=True
        )
        if draft.text is not None or not held.failure
    ]
    audit = draw_audit(named, config.review_audit_share, derive_seed(ctx.seed, "audit"))
    sets = [held.tokens for held in found.outputs.sets]
    phrases: list[str | None] = [None] * len(sets)
    if config.set_phrases == "minilm":
        phrases = name_words([[vocabulary.texts[token] for token in tokens] for tokens in sets])
    material = Material(
        found, passed["label"], inputs_sure, outputs_sure, picked, usual_highs(fit.firings),
        task.importance, examples, effects, vocabulary, phrases, config.strong_share,
        config.output_share, NUM_SHOWN,
    )  # fmt: skip
    drafted = records(material, tau, audit, others)
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
    input_methods = {name: method.inputs for name, method in methods.items()}
    input_methods["shuffled"] = shuffled
    controls = label_controls(
        input_methods, passed, picked, (inputs_sure, outputs_sure), acceptance, people, in_words
    )
    Labels.labels.save(ctx.out, labels)
    Labels.controls.save(ctx.out, controls)
    table = examples.table
    Labels.examples.save(ctx.out, {name: table[name] for name in Labels.examples.schema.names})
    Labels.scores.save_rows(ctx.out, score_rows(input_methods))
    Labels.output_scores.save_rows(ctx.out, output_rows(methods, passed))
    Labels.descriptions.save_rows(ctx.out, descriptions)
    if answered is not None:
        write_parquet(Labels.ledger.path(ctx.out), answered.ledger, LEDGER)
    untrained_sae, untrained, _ = drawn["random_sae"]
    imported = task.score_imported(
        OutputTrials(task.outputs, sae, fit, scored, sets, untrained_sae, untrained), features,
        None if answered is None else answered.others,
    )  # fmt: skip

    reasons: tuple[str, ...] = () if in_words is None else in_words.reasons
    if len(features) < config.num_features:
        few = (
            f"Only {len(features)} of the {config.num_features} requested latents have importance "
            "above 0."
        )
        reasons = (few, *reasons)
    slow = task.outputs.slow_because
    if slow is not None:
        reasons = (f"Ablations ran as whole sequences, which is slow: {slow}.", *reasons)
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
        needed = task.theirs or (config.llm is not None and config.llm.control_latents)
        drawn = task.draw_controls() if needed else {}
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

        # What is tried on each latent, others' labels included, and what a label must reach.
        self.acceptance = Acceptance(
            detection=config.accept_detection,
            precision=config.accept_precision,
            auroc=config.accept_auroc,
            auroc_places=config.accept_auroc_places,
        )
        self.theirs: Explanations | None = None
        if config.imported is not None:
            place = (self.sae.spec.hook_layer, self.sae.num_latents)
            self.theirs = explanations_of(config.imported, *place)
        self.labeler = PredicateLabeler(config.predicate)
        self.outputs = OutputLabeler(
            self.lm,
            self.source,
            share=config.output_share,
            count=config.output_places,
            seed=derive_seed(ctx.seed, "output-labels"),
            report=ctx.report,
            progress=ctx.progress / "places",
            owner=ctx.owner,
            crew=self._crew(),
        )

    def _crew(self) -> AblationCrew | None:
        """Who runs ablations elsewhere; None where this process does."""
        ctx, inputs = self.ctx, self.inputs
        if ctx.executor.is_here:
            return None
        read = (inputs.model, inputs.cache, inputs.corpus)
        return AblationCrew(
            shards=ctx.shards,
            model=inputs.model.model,
            record=ModelFolder.record.path(inputs.model.folder),
            cache=inputs.cache.folder,
            tokens=inputs.corpus.folder,
            reads=tuple(artifact.folder for artifact in read),
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
            self.sae, "label", self.latents, size, observe=observe, sequences=chosen,
            encoded=self._encoded("label", size),
        )  # fmt: skip
        if chosen is None:
            return whole.grid, whole
        return whole.grid, whole.only(np.intersect1d(chosen, whole.grid.seq_ids))

    def read_scored(self) -> SplitFirings:
        """The text that labels are scored on."""
        size = self.config.score_tokens
        return self.source.firings(
            self.sae, "test", self.latents, size, encoded=self._encoded("test", size)
        )

    def _encoded(self, split: str, max_tokens: int) -> Iterator[SparseLatents] | None:
        """What the workers of a cluster make of a split; None where this process encodes it."""
        ctx = self.ctx
        if ctx.executor.is_here:
            return None

        # A job a split, in one folder: its files are named by split, and are no other config's.
        settings = EncodingSettings.of(
            self.inputs.sae.sae.absolute(),
            self.inputs.cache.folder.absolute(),
            split,
            max_tokens=max_tokens,
            batch_tokens=self.config.batch_tokens,
        )
        shards = ctx.shards.results(
            EncodingWorker, settings, [settings.sae, settings.cache], "encoded", f"encode {split}"
        )
        return chain.from_iterable(shards)

    def strong(self, fit: SplitFirings, split: SplitFirings) -> SplitFirings:
        """A split with strong firings alone; `fit` says how high each latent usually goes."""
        least = self.config.strong_share * usual_highs(fit.firings)
        return split._replace(firings=at_least(split.firings, least))

    def label(
        self,
        name: str,
        sae: Sae,
        fit: SplitFirings,
        scored: SplitFirings,
        rng: np.random.Generator,
        *,
        rotate: bool,
    ) -> BothKinds:
        """Label latents of one SAE on one split, and score the labels on the other.

        Args:
            name: of the method, for progress.
            rotate: whether output labels of single folds are tried too, for confidence.
        """
        vocabulary, window = self.vocabulary, self.config.window_tokens
        strong = self.strong(fit, fit), self.strong(fit, scored)
        inputs = label_and_score(self.labeler, *strong, vocabulary, window, rng)
        weak = score_weak(inputs, scored, vocabulary, window, rng)
        outputs = self.outputs.label(name, sae, fit, scored, rotate=rotate)
        return BothKinds(fit.firings.latents, inputs, weak, outputs)

    def draw_controls(self) -> Drawn:
        """Latents of an untrained SAE and of the trained one, drawn alike, each with its SAE and
        the generator that its scores go on with."""
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
            found[name] = sae, drawn, rng
        return found

    def score_imported(
        self,
        trials: OutputTrials,
        features: Sequence[FeatureLabel],
        judged: JudgedOthers | None,
    ) -> dict[str, Scalar]:
        """Publish labels of others beside ours, if there are any; returns their headline."""
        if self.theirs is None:
            return {}
        tokenizer = self.lm.tokenizer
        # They are held to the event that ours are about: strong firing.
        rows, summary = score_imported(
            self.theirs,
            self.strong(trials.fit, trials.scored),
            self.strong(*trials.untrained),
            {feature.latent: Ours.of(feature) for feature in features},
            TokenReader(
                self.vocabulary, lambda text: tokenizer.encode(text, add_special_tokens=False)
            ),
            self.vocabulary,
            trials.score,
            window_tokens=self.config.window_tokens,
            acceptance=self.acceptance,
            rng=np.random.default_rng(derive_seed(self.ctx.seed, "imported")),
            judged=judged,
        )
        Labels.imported_rows.save_rows(self.ctx.out, rows)
        summary.save(Labels.imported.path(self.ctx.out))
        return summary.headline

    def open_llm(self, fit: SplitFirings, scored: SplitFirings, drawn: Drawn) -> LlmRun:
        """The dealings with the language model: labels in words, controls among them if asked for,
        and labels of others."""
        assert self.config.llm is not None
        count, seed = self.config.llm.control_latents, derive_seed(self.ctx.seed, "drawn-words")
        controls = {name: each.sample(count, seed) for name, (_, each, _) in drawn.items() if count}
        others = None
        if self.theirs is not None:
            others = words_of_others(self.theirs, scored.firings, drawn["random_sae"][1].scored)
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
            others=others,
        )


def _most_important(
    inputs: LabelInputs, config: LabelFeaturesConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The top K latents of the configured domain, and their importance; ties by id."""
    table = inputs.importance.table
    wanted = (np.asarray(table["domain"]) == config.rank_domain) & (
        np.asarray(table["target"]) == RANK_TARGET
    )
    latents = np.asarray(table["latent"], np.int64)[wanted]
    importance = np.asarray(table["importance"], np.float64)[wanted]
    order = np.lexsort((latents, -importance))
    order = order[importance[order] > 0][: config.num_features]
    if not order.size:
        raise BadInputError(
            f"No latent has importance in domain {config.rank_domain!r} for target "
            f"{RANK_TARGET!r}.",
            "`rank_features` did not measure this pair, or every importance is 0.",
            "Set label_features.rank_domain to what rank_features measures, with that target.",
        )
    return latents[order], importance[order]
