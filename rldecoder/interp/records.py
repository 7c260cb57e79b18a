"""`feature_labels.json`: its versioned schema.

The JSON schema committed beside this file is `FeatureLabels.model_json_schema()`; a test compares
them, so that a change of format is always visible, and raises SCHEMA_VERSION or SCHEMA_MINOR.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from rldecoder.interp.predicate import Predicate
from rldecoder.schemas import JsonRecord, Scalar

SCHEMA_VERSION: Literal[4] = 4
SCHEMA_MINOR = 1
Kind = Literal["input", "output", "both", "none"]


class Scores(JsonRecord):
    """Scores on the `test` split, at most 1; only `intruder` and `simulation` can be negative.
    Null: not defined there. A failed label scores 0."""

    detection: float | None
    """Balanced accuracy over windows (2410.13928), the predicate run on each."""
    fuzzing: float | None
    """Balanced accuracy at telling strongly active tokens from others of the same window."""
    precision: float | None
    """Of all tokens the label names, the share on which the latent fires."""
    recall: float | None
    """Of all tokens on which the latent fires, the share the label names."""
    f1: float | None
    """Harmonic mean of precision and recall."""
    auprc: float | None
    """Average precision of the label's yes/no answer."""
    firings: int
    """Tokens of the split on which the latent fires."""
    detection_hard: float | None = None
    """Detection with near misses as negatives: quiet windows that hold a token it fires on."""
    fuzzing_hard: float | None = None
    """Fuzzing with near misses as decoys."""
    intruder: float | None = None
    """Finding the quiet window among five, corrected for chance: 0 is guessing (2507.08473)."""
    simulation: float | None = None
    """Correlation of the activations that the label predicts with the real ones (Bills 2023)."""


class OutputScores(JsonRecord):
    """Scores of an output label on the `test` split, by exact ablation in the frozen model, at
    places where the latent fires strongly. A failed label scores 0."""

    auroc: float
    """Share of the other latents' sets whose mean drop there is smaller; 0.5 is chance."""
    auroc_places: float
    """The same place by place, mean over places."""
    drop: float
    """By how much log P(set) falls when the latent is taken out, nats; mean over documents."""
    drop_low: float | None
    """Lower end of its 95 % interval (over documents); null with a single document."""
    drop_high: float | None
    other_drop: float
    """The same when another active latent is taken out at the same place, at the same length."""
    margin: float
    """`drop` less `other_drop`, mean over documents."""
    margin_low: float | None
    """Lower end of its 95 % interval."""
    margin_high: float | None
    beats_other: float
    """Share of places at which the drop is larger than that of the other."""
    share: float
    """Of all probability that moves to other tokens, what the set loses; mean over places."""
    places: int
    documents: int


class Example(JsonRecord):
    """A piece of text on which the latent fires."""

    seq_id: int
    """Sequence of the `label` split."""
    pos: int
    """Position of the activation in the sequence."""
    act: float
    """The activation, in the SAE's units."""
    tokens: list[str]
    """Texts of the window's tokens, raw: escape them before showing."""
    focus: int
    """Index in `tokens` of the token at `pos`."""
    kind: Literal["top", "quantile", "near_miss"] = "top"
    """`quantile`: from the rest of the latent's range. `near_miss`: it is silent (act 0), although
    the window holds a token on which it fires elsewhere."""


class TokenEffect(JsonRecord):
    """What one unit of activation does to a token's logit through the decoder's row."""

    token: str
    """The token's text, raw."""
    token_id: int
    effect: float
    """Logits per unit of activation."""


class Review(JsonRecord):
    """One person's verdict."""

    reviewer: str
    accept: bool | None = None
    """Whether the label shown was right; None if only a new label was given."""
    label: str | None = None
    """A better label."""
    audit: bool = False
    """The latent was drawn uniformly (`audit` of its record), not by its score: only such verdicts
    may recalibrate."""
    note: str = ""
    shown: str | None = None
    """The label that was judged; null where none was shown, or by an older program. A verdict on
    another label than the present one is kept, and decides nothing."""
    at: str | None = None
    """When it was given: ISO 8601, UTC, whole seconds."""

    def judges(self, label: str | None) -> bool:
        """Whether it says yes or no to this label, as far as is known."""
        return self.accept is not None and self.shown in (None, label)

    def settles(self, label: str | None) -> bool:
        """Whether nobody needs to look at this label again."""
        return self.label is not None or self.judges(label)


class KindTrust(JsonRecord):
    """How a judge did on planted features, in one kind of score. Means of balanced accuracies."""

    right: float
    """With the right labels; missing answers are wrong."""
    right_low: float
    """Lower end of its 95 % interval (bootstrap over planted features)."""
    right_high: float
    wrong: float
    """With the labels of other planted features."""
    wrong_low: float
    wrong_high: float
    exact_right: float
    """What a reader who applies the right labels without error scores on the same windows."""
    exact_wrong: float
    """The same reader with the wrong labels."""


