"""Decoder gate: is the supervised decoder faithful on text that no training saw?

Measured on the same tokens beside it: the affine lens on the raw residual (what an affine map
can read when no SAE stands between) and the decoder before training (the same lens on the
SAE's reconstruction). The KL on the test split alone decides; everything is published.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors.torch import load_file

from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.faithfulness import (
    Faithfulness,
    decoder_predictor,
    evaluate_predictors,
    lens_predictor,
)
from rldecoder.decoder.loading import AffineLens, decoder_from_lens, load_decoder
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.schemas import write_json
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

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


def run(
    inputs: Mapping[str, InputArtifact], config: GateDecoderConfig, ctx: StageContext
) -> StageOutput:
    """Measure, publish `report.json`, and give the verdict."""
    seed_everything(ctx.seed)
    trained = inputs["train_decoder"].path
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    tensors = load_file(trained / "affine_lens.safetensors")
    lens = AffineLens(tensors["A"].to(ctx.device), tensors["c"].to(ctx.device))
    predictors = {
        "decoder": decoder_predictor(load_decoder(trained / "decoder", lm, sae)),
        "untrained": decoder_predictor(decoder_from_lens(lm, sae, lens)),
        "residual_lens": lens_predictor(lens.A, lens.c),
    }
    found = {}
    for split, max_tokens in (("test", config.test_tokens), ("ood", config.ood_tokens)):
        found[split] = evaluate_predictors(
            predictors,
            ActivationReader(inputs["cache_activations"].path, split),
            lm,
            max_tokens=max_tokens,
            seed=derive_seed(ctx.seed, "bootstrap"),
            precision=config.matmul_precision,
        )
        ctx.report.note(f"{split}: KL {found[split]['decoder'].kl:.3f} nats/token")

    report = make_report(found, config)
    write_json(ctx.out / "report.json", report)
    gate = report["test_kl"]
    reasons: tuple[str, ...] = ()
    if not gate["passed"]:
        reasons = (
            f"KL(frozen || decoder) on test is {gate['value']:.3f} nats/token, "
            f"not below {config.max_kl:g}.",
        )
    return StageOutput(
        metrics={name: entry["value"] for name, entry in report.items() if name in HEADLINES},
        verdict="fail" if reasons else "pass",
        reasons=reasons,
    )


def make_report(
    found: Mapping[str, Mapping[str, Faithfulness]], config: GateDecoderConfig
) -> dict[str, dict[str, Any]]:
    """Flat report: name -> value, target, met, unit, formula; `test_kl` also threshold, passed.

    `target` and `met` are the original plan's, `threshold` and `passed` this config's.

    Args:
        found: split (test, ood) -> predictor (decoder, untrained, residual_lens) -> scores.
        config: its `max_kl` is the threshold.
    """
    report: dict[str, dict[str, Any]] = {}
    for split, by_predictor in found.items():
        for predictor, scores in by_predictor.items():
            prefix = split if predictor == "decoder" else f"{split}_{predictor}"
            for name, (unit, formula) in _FORMULAS.items():
                report[f"{prefix}_{name}"] = _entry(
                    getattr(scores, name), unit, f"{formula}; {predictor} on {split}"
                )
    test, ood = found["test"]["decoder"], found["ood"]["decoder"]
    report["test_kl"] |= {
        "target": TARGET_KL,
        "met": test.kl < TARGET_KL,
        "threshold": config.max_kl,
        "passed": test.kl < config.max_kl,
    }
    report["test_agreement"] |= {
        "target": TARGET_AGREEMENT,
        "met": test.agreement > TARGET_AGREEMENT,
    }
    for name in ("agreement", "accuracy"):
        ratio = _ratio(getattr(ood, name), getattr(test, name))
        report[f"ood_{name}_ratio"] = _entry(
            ratio,
            "ratio",
            f"ood_{name} / test_{name}",
            target=TARGET_OOD_RATIO,
            met=None if ratio is None else ratio > TARGET_OOD_RATIO,
        )
    gained = found["test"]["untrained"].kl - test.kl
    report["test_kl_gained_by_training"] = _entry(
        gained, "nats/token", "test_untrained_kl - test_kl"
    )
    return report


def _entry(
    value: float | None,
    unit: str,
    formula: str,
    *,
    target: float | None = None,
    met: bool | None = None,
) -> dict[str, Any]:
    return {
        "value": value,
        "target": target,
        "met": met,
        "unit": unit,
        "formula": formula,
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
