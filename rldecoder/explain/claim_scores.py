"""`evaluation.json`: how well Method B's claims hold, and those of simpler methods.

Every share is 0 to 1, every `_low` and `_high` a 95 % bootstrap interval over positions.
"""

from __future__ import annotations

from rldecoder.evals.statistics import PairedTest
from rldecoder.explain.claims import Verdict
from rldecoder.explain.interventions import ALL_KINDS
from rldecoder.explain.methods import METHOD_B
from rldecoder.schemas import JsonRecord, Scalar, optional


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
    """Of the reader of nothing but the claims."""
    zero_mae_nats: float
    """Of predicting no effect."""
    first_order_mae_nats: float
    """Of adding up the first-order attributions of all candidates."""


class Reconstruction(JsonRecord):
    """How well effects of interventions are predicted from the claims alone."""

    removal: EffectErrors
    """The kind of intervention seen in training, on new text."""
    halving: EffectErrors
    """Activations times 0.5, never seen."""


class AblationScores(JsonRecord):
    """The explainer that was trained without the faithfulness regulariser, beside Method B."""

    abstention: float
    """Share of the positions at which it claims nothing, every gate taken as open."""
    abstention_with_gates: float
    """The same with its own gates."""
    claims_per_position: float
    """Where anything is claimed."""
    method_b_ahead: PairedTest | None
    """Precision of Method B minus its own, where both claim; None where they never do."""
    reconstruction: Reconstruction
    """From its claims."""
    precision: float | None = optional()
    """As in `MethodScores`; this and the next five are absent where it claims nothing at all."""
    precision_low: float | None = optional()
    precision_high: float | None = optional()
    sign_accuracy: float | None = optional()
    contradicted: float | None = optional()
    strength_mae_nats: float | None = optional()


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
    """Whether Method B's reader was trained on this kind."""
    changed: float
    """Share of the interventions that change the decoder's first choice."""
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


class FrozenAgreement(JsonRecord):
    """The examples' claims on both models: what holds on the frozen one, too."""

    num_claims: int
    """Of all examples."""
    verdicts: dict[Verdict, int]
    """How many claims have each."""
    precision: float | None
    """Share that is supported by both models; None without claims."""
    precision_decoder: float | None
    """Share that the decoder supports."""
    same_sign: float | None
    """Of those that the decoder supports, the share whose effect has its sign on the frozen model,
    however small; None where it supports none."""
    note: str
    """What the numbers are about."""


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
    ablation: AblationScores | None = optional()
    """Absent where no ablation was trained."""
    simulatability: Simulatability
    """What readers of the claims can tell."""
    num_pairs: int
    """Training pairs."""
    num_held_out_features: int
    """Latents that are in none of them."""
    frozen_model: FrozenAgreement
    """The examples' claims on both models."""
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
        reader = None if everywhere is None else everywhere.methods.get(METHOD_B)
        return {
            "claim_precision": precision(METHOD_B),
            "claim_precision_both_models": self.frozen_model.precision,
            "claim_precision_method_a": precision("method_a"),
            "claim_precision_attribution": precision("attribution_top_k"),
            "claim_precision_held_out_features": None if unseen is None else unseen.precision,
            "abstention": self.abstention,
            "simulatability_auroc": None if reader is None else reader.auroc,
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
