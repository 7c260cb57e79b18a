"""The decoder gate: the decoder beside its start and a lens without an SAE, and the report."""

from __future__ import annotations

from collections.abc import Mapping

from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.decoder.faithfulness import (
    Faithfulness,
    Predictor,
    decoder_predictor,
    lens_predictor,
)
from rldecoder.decoder.loading import AffineLens, decoder_from_lens
from rldecoder.gates import Band, GateEntry, GateReport, metric
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae

DECODER, UNTRAINED, RESIDUAL_LENS = "decoder", "untrained", "residual_lens"
"""What is measured."""

TARGET_KL = 1.5
TARGET_AGREEMENT = 0.75
TARGET_OOD_RATIO = 0.8
"""Targets of the original plan. They are shown whatever the config's threshold is."""

HEADLINES = (
    "test_kl",
    "ood_kl",
    "test_agreement",
    "ood_agreement",
    "ood_agreement_ratio",
    "test_accuracy",
    "ood_accuracy_ratio",
    "test_residual_lens_kl",
    "test_kl_gained_by_training",
)
"""Entries of the report that also go into the manifest's metrics."""

_FORMULAS = {
    "kl": ("nats/token", "mean over tokens of KL(frozen || predictor)"),
    "kl_low": ("nats/token", "lower end of the 95 % bootstrap interval of kl over sequences"),
    "kl_high": ("nats/token", "upper end of the 95 % bootstrap interval of kl over sequences"),
    "ce": ("nats/token", "mean of -log p(next token) over tokens with a known next token"),
    "frozen_ce": ("nats/token", "the same of the frozen model"),
    "accuracy": ("share", "first choice equals the next token"),
    "frozen_accuracy": ("share", "the same of the frozen model"),
    "agreement": ("share", "first choice equals the frozen model's first choice"),
    "ece": ("share", "expected calibration error of the first choice, 15 equal-width bins"),
    "num_tokens": ("tokens", "tokens measured"),
}


def lens_predictors(lm: FrozenLM, sae: Sae, lens: AffineLens) -> dict[str, Predictor]:
    """What a decoder is measured beside: itself before training, and the lens that it is made of
    on the residual."""
    return {
        UNTRAINED: decoder_predictor(decoder_from_lens(lm, sae, lens)),
        RESIDUAL_LENS: lens_predictor(lens.A, lens.c),
    }


def make_report(
    found: Mapping[str, Mapping[str, Faithfulness]], config: GateDecoderConfig
) -> GateReport:
    """Every score of every predictor on both splits; `test_kl` gates.

    Args:
        found: split (test, ood) -> predictor (decoder, untrained, residual_lens) -> scores.
        config: its `max_kl` is the threshold.
    """
    report: dict[str, GateEntry] = {}
    for split, by_predictor in found.items():
        for predictor, scores in by_predictor.items():
            prefix = split if predictor == DECODER else f"{split}_{predictor}"
            for name, (unit, formula) in _FORMULAS.items():
                report[f"{prefix}_{name}"] = metric(
                    getattr(scores, name), unit, f"{formula}; {predictor} on {split}"
                )

    test, ood = found["test"][DECODER], found["ood"][DECODER]
    report["test_kl"] = report["test_kl"].judged(Band(None, TARGET_KL), Band(None, config.max_kl))
    report["test_agreement"] = report["test_agreement"].judged(Band(TARGET_AGREEMENT, None))

    # On other text the decoder may do worse, but not much: what counts is the ratio.
    for name in ("agreement", "accuracy"):
        ratio = _ratio(getattr(ood, name), getattr(test, name))
        report[f"ood_{name}_ratio"] = GateEntry(
            value=ratio,
            unit="ratio",
            formula=f"ood_{name} / test_{name}",
            target=TARGET_OOD_RATIO,
            met=None if ratio is None else ratio > TARGET_OOD_RATIO,
        )
    gained = found["test"][UNTRAINED].kl - test.kl
    report["test_kl_gained_by_training"] = metric(
        gained, "nats/token", "test_untrained_kl - test_kl"
    )
    return GateReport(report)


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
