"""The SAE's quality gate: measured on the test split, published whether it passes or fails.

Reconstruction and density are measured on the cached test split, the splice into the frozen model
on its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from rldecoder.artifacts.catalogue import SaeGate
from rldecoder.config.sae import GateSaeConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.shards import read_tokens
from rldecoder.sae.metrics import (
    near_duplicate_fraction,
    random_control,
    reconstruction_quality,
    usage_entropy,
)
from rldecoder.sae.plots import density_histogram
from rldecoder.sae.report import failures, make_report
from rldecoder.sae.splice import splice_quality
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import SaeGateInputs

SPLIT = "test"
SPLICE_BATCH = 4
"""Sequences that the frozen model runs at once."""
CONTROL_TOKENS = 4096
"""Test tokens on which the random control's mean, threshold and gain are fitted. That favours the
control, never the SAE."""


def run(inputs: SaeGateInputs, config: GateSaeConfig, ctx: StageContext) -> Output:
    """Measure every metric of the plan's QA gate, publish them, and give the verdict."""
    seed_everything(ctx.seed)
    sae = inputs.sae.load(ctx.device)
    lm = inputs.model.load(ctx.device)
    reader = inputs.cache.reader(SPLIT)
    input_ids = torch.from_numpy(read_tokens(inputs.corpus.folder, SPLIT, config.splice_sequences))

    # Reconstruction, and that of a random SAE of the same L0 on the same tokens.
    tokens = min(reader.num_tokens, config.eval_tokens)
    passes = 2 if config.random_control else 1
    with ctx.report.track("SAE gate: reconstruction", tokens * passes, "tokens") as bar:
        quality = reconstruction_quality(sae, _residuals(reader, config, bar.advance))
        sample = next(_residuals(reader, config, None, CONTROL_TOKENS))
        mean = sample.float().mean(0).to(ctx.device)
        control_sae, control = None, None
        if config.random_control:
            control_sae = random_control(
                sae.spec, derive_seed(ctx.seed, "control"), sample.to(ctx.device), quality.l0_mean
            )
            control = reconstruction_quality(control_sae, _residuals(reader, config, bar.advance))

    # The frozen model goes on from the reconstruction; beside it from zeros and from the mean.
    replacements: dict[str, Callable[[Tensor], Tensor]] = {
        "sae": lambda resid: sae(resid).recon,
        "zero": torch.zeros_like,
        "mean": lambda resid: mean.expand_as(resid),
    }
    if control_sae is not None:
        replacements["random"] = lambda resid: control_sae(resid).recon
    with ctx.report.track("SAE gate: splice", len(input_ids), "sequences") as bar:
        splice = splice_quality(
            lm,
            input_ids,
            sae.spec.hook_layer,
            replacements,
            batch=SPLICE_BATCH,
            advance=bar.advance,
        )
    near_duplicates = near_duplicate_fraction(sae.W_dec)

    report = make_report(
        quality, usage_entropy(quality.density), near_duplicates, splice, control, config
    )
    reasons = failures(report, config)
    SaeGate.report.save(ctx.out, report)
    latents = np.arange(sae.num_latents, dtype=np.int32)
    SaeGate.density.save(ctx.out, {"latent": latents, "density": quality.density.numpy()})
    density_histogram(
        quality.density,
        None if control is None else control.density,
        SaeGate.density_figure.path(ctx.out),
    )
    return Output(report.headline(), "fail" if reasons else "pass", reasons)


def _residuals(
    reader: ActivationReader,
    config: GateSaeConfig,
    advance: Callable[[float], None] | None,
    batch_tokens: int | None = None,
) -> Iterator[Tensor]:
    size = batch_tokens or config.batch_tokens
    for batch in reader.ordered(size, max_tokens=config.eval_tokens):
        assert batch.resid is not None
        yield batch.resid
        if advance is not None:
            advance(len(batch.resid))
