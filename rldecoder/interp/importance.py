"""Which latents carry a prediction: attribution patching and integrated gradients.

The metric is m = log p(target token), summed over the metric positions. The importance of an
active latent i at one position is the first-order estimate of what setting it to zero does,

    I_i = (0 - f_i) * dm/df_i,

with everything else, the SAE's error term included, kept as it is. Two models are asked:
`decoder` (the feature decoder, which reads latents only) and `frozen` (the frozen model spliced
at the hook layer, h = sae.decode(f) + e with e = x - sae.decode(f) fixed, so that without an
ablation it is exactly the frozen model).
Sources: attribution patching 2403.00745, latents with error terms 2403.19647, integrated
gradients 1703.01365.
Axes: B sequence, T position, K active latents, M metric positions, L latents, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents

TargetName = Literal["decoder", "frozen"]
TARGETS: tuple[TargetName, ...] = ("decoder", "frozen")
MetricToken = Literal["frozen_argmax", "next_token"]


class PatchBatch(NamedTuple):
    """Sequences of one length, run up to the hook layer."""

    latents: SparseLatents
    """[B, T, K]; activations are 0 at the positions that the SAE does not read (the first)."""
    error: Tensor
    """[B, T, D] float32, the residual minus the reconstruction of `latents`."""
    metric_tokens: Tensor
    """[B, T] int64, the token whose log-probability counts at each position."""
    metric_mask: Tensor
    """[B, T] bool, the positions that count."""

    def rows(self, keep: Tensor) -> PatchBatch:
        """Only the sequences that the index or mask `keep` [B] selects."""
        return PatchBatch(
            self.latents.of(keep), self.error[keep], self.metric_tokens[keep],
            self.metric_mask[keep],
        )  # fmt: skip


MetricFunction = Callable[[PatchBatch, Tensor, Tensor], Tensor]
"""(batch, acts [B, T, K], error [B, T, D]) -> log-probabilities [M] in row order."""


@dataclass(frozen=True)
class Subject:
    """The models that importance is measured on."""

    lm: FrozenLM
    sae: Sae
    decoder: SaeDecoderForCausalLM

    @property
    def layer(self) -> int:
        """The hook layer."""
        return self.sae.spec.hook_layer

    def looks_back(self, target: TargetName) -> bool:
        """Whether latents of earlier positions move a prediction: not of a linear decoder."""
        return target == "frozen" or self.decoder.looks_back

    def metric(self, target: TargetName) -> MetricFunction:
        """The metric function of a target."""
        return self._decoder_metric if target == "decoder" else self._frozen_metric

    def _decoder_metric(self, batch: PatchBatch, acts: Tensor, error: Tensor) -> Tensor:
        latents = SparseLatents(acts, batch.latents.indices)
        return self._logprobs(self.decoder.hidden(latents), batch)

    def _frozen_metric(self, batch: PatchBatch, acts: Tensor, error: Tensor) -> Tensor:
        spliced = self.sae.decode(SparseLatents(acts, batch.latents.indices)) + error
        return self._logprobs(self.lm.tail(spliced, self.layer), batch)

    def _logprobs(self, final: Tensor, batch: PatchBatch) -> Tensor:
        logits = self.lm.unembed(final[batch.metric_mask])
        tokens = batch.metric_tokens[batch.metric_mask]
        chosen = logits.gather(-1, tokens[:, None]).squeeze(-1)
        return chosen - logits.logsumexp(-1)


@torch.no_grad()
def make_batch(
    subject: Subject,
    input_ids: Tensor,
    metric_mask: Tensor,
    *,
    metric_token: MetricToken = "frozen_argmax",
    skip_first: int = 1,
) -> PatchBatch:
    """Run sequences to the hook layer and prepare them for patching.

    Args:
        input_ids: [B, T], no padding.
        metric_mask: [B, T] bool; with "next_token" the last position never counts.
        metric_token: the frozen model's own most likely token, or the token that follows.
        skip_first: positions at the start whose residual the SAE does not read.
    """
    lm, sae = subject.lm, subject.sae
    resid, final = lm.resid_and_final(input_ids, subject.layer)
    latents = sae.encode(resid.float())
    acts = latents.acts.clone()
    acts[:, :skip_first] = 0
    latents = SparseLatents(acts, latents.indices)
    error = resid.float() - sae.decode(latents)
    mask, tokens = metric_mask.clone(), torch.zeros_like(input_ids)
    if metric_token == "next_token":
        tokens[:, :-1] = input_ids[:, 1:]
        mask[:, -1] = False
    else:
        tokens[mask] = lm.unembed(final[mask]).argmax(-1)
    return PatchBatch(latents, error, tokens, mask)


class Attribution(NamedTuple):
    """Importance of everything that enters at the hook layer, per position."""

    latents: Tensor
    """[B, T, K] I of each active latent, in nats: negative if zeroing it lowers the metric."""
    error: Tensor
    """[B, T] I of the SAE's error term, -e . dm/de; 0 for the decoder, which does not read it."""
    metric: Tensor
    """[M] log-probabilities without ablation."""


