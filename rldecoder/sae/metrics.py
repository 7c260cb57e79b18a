"""Quality of an SAE on held-out residuals. Formulas: docs/metrics.md."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rldecoder.errors import BadInputError
from rldecoder.sae.model import Sae, SaeSpec

L0_PERCENTILES = (5, 50, 95)
TWIN_COSINE = 0.9
"""Two decoder rows with a larger cosine are near duplicates."""


class ReconstructionQuality(NamedTuple):
    """How well, and with how many latents, an SAE rebuilds held-out residuals."""

    fvu: float
    """Squared error over squared deviation from the held-out mean."""
    normalised_mse: float
    """Squared error over squared norm."""
    mse: float
    """Squared error per element, in squared residual units."""
    cosine: float
    """Mean cosine between residual and reconstruction, both taken relative to b_dec."""
    l0_mean: float
    l0_percentiles: tuple[float, ...]
    """At L0_PERCENTILES."""
    density: Tensor
    """[L] float64: share of tokens on which each latent fires."""
    num_tokens: int

    @property
    def explained_variance(self) -> float:
        """1 - fvu."""
        return 1.0 - self.fvu

    @property
    def dead_fraction(self) -> float:
        """Share of latents that never fired on these tokens."""
        return float((self.density == 0).double().mean())


@torch.inference_mode()
def reconstruction_quality(
    sae: Sae, batches: Iterable[Float[Tensor, "_ d_model"]]
) -> ReconstructionQuality:
    """Measure an SAE on batches [N, D] of raw residuals in any float dtype.

    Raises:
        BadInputError: there is no token.
    """
    device = sae.W_dec.device
    error = square = cosine = torch.zeros((), dtype=torch.float64, device=device)
    total = torch.zeros(sae.d_model, dtype=torch.float64, device=device)
    fired = torch.zeros(sae.num_latents, dtype=torch.int64, device=device)
    counts: list[Tensor] = []

    # Sums in float64: a float32 sum over millions of tokens would lose the small errors.
    for batch in batches:
        x = batch.to(device).float()
        recon, latents = sae(x)
        error = error + (x - recon).square().sum(dtype=torch.float64)
        square = square + x.square().sum(dtype=torch.float64)
        total += x.sum(0, dtype=torch.float64)
        directions = torch.cosine_similarity(x - sae.b_dec, recon - sae.b_dec, dim=1)
        cosine = cosine + directions.sum(dtype=torch.float64)
        active = latents.acts > 0
        counts.append(active.sum(1).cpu())
        fired += torch.bincount(latents.indices[active], minlength=sae.num_latents)
    if not counts:
        raise BadInputError(
            "There are no held-out activations to measure an SAE on.",
            "The split of the activation cache is empty.",
            "Raise the split's share in `ingest`, or `cache_activations.budget_tokens`.",
        )

    l0 = torch.cat(counts).double()
    num_tokens = len(l0)
    deviation = square - total.square().sum() / num_tokens
    quantiles = torch.tensor(L0_PERCENTILES, dtype=torch.float64) / 100
    return ReconstructionQuality(
        fvu=float(error / deviation),
        normalised_mse=float(error / square),
        mse=float(error / (num_tokens * sae.d_model)),
        cosine=float(cosine / num_tokens),
        l0_mean=float(l0.mean()),
        l0_percentiles=tuple(torch.quantile(l0, quantiles).tolist()),
        density=(fired.double() / num_tokens).cpu(),
        num_tokens=num_tokens,
    )


class Usage(NamedTuple):
    """How evenly latents share the firing."""

    entropy: float
    """Nats."""
    normalised_entropy: float
    """Over log(number of latents): 1 when all fire equally often."""
    effective_latents: float
    """exp(entropy)."""


def usage_entropy(density: Float[Tensor, " latents"]) -> Usage:
    """Entropy of the share of all firings that each latent has; 0 when nothing fires."""
    total = density.sum()
    if float(total) == 0 or len(density) < 2:
        return Usage(0.0, 0.0, 1.0)
    share = density.double() / total
    entropy = float(torch.special.entr(share).sum())
    return Usage(entropy, entropy / math.log(len(density)), math.exp(entropy))


@torch.inference_mode()
def near_duplicate_fraction(
    W_dec: Float[Tensor, "latents d_model"], threshold: float = TWIN_COSINE, chunk: int = 2048
) -> float:
    """Share of decoder rows [L, D] that have another row at a cosine above `threshold`."""
    rows = torch.nn.functional.normalize(W_dec.float(), dim=1)
    twins = 0
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        cosine = part @ rows.T
        own = torch.arange(len(part), device=rows.device)
        cosine[own, own + start] = -1.0
        twins += int((cosine.amax(1) > threshold).sum())
    return twins / len(rows)


@torch.no_grad()
def random_control(
    spec: SaeSpec, seed: int, sample: Float[Tensor, "tokens d_model"], l0: float
) -> Sae:
    """A random-init SAE that fires as often as the measured one, at its best single gain.

    Its b_dec is the sample's mean. For relu one bias, for jumprelu one threshold, is set for all
    latents so that the mean L0 on the sample is `l0`; topk has it by construction. Its decoder
    rows are then multiplied by the least-squares gain, because a random dictionary's scale is
    arbitrary and must not be what it fails by.

    Args:
        spec: of the SAE under test.
        seed: of the random dictionary.
        sample: [N, D] residuals, raw.
        l0: mean active latents a token.
    """
    x = sample.float()
    control = Sae.random_init(spec, seed, x.mean(0).cpu()).to(x.device)
    match_l0(control, x, l0)
    recon = control(x).recon - control.b_dec
    centred = x - control.b_dec
    gain = (recon * centred).sum() / recon.square().sum().clamp_min(1e-12)
    control.W_dec.mul_(gain)
    return control.eval().requires_grad_(False)


@torch.no_grad()
def match_l0(control: Sae, x: Tensor, l0: float) -> None:
    """Make an untrained SAE fire on `l0` latents a token, on average over residuals [N, D].

    One bias is set for all latents of relu, one threshold for all of jumprelu; topk fires on its k.
    """
    if control.spec.k is not None:
        return
    pre_acts = control.pre_acts(x).flatten()
    rank = max(1, min(len(pre_acts), round(l0 * len(x))))
    smallest = pre_acts.kthvalue(len(pre_acts) - rank + 1).values
    if control.spec.architecture == "relu":
        control.b_enc.sub_(smallest)
    else:
        control.threshold.fill_(smallest.clamp_min(0.0))