class JudgeTrust(JsonRecord):
    """Whether the language model that scored labels in words is to be believed."""

    model: str
    trusted: bool
    """If not, the scores of `other_labels` are shown and must not be believed."""
    reason: str | None
    """Why not; null if it is."""
    planted: int
    """Planted features asked about."""
    bar: float
    """Least mean on right labels, for detection and for fuzzing."""
    tolerance: float
    """How far from 0.5 the means on wrong labels may lie."""
    questions: int
    failures: int
    """Questions without a usable answer; they count as wrong."""
    detection: KindTrust | None = None
    fuzzing: KindTrust | None = None


class JudgedScores(JsonRecord):
    """Scores of a label in words on the `test` split, by a judge. Null: too few windows."""

    detection: float | None
    """Balanced accuracy over the windows asked about (2410.13928)."""
    fuzzing: float | None
    """Balanced accuracy at telling right marks from wrong ones."""
    window_precision: float | None
    """Of the windows that the label names, the share in which the latent fires, estimated at the
    true share of active windows."""
    questions: int
    """Questions asked of the judge."""
    failures: int
    """Of these, without a usable answer: counted as wrong."""
    window_recall: float | None = None
    """Of the windows in which the latent fires, the share that the label names."""
    window_f1: float | None = None
    """Harmonic mean of the two."""
    intruder: float | None = None
    """Finding the quiet window among five by the label, corrected for chance: 0 is guessing. Null
    also where it was not asked for."""
    simulation: float | None = None
    """Correlation of the activations that the judge guesses from the label with the real ones, over
    the tokens of the windows asked about. Null also where it was not asked for."""


class LabelConfidence(JsonRecord):
    """p(accept) of a label in words: that its judged scores on `test` reach the bars."""

    p: float = Field(ge=0, le=1)
    """From the outcomes of other labels only."""
    low: float = Field(ge=0, le=1)
    """Lower end of its 95 % interval (bootstrap over latents)."""
    high: float = Field(ge=0, le=1)


class OtherLabel(JsonRecord):
    """A label by another labeler than the record's own; it has no executable form."""

    labeler: str
    model: str
    """The language model that wrote it."""
    label: str | None
    """Null if it failed."""
    failure: str | None
    """Why there is no label; null otherwise."""
    judge: str
    """The language model that scored it."""
    judge_trusted: bool
    """As `judge.trusted` of the file: without it the scores must not be believed."""
    scores: JudgedScores
    confidence: LabelConfidence | None
    """Null if too little is known to say: then `no_confidence` says why."""
    no_confidence: str | None

    @model_validator(mode="after")
    def _consistent(self) -> OtherLabel:
        if (self.label is None) == (self.failure is None):
            raise ValueError("a label has no failure, and a failure has a reason and no label")
        if (self.confidence is None) == (self.no_confidence is None):
            raise ValueError("there is a confidence, or a reason why there is none")
        return self


class InputLabel(JsonRecord):
    """What a latent fires strongly on."""

    text: str | None
    """Null if nothing was found."""
    failure: str | None
    """Why; null otherwise."""
    predicate: Predicate | None
    """The label in executable form."""
    share: float
    """Strong: at least this share of the latent's usual high."""
    usual_high: float | None
    """99th percentile of its activations on the `label` split; null if it never fired there."""
    scores: Scores
    """Of strong firings, on the `test` split."""
    weak: Scores
    """The same label against all firings, the weakest too."""
    confidence: float = Field(ge=0, le=1)
    """p(accept), from the `label` split alone; 0 for failures."""
    accepted: bool
    """Whether the scores of strong firings pass."""


class TokenGain(JsonRecord):
    """How much a latent raises or lowers a token in the frozen model."""

    token: str
    """The token's text, raw."""
    token_id: int
    gain: float
    """Mean of p(v) (log p(v) - log p(v) without the latent), nats, without the document in which
    it is largest; of a lowered token with both models exchanged."""


class OutputLabel(JsonRecord):
    """What a latent raises in the frozen model, by exact ablation where it fires strongly."""

    text: str | None
    """Null if nothing recurs."""
    failure: str | None
    """Why; null otherwise."""
    name: str | None
    """A class or affix that covers the set; null where none does."""
    raised: list[TokenGain]
    """The output set, what sets it apart from the other latents' first; gains are mean ones."""
    lowered: list[TokenGain]
    """What is likelier without the latent."""
    places: int
    """Places of the `label` split that the set was fitted on."""
    documents: int
    share: float
    """Places are firings of at least this share of the latent's usual high."""
    scores: OutputScores
    confidence: float = Field(ge=0, le=1)
    """p(accept), from the `label` split alone; 0 for failures."""
    accepted: bool
    """Whether the scores pass, in all three parts."""


