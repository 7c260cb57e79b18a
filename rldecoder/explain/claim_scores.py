"""`evaluation.json`: how well Method B's claims hold, and those of simpler methods.

Claims are about the frozen model, and tested in it. Every share is 0 to 1, every `_low` and
`_high` a 95 % bootstrap interval over positions.
"""

from __future__ import annotations

from rldecoder.evals.statistics import PairedTest
from rldecoder.explain.claims import Verdict
from rldecoder.explain.interventions import ALL_KINDS
from rldecoder.explain.methods import METHOD_B
from rldecoder.schemas import JsonRecord, Scalar


class PartScores(JsonRecord):
    """Precision of some of a method's claims, over the positions that have any of them."""

    precision: float
    """Share of a position's claims with the right sign and an effect above the noise."""
    precision_low: float
    precision_high: float
    num_claims: int
    """How many there are of them."""
    num_positions: int
    """At how many positions."""


class MethodScores(JsonRecord):
    """One method's claims."""

    precision: float
    """Share of a position's claims with the right sign and an effect above the noise."""
    precision_low: float
    precision_high: float
    sign_accuracy: float
    """Share with the right sign, however small the effect."""
    contradicted: float
    """Share with the wrong sign and an effect above the noise."""
    decoder_agrees: float
    """Share whose removal moves the decoder's log p of the same token the claimed way, by more than
    the smallest useful effect."""
    strength_mae_nats: float | None
    """Mean error of the stated effects; None for methods that state none."""
    effect_share: float
    """Summed |effect| of the claimed latents over that of all candidates; above 1 where a method
    claims what is no candidate."""
    claims_per_position: float
    """Where anything is claimed."""
    held_out_features: PartScores | None
    """Claims about latents that are in no training pair; None without any."""
    other_features: PartScores | None
    """All other claims."""


class EffectErrors(JsonRecord):
    """Mean absolute errors of predicted joint effects, nats."""

    claims_mae_nats: float
    """Of adding up the claims."""
    zero_mae_nats: float
    """Of predicting no effect."""
    first_order_mae_nats: float
    """Of adding up the first-order attributions of all candidates."""


class Reconstruction(JsonRecord):
    """How well effects of interventions are predicted from the claims alone."""

    removal: EffectErrors
    """Random candidates taken out."""
    halving: EffectErrors
    """Their activations times 0.5."""


class ReaderScore(JsonRecord):
    """How well a reader of one method's claims tells which interventions change the token."""

    auroc: float
    """Probability that an intervention that changes it scores higher than one that does not."""
    low: float
    high: float
    method_b_ahead: PairedTest | None
    """AUROC of Method B minus this one; None for Method B itself."""


class KindScores(JsonRecord):
    """All readers on one kind of intervention, or on all kinds together."""

    seen_in_training: bool
    """Whether Method B, and the reader with context, were trained on this kind."""
    changed: float
    """Share of the interventions that change the frozen model's first choice."""
    mean_abs_effect_nats: float
    """Of the interventions on log p of the token."""
    methods: dict[str, ReaderScore]
    """Readers of the claims alone, by method; empty where all outcomes are the same."""
    with_context: dict[str, ReaderScore]
    """Readers who also know log p and the intervention's size."""


class Simulatability(JsonRecord):
    """Can a reader of nothing but the claims tell which interventions matter?"""

    interventions_per_kind: int
    """Over all positions with claims."""
    kinds: dict[str, KindScores]
    """By kind, and `all`; empty where Method B claims nothing."""

    @property
    def everywhere(self) -> KindScores | None:
        """All kinds together; None where nothing was claimed."""
        return self.kinds.get(ALL_KINDS)


class Renaming(JsonRecord):
    """The examples explained again with all labels renamed."""

    num_examples: int
    """How many."""
    num_unchanged: int
    """In how many of them nothing but words differs."""


class MethodComparison(JsonRecord):
    """All methods at the positions at which Method B claims something."""

    num_positions: int
    """Held-out predictions."""
    num_explained: int
    """Those with claims of Method B; the methods are compared there."""
    abstention: float
    """Share of the others."""
    min_effect_nats: float
    """Effects up to this many nats are of no use to a reader."""
    methods: dict[str, MethodScores]
    """By method; empty where Method B claims nothing."""
    method_b_against: dict[str, PairedTest]
    """Precision of Method B minus that of each other method."""


class ClaimEvaluation(MethodComparison):
    """Everything that is measured about Method B's claims on held-out text."""

    median_noise_nats: float
    """Of all candidates: what 95 % of random directions of a feature's length do at most."""
    reconstruction: Reconstruction
    """From the claims of Method B."""
    simulatability: Simulatability
    """What readers of the claims can tell."""
    num_pairs: int
    """Training pairs."""
    num_held_out_features: int
    """Latents that are in none of them."""
    example_verdicts: dict[Verdict, int]
    """How many of the examples' claims have each verdict."""
    renamed_labels: Renaming
    """What renaming does to the examples."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest; None for what nobody claimed."""

        def precision(method: str) -> float | None:
            scores = self.methods.get(method)
            return None if scores is None else scores.precision

        ours, everywhere = self.methods.get(METHOD_B), self.simulatability.everywhere
        unseen = None if ours is None else ours.held_out_features
        alone, read = (
            (None, None)
            if everywhere is None
            else (everywhere.methods.get(METHOD_B), everywhere.with_context.get(METHOD_B))
        )
        return {
            "claim_precision": precision(METHOD_B),
            "claim_precision_method_a": precision("method_a"),
            "claim_precision_attribution": precision("attribution_top_k"),
            "claim_decoder_agrees": None if ours is None else ours.decoder_agrees,
            "claim_precision_held_out_features": None if unseen is None else unseen.precision,
            "abstention": self.abstention,
            "simulatability_auroc": None if alone is None else alone.auroc,
            "simulatability_auroc_with_context": None if read is None else read.auroc,
            "reconstruction_mae_nats": self.reconstruction.removal.claims_mae_nats,
            "strength_mae_nats": None if ours is None else ours.strength_mae_nats,
            "num_pairs": self.num_pairs,
        }

    @property
    def reasons(self) -> tuple[str, ...]:
        """What a reader must know."""
        reasons = [] if self.methods else ["no held-out prediction got any claim"]
        if self.renamed_labels.num_unchanged < self.renamed_labels.num_examples:
            reasons.append("renaming labels changed claims or their verdicts")
        return tuple(reasons)
