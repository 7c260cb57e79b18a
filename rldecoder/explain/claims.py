"""Claims of Method B: what they say, in which words, and whether interventions agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import at_once, last_of_text, resid_of
from rldecoder.explain.patching import TWO_SIDED_95, ablate
from rldecoder.sae.model import SparseLatents
from rldecoder.visible_text import visible_text, visible_token

Direction = Literal["supports", "opposes"]
Verdict = Literal["supported", "decoder only", "contradicted", "too small to tell"]

# Nats by which removing a feature changes log p: below .1 (10 % of the odds) and above .7 (a
# factor of two) a reader should read different words.
SLIGHT_BELOW = 0.1
STRONG_ABOVE = 0.7


@dataclass(frozen=True)
class Claim:
    """One checkable statement about one prediction."""

    latent: int
    label: str | None
    """None where there is none, or none that may be quoted."""
    evidence_position: int
    """Token position where the feature is most active in the text so far."""
    evidence_text: str
    direction: Direction
    strength: float
    """Predicted |effect| of removing the feature on log p(output token), nats."""
    noise: float
    """Effects up to this many nats are what a random direction of the same length does."""
    output_token: str
    probability: float
    """The decoder's probability of the output token."""
    label_confidence: float | None = None
    """Of the latent's label, quoted or not."""


@dataclass(frozen=True)
class CheckedClaim:
    """A claim with the outcome of its interventions."""

    claim: Claim
    effect: float
    """Measured on the decoder: log p(token) - log p(token without the feature), nats."""
    verdict: Verdict
    frozen_effect: float | None = None
    """The same on the frozen model: the feature's direction taken out of the residual stream at
    the last position, everything else (the SAE's error too) kept. None when not measured."""
    frozen_noise: float | None = None
    """What effects on the frozen model must exceed, nats; at least the claim's own noise."""


def claim_sentence(claim: Claim) -> str:
    """The claim in words, always by the same grammar."""
    label = "" if claim.label is None else f" “{visible_text(claim.label, 120)}”"
    size = (
        "slightly "
        if claim.strength < SLIGHT_BELOW
        else "strongly "
        if claim.strength > STRONG_ABOVE
        else ""
    )
    change = "lower" if claim.direction == "supports" else "higher"
    token = visible_token(claim.output_token)
    return (
        f"Feature #{claim.latent}{label}, most active at “{visible_token(claim.evidence_text)}” "
        f"(token {claim.evidence_position}), {size}{claim.direction} “{token}”: without it, "
        f"log p would be {claim.strength:.2f} nats {change}."
    )


def explanation_text(claims: Sequence[Claim]) -> str:
    """All claims as numbered sentences; says so when there is nothing to claim."""
    if not claims:
        return (
            "Method B makes no claim here: it expects no single feature to move this prediction "
            "clearly more than a random direction would."
        )
    return " ".join(f"{place}. {claim_sentence(claim)}" for place, claim in enumerate(claims, 1))


def judge(
    predicted_sign: float,
    effect: float,
    noise: float,
    frozen_effect: float | None,
    frozen_noise: float | None = None,
) -> Verdict:
    """Compare a predicted direction with the effects on both models.

    A claim is about the frozen model, which the decoder only reads: it is supported if both
    effects have its sign and exceed their noise, and stands for the decoder only if just its does.

    Args:
        predicted_sign: > 0 for supports, < 0 for opposes.
        effect: measured on the decoder, nats.
        noise: effects up to this size are not told from chance (`patching.noise_floor`).
        frozen_effect: measured on the frozen model; None when it was not.
        frozen_noise: the same for the frozen model; None: `noise`.
    """
    sign = 1 if predicted_sign > 0 else -1
    if abs(effect) <= noise:
        return "too small to tell"
    if effect * sign < 0:
        return "contradicted"
    bar = noise if frozen_noise is None else frozen_noise
    agrees = frozen_effect is not None and frozen_effect * sign > bar
    return "supported" if agrees else "decoder only"


