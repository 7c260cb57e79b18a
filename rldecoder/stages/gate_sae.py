"""The SAE's quality gate: measured on the test split, published whether it passes or fails.

In: the SAE, the test split of the activation cache (reconstruction, density) and of the corpus
(splice into the frozen model). Out: `report.json`, `density.parquet`, `density.svg`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from rldecoder.config.sae import GateSaeConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.shards import read_tokens
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.metrics import (
    near_duplicate_fraction,
    random_control,
    reconstruction_quality,
    usage_entropy,
)
from rldecoder.sae.model import Sae
from rldecoder.sae.plots import density_histogram
from rldecoder.sae.report import failures, make_report
from rldecoder.sae.splice import splice_quality
from rldecoder.schemas import DENSITY, write_json, write_parquet
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

SPLIT = "test"
CONTROL_TOKENS = 4096
"""Test tokens on which the random control's mean, threshold and gain are fitted. That favours the
control, never the SAE."""


def run(
    inputs: Mapping[str, InputArtifact], config: GateSaeConfig, ctx: StageContext
) -> StageOutput:
    """Measure every metric of the plan's QA gate, publish them, and give the verdict."""
    seed_everything(ctx.seed)
    sae = Sae.load(inputs["train_sae"].path / "sae", ctx.device)
    reader = ActivationReader(inputs["cache_activations"].path, SPLIT)
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    input_ids = torch.from_numpy(read_tokens(inputs["ingest"].path, SPLIT, config.splice_sequences))

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
            batch=config.splice_batch,
            advance=bar.advance,
        )
    near_duplicates = near_duplicate_fraction(sae.W_dec, config.near_duplicate_cosine)

    report = make_report(
        quality, usage_entropy(quality.density), near_duplicates, splice, control, config
    )
    reasons = failures(report, config)
    write_json(ctx.out / "report.json", report)
    latents = np.arange(sae.num_latents, dtype=np.int32)
    columns = {"latent": latents, "density": quality.density.numpy()}
    write_parquet(ctx.out / "density.parquet", columns, DENSITY)
    density_histogram(
        quality.density, None if control is None else control.density, ctx.out / "density.svg"
    )
    return StageOutput(
        metrics={name: entry["value"] for name, entry in report.items()},
        verdict="fail" if reasons else "pass",
        reasons=reasons,
    )


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