class FeatureLabel(JsonRecord):
    """One latent of the top K."""

    latent: int
    status: Literal["labelled", "failed"]
    kind: Kind = "input"
    """Which of its two labels pass on the `test` split. `none`: neither does, and what it does is
    shown as a description (`interp.shown`)."""
    label: str | None
    """The label that passes, both if both do, else the one more likely to; null if both failed and
    nobody gave one. Shown as a label only if it passes or a person stands for it."""
    description: str = ""
    """What is known of it without a label: the tokens on which it fires most strongly, and those
    that it raises. Never empty but in files of older programs."""
    input: InputLabel | None = None
    """Null in files of older programs, as `output`."""
    output: OutputLabel | None = None
    failure: str | None
    """Why there is no label; null otherwise."""
    predicate: Predicate | None
    """What the label says of the input, in executable form; null if it says nothing of it, failed,
    or was replaced by a person's words."""
    labeler: str
    """Which labeler gave the label, or `person:<name>`."""
    confidence: float = Field(ge=0, le=1)
    """p(accept) of the label; of two the larger one; 0 for failures. Of a person's label: see
    By people in docs/labels.md."""
    confidence_low: float = Field(ge=0, le=1)
    """Lower end of its 95 % interval."""
    confidence_high: float = Field(ge=0, le=1)
    """Upper end."""
    high_confidence: bool
    """confidence >= the file's `high_confidence_threshold`, or accepted by a person."""
    importance: float
    """Mean |I| in nats a position, in the domain and target that ranked the latents."""
    importance_rank: int
    """1 is the most important."""
    density: float
    """Share of tokens of the `label` split on which the latent fires."""
    scores: Scores
    """Of the input label, strong firings."""
    examples: list[Example]
    """A few of the strongest, from the `label` split."""
    contrasts: list[Example] = Field([])
    """A few of its middle and lowest activations, and a few near misses."""
    promoted: list[TokenEffect]
    """Tokens whose logit the decoder's row raises most."""
    suppressed: list[TokenEffect]
    """Tokens whose logit it lowers most."""
    audit: bool
    """Drawn uniformly from the labelled latents, for reviews that may recalibrate. The order of
    reviews is in `review_queue.json` of `cluster_features`, as it depends on clusters."""
    reviews: list[Review] = Field([])
    """Verdicts, oldest first; nothing is ever deleted."""
    previous_labels: list[str] = Field([])
    """Labels that were replaced, oldest first."""
    other_labels: list[OtherLabel] = Field([])
    """The same latent's labels by other labelers. They change neither `label` nor
    `confidence`; a person may take one over in a review."""

    @property
    def input_predicate(self) -> Predicate | None:
        """What the labeler says of the input, shown or not; None where a person's words stand."""
        if self.by_person:
            return None
        return self.predicate if self.input is None else self.input.predicate

    @property
    def by_person(self) -> bool:
        """Whether a person gave the label."""
        return self.labeler.startswith("person:")

    @property
    def reviewed(self) -> bool:
        """Whether a person has judged the present label, or given it."""
        return any(review.settles(self.label) for review in self.reviews)

    @model_validator(mode="after")
    def _consistent(self) -> FeatureLabel:
        if (self.status == "failed") != (self.label is None):
            raise ValueError("a failed latent has no label, and a labelled one has")
        if (self.failure is None) != (self.status == "labelled"):
            raise ValueError("a failure needs a reason, a label must not have one")
        return self


class FeatureLabels(JsonRecord):
    """Labels of the top K latents of one run. Coverage counts failures."""

    schema_version: Literal[4] = 4
    """Raised when a reader of the older version could misread a file. Of version 3, in which labels
    spoke of the input only, of any firing, files are still read."""
    schema_minor: int = Field(default=0, ge=0)
    """Raised when fields are added that have defaults: a newer program reads older files."""
    model_name: str
    hook_layer: int
    num_latents: int
    """Size of the dictionary."""
    sae_digest: str
    """Digest of the `train_sae` artifact that the latents belong to."""
    requested: int
    """K that was asked for."""
    features: list[FeatureLabel]
    """Most important first; fewer than `requested` only if fewer latents have importance."""
    labelled: int
    failed: int
    high_confidence_threshold: float | None
    """Smallest confidence of a high-confidence label; null if no threshold is safe enough."""
    coverage: float = Field(ge=0, le=1)
    """High-confidence labels over `features`, failures included."""
    split_fit: Literal["label"] = "label"
    """Labels, examples and calibration come from this split."""
    split_scored: Literal["test"] = "test"
    """Scores come from this one; no document is in both."""
    judge: JudgeTrust | None = None
    """What is known of the judge of `other_labels`; null without such labels."""

    @model_validator(mode="before")
    @classmethod
    def _from_older(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("schema_version") != 3:
            return data
        features = []
        for feature in data.get("features", []):
            # Nothing says whether an older label passed but the person or the bar that let it.
            trusted = feature.get("high_confidence") and feature.get("predicate")
            features.append({"kind": "input" if trusted else "none"} | feature)
        return data | {"schema_version": 4, "schema_minor": 0, "features": features}

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return {
            "latents": len(self.features),
            "labelled": self.labelled,
            "failed": self.failed,
            "high_confidence_coverage": self.coverage,
            **{f"kind_{kind}": self.count(kind) for kind in get_args(Kind)},
        }

    def count(self, kind: Kind) -> int:
        """Latents of a kind."""
        return sum(feature.kind == kind for feature in self.features)
