"""The QA report of an SAE: every metric with its formula, the plan's target and the gate's."""

from __future__ import annotations

from rldecoder.config.sae import GateSaeConfig
from rldecoder.gates import Band, GateEntry, GateReport, metric
from rldecoder.sae.metrics import L0_PERCENTILES, TWIN_COSINE, ReconstructionQuality, Usage
from rldecoder.sae.splice import SpliceReport

PLAN_TARGETS = {
    "normalised_mse": Band(None, 0.01),
    "explained_variance": Band(0.95, None),
    "splice_kl": Band(None, 0.5),
    "l0_mean": Band(50.0, 100.0, inclusive=True),
    "dead_fraction": Band(None, 0.05),
    "near_duplicate_fraction": Band(None, 0.05),
}
"""Targets of the original plan; shown whatever thresholds the config gates on."""


def thresholds(config: GateSaeConfig) -> dict[str, Band]:
    """What this run's gate demands."""
    return {
        "normalised_mse": Band(None, config.max_normalised_mse),
        "explained_variance": Band(config.min_explained_variance, None),
        "splice_kl": Band(None, config.max_splice_kl),
        "l0_mean": Band(*config.l0_range, inclusive=True),
        "dead_fraction": Band(None, config.max_dead_fraction),
        "near_duplicate_fraction": Band(None, config.max_near_duplicate_fraction),
    }


def make_report(
    quality: ReconstructionQuality,
    usage: Usage,
    near_duplicates: float,
    splice: SpliceReport,
    control: ReconstructionQuality | None,
    config: GateSaeConfig,
) -> GateReport:
    """Flat report: name -> value, unit, formula; and for gated metrics target, met (the plan's),
    threshold, passed (this config's).

    Args:
        quality: of the trained SAE on the test split; `control`: of the random one, if measured.
        usage: from the test split's densities.
        near_duplicates: share of decoder rows with a twin.
        splice: with the replacements `sae`, `zero`, `mean`, and `random` if measured.
    """
    spliced = splice.replaced["sae"]
    report = {
        "normalised_mse": metric(quality.normalised_mse, "ratio", "sum |x - recon|^2 / sum |x|^2"),
        "explained_variance": metric(quality.explained_variance, "share", "1 - fvu"),
        "fvu": metric(quality.fvu, "share", "sum |x - recon|^2 / sum |x - mean(x)|^2"),
        "mse": metric(quality.mse, "residual units^2", "mean (x - recon)^2 over elements"),
        "cosine": metric(quality.cosine, "cosine", "mean cos(x - b_dec, recon - b_dec)"),
        "l0_mean": metric(quality.l0_mean, "latents/token", "mean number of latents above 0"),
        "dead_fraction": metric(
            quality.dead_fraction, "share", "latents that never fire on the test tokens / all"
        ),
        "near_duplicate_fraction": metric(
            near_duplicates,
            "share",
            f"latents with another at decoder cosine > {TWIN_COSINE:g} / all",
        ),
        "usage_entropy": metric(usage.entropy, "nats", "-sum p log p, p = share of all firings"),
        "usage_entropy_normalised": metric(
            usage.normalised_entropy, "share", "usage_entropy / log(num_latents)"
        ),
        "effective_latents": metric(usage.effective_latents, "latents", "exp(usage_entropy)"),
        "splice_kl": metric(spliced.kl, "nats/token", "mean KL(frozen || spliced), positions >= 1"),
        "splice_ce": metric(spliced.ce, "nats/token", "mean -log p(next token), spliced"),
        "splice_agreement": metric(
            spliced.agreement, "share", "most likely next token equals the frozen model's"
        ),
        "frozen_ce": metric(splice.frozen_ce, "nats/token", "the frozen model's on these tokens"),
        "num_tokens": metric(quality.num_tokens, "tokens", "test tokens reconstructed"),
        "splice_tokens": metric(splice.num_tokens, "tokens", "test tokens spliced"),
    }

    # What the reconstruction wins back is read against two ways of losing everything.
    for percent, value in zip(L0_PERCENTILES, quality.l0_percentiles, strict=True):
        report[f"l0_p{percent}"] = metric(value, "latents/token", f"{percent}th percentile of L0")
    for ablation in ("zero", "mean"):
        report[f"{ablation}_ablation_ce"] = metric(
            splice.replaced[ablation].ce, "nats/token", f"residual replaced by {ablation}"
        )
        report[f"ce_recovered_{ablation}"] = metric(
            splice.ce_recovered("sae", ablation),
            "share",
            f"(CE_{ablation} - CE_splice) / (CE_{ablation} - CE_frozen)",
        )
    if control is not None:
        report |= _control_entries(control, splice)

    for name, threshold in thresholds(config).items():
        report[name] = report[name].judged(PLAN_TARGETS[name], threshold)
    return GateReport(report)


def failures(report: GateReport, config: GateSaeConfig) -> tuple[str, ...]:
    """One sentence for each of the config's thresholds that is missed."""
    out = []
    for name, band in thresholds(config).items():
        entry = report[name]
        if entry.passed:
            continue
        text = "could not be measured" if entry.value is None else f"is {entry.value:.4g}"
        out.append(f"SAE {name} {text} on the test split; the gate asks for {band}.")
    return tuple(out)


def _control_entries(control: ReconstructionQuality, splice: SpliceReport) -> dict[str, GateEntry]:
    what = "of a random-init SAE of the same L0, at its best single gain"
    return {
        "random_fvu": metric(control.fvu, "share", f"fvu {what}"),
        "random_l0_mean": metric(control.l0_mean, "latents/token", f"L0 {what}"),
        "random_splice_kl": metric(splice.replaced["random"].kl, "nats/token", f"splice KL {what}"),
        "random_ce_recovered_zero": metric(
            splice.ce_recovered("random", "zero"), "share", f"CE recovered {what}"
        ),
    }
