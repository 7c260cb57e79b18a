"""A training batch through the autoencoder: pairs that fire where they are few, else all of them.

Reconstruction and gradients are float32 and touch only the pairs that the architecture chose.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rldecoder.sae.candidates import Chosen
from rldecoder.sae.parallel import Group
from rldecoder.sae.sparse_ops import SaeWeights, bags_of, decode_pairs, encode_pairs


class Autoencoded(NamedTuple):
    """A batch through the autoencoder; gradients flow through all but `fired` and `cut`."""

    levels: Tensor
    """[N, G, D] float32: reconstructions from the nested dictionaries (G = 1 but for matryoshka);
    the last one reads all latents."""
    acts: Tensor
    """float32, >= 0: [M] of the pairs, or [N, L] where dense was the faster way."""
    gates: Tensor
    """Shape of `acts`: 1 where a latent fires. For jumprelu a gradient reaches the thresholds."""
    fired: Tensor
    """[L] bool: latents that fired on some token."""
    cut: float
    """`Chosen.cut`."""


class Fires(Protocol):
    """What the autoencoder asks of an architecture."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, ascending; the last one is L."""
        ...

    @abstractmethod
    def choose(
        self, x: Float[Tensor, "tokens d_model"], weights: SaeWeights, group: Group
    ) -> Chosen | None:
        """The pairs that may fire on scaled inputs [N, D]; None where they are too many."""
        ...

    def activate(
        self, pre_acts: Float[Tensor, " *cells"], latents: Int[Tensor, " *cells"] | None
    ) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
        """Activations and gates of pre-activations [M] of `latents` [M], or of all [N, L]."""
        ...


def autoencode(
    x: Float[Tensor, "tokens d_model"],
    weights: SaeWeights,
    architecture: Fires,
    group: Group | None = None,
) -> Autoencoded:
    """Encode and decode scaled inputs [N, D] float32.

    Args:
        x: this process's tokens.
        weights: of the SAE in training.
        group: of the processes whose tokens make up the batch.
    """
    with torch.no_grad():
        chosen = architecture.choose(x, weights, group or Group())
    if chosen is None:
        return autoencode_dense(x, weights, architecture)
    pairs = chosen.pairs
    pre_acts = encode_pairs(x, weights, pairs, chosen.pre_acts)
    acts, gates = architecture.activate(pre_acts, pairs.latents)
    sums = decode_pairs(acts, weights.dec, pairs, bags_of(pairs, architecture.ends))
    fired = torch.zeros_like(weights.b_enc).index_add(0, pairs.latents, gates.detach()) > 0
    return Autoencoded(_nested(sums, len(x)) + weights.b_dec, acts, gates, fired, chosen.cut)


def autoencode_dense(
    x: Float[Tensor, "tokens d_model"], weights: SaeWeights, architecture: Fires
) -> Autoencoded:
    """The same by dense products, for architectures in which each latent decides for itself."""
    pre_acts = F.linear(x - weights.b_dec, weights.enc, weights.b_enc)
    acts, gates = architecture.activate(pre_acts, None)
    levels = (acts @ weights.dec)[:, None] + weights.b_dec
    return Autoencoded(levels, acts, gates, (gates > 0).any(0), 0.0)


def relu_gates(
    pre_acts: Float[Tensor, " *cells"],
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """max(z, 0), and 1 where it is above 0."""
    acts = torch.relu(pre_acts)
    return acts, (acts.detach() > 0).to(acts.dtype)


class JumpGate(torch.autograd.Function):
    """acts = z H(z - theta) and gates = H(z - theta), with the paper's straight-through gradients.

    Rajamanoharan et al. 2024, equations 11 and 12: with a rectangular kernel K of width e,
    d acts / d theta = -(theta / e) K((z - theta) / e) and d gates / d theta = -(1 / e) K(...).
    """

    @staticmethod
    def forward(
        ctx: Any, z: Float[Tensor, " *cells"], theta: Float[Tensor, " *cells"], width: float
    ) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
        gates = (z > theta).to(z.dtype)
        ctx.save_for_backward(z, theta, gates)
        ctx.width = width
        return z * gates, gates

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_acts: Float[Tensor, " *cells"], grad_gates: Float[Tensor, " *cells"]
    ) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"], None]:
        z, theta, gates = ctx.saved_tensors
        window = ((z - theta).abs() < ctx.width / 2).to(z.dtype) / ctx.width
        return grad_acts * gates, -window * (theta * grad_acts + grad_gates), None


def _nested(sums: Tensor, num_tokens: int) -> Tensor:
    """Sums over each group of latents [N * G, D] as sums over nested dictionaries [N, G, D]."""
    groups = sums.view(num_tokens, -1, sums.shape[1])
    return groups if groups.shape[1] == 1 else groups.cumsum(1)