@torch.no_grad()
def verify_on_decoder(
    decoder: SaeDecoderForCausalLM, latents: SparseLatents, token: int, claimed: Sequence[int]
) -> list[float]:
    """Measured effect of each claimed latent at the end of a text, by a real intervention.

    The latent's activation there is set to 0 and the decoder is run again, without the shortcuts
    of `patching.measure`.

    Args:
        latents: acts and indices [T, K] of the text.
        token: the output token.
        claimed: latents that the claims name.
    """
    if not claimed:
        return []
    places = last_of_text(latents)
    acts, indices = (column.expand(len(claimed), -1) for column in places.latents)
    wanted = torch.tensor(list(claimed), device=indices.device)
    ablated = ablate(SparseLatents(acts, indices), wanted)
    variants = torch.cat([resid_of(decoder, places.latents), resid_of(decoder, ablated)])
    ((_, predict),) = at_once(decoder, places, 1)
    hidden = predict(variants[None])[0]
    logprobs = decoder.frozen.lm.unembed(hidden).log_softmax(-1)[:, token]
    return (logprobs[0] - logprobs[1:]).tolist()


@torch.no_grad()
def verify_on_frozen(
    decoder: SaeDecoderForCausalLM,
    resid: Float[torch.Tensor, "length d_model"],
    latents: SparseLatents,
    token: int,
    claimed: Sequence[int],
) -> list[float]:
    """The same effects on the frozen model itself, spliced at the hook layer.

    act * W_dec[latent] is subtracted from the residual at the last position; the reconstruction
    error of the SAE stays in place, so nothing but the feature is removed.

    Args:
        resid: [T, D], the text's residual stream at the hook layer.
        latents: acts and indices [K] at its last position.
        token, claimed: as in `verify_on_decoder`.
    """
    if not claimed:
        return []
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    act_of = dict(zip(latents.indices.tolist(), latents.acts.tolist(), strict=True))
    wanted = torch.tensor(list(claimed), device=resid.device)
    acts = torch.tensor([act_of.get(latent, 0.0) for latent in claimed], device=resid.device)
    removed = torch.cat([sae.W_dec.new_zeros(1, sae.d_model), acts[:, None] * sae.W_dec[wanted]])

    # The unchanged text is one of the rows: rounding that all share is no effect.
    rows = resid.expand(len(removed), -1, -1).clone()
    rows[:, -1] = (rows[:, -1].float() - removed).to(resid.dtype)
    final = lm.tail(rows, sae.spec.hook_layer)[:, -1]
    logprobs = lm.unembed(final).log_softmax(-1)[:, token]
    return (logprobs[0] - logprobs[1:]).tolist()


def noise_on_frozen(
    decoder: SaeDecoderForCausalLM,
    resid: Float[torch.Tensor, "length d_model"],
    latents: SparseLatents,
    token: int,
    claimed: Sequence[int],
) -> list[float]:
    """What 95 % of random directions do to the frozen model, each as long as a claimed feature's.

    1.96 r |g| / sqrt(D), to first order: g is the gradient of log p(token) by the residual at the
    last position, r = act |W_dec[latent]|.

    Args:
        resid, latents, token, claimed: as in `verify_on_frozen`.
    """
    if not claimed:
        return []
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    with torch.enable_grad():
        change = torch.zeros(sae.d_model, device=resid.device, requires_grad=True)
        last = (resid[-1:].float() + change).to(resid.dtype)
        final = lm.tail(torch.cat([resid[:-1], last])[None], sae.spec.hook_layer)[0, -1]
        (gradient,) = torch.autograd.grad(lm.unembed(final).log_softmax(-1)[token], change)
    act_of = dict(zip(latents.indices.tolist(), latents.acts.tolist(), strict=True))
    lengths = sae.W_dec.detach()[list(claimed)].norm(dim=-1).tolist()
    usual = TWO_SIDED_95 * float(gradient.norm()) / sae.d_model**0.5
    return [
        usual * length * act_of.get(latent, 0.0)
        for length, latent in zip(lengths, claimed, strict=True)
    ]