def attribute(
    metric: MetricFunction, batch: PatchBatch, integrated_steps: int | None = None
) -> Attribution:
    """Attribution patching, or integrated gradients when `integrated_steps` is given.

    Integrated gradients average dm/df over the midpoints of the straight line from no latents
    (alpha = 0) to all of them (alpha = 1), the error term kept fixed; their sum then approaches
    m(no latents) - m as the number of steps grows (completeness). For the error term the same
    averaged gradient is used.

    Raises:
        NumericalError: the metric is not finite.
    """
    alphas = (
        [1.0]
        if integrated_steps is None
        else [(step + 0.5) / integrated_steps for step in range(integrated_steps)]
    )

    acts, error = batch.latents.acts, batch.error
    acts_sum, error_sum = torch.zeros_like(acts), torch.zeros_like(error)
    for alpha in alphas:
        acts_in = (acts * alpha).requires_grad_(True)
        error_in = error.clone().requires_grad_(True)
        values = metric(batch, acts_in, error_in)
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                "A log-probability is NaN or infinite in attribution.",
                "The decoder or the spliced model gives no usable logits.",
                "Check the decoder's gate report, or load the model in float32.",
            )
        grads = torch.autograd.grad(values.sum(), (acts_in, error_in), allow_unused=True)
        acts_sum += grads[0]
        if grads[1] is not None:
            error_sum += grads[1]
    with torch.no_grad():
        baseline = values.detach() if integrated_steps is None else metric(batch, acts, error)
        count = len(alphas)
        return Attribution(-acts * acts_sum / count, -(error * error_sum).sum(-1) / count, baseline)


@torch.no_grad()
def sequence_metrics(metric: MetricFunction, batch: PatchBatch, acts: Tensor) -> Tensor:
    """[B] float64: the metric of each sequence, summed over its positions, under `acts`."""
    values = metric(batch, acts, batch.error).double()
    rows = batch.metric_mask.nonzero()[:, 0]
    return values.new_zeros(acts.shape[0]).index_add_(0, rows, values)


@torch.no_grad()
def exact_effect(metric: MetricFunction, batch: PatchBatch, latent: int, baseline: Tensor) -> float:
    """Sum of metric(latent set to zero) - metric over the batch, by running it.

    The latent is zeroed wherever it is active, at once; sequences without it are not run.

    Args:
        baseline: [B] `sequence_metrics` of the batch as it is.
    """
    acts, indices = batch.latents
    hit = (indices == latent) & (acts > 0)
    sequences = hit.any(-1).any(-1)
    if not bool(sequences.any()):
        return 0.0
    part = batch.rows(sequences)
    ablated = part.latents.acts.masked_fill(hit[sequences], 0.0)
    return float((sequence_metrics(metric, part, ablated) - baseline[sequences]).sum())


def considered_positions(batch: PatchBatch, *, looks_back: bool, skip_first: int = 1) -> Tensor:
    """[B, T] bool: positions whose latents can move the metric.

    Args:
        looks_back: `Subject.looks_back` of the model that is asked.
        skip_first: positions at the start whose residual the SAE does not read.
    """
    if not looks_back:
        return batch.metric_mask
    later = batch.metric_mask.flip(-1).long().cumsum(-1).flip(-1) > 0
    later[:, :skip_first] = False
    return later
