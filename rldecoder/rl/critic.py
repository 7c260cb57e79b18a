"""The critic: a small network of its own, which shares nothing with the policy.

It reads the SAE's reconstruction of the residual (what the latents say about the state), which
does not depend on the decoder's weights, so no gradient of it can reach the policy.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rldecoder.seeds import torch_generator


class Critic(nn.Module):
    """State value in normalised returns: LayerNorm, one hidden layer of tanh, one output.

    Args:
        d_model: width of the state.
        width: hidden units.
        seed: of the initial weights; the output layer starts at 0, so all values do.
    """

    def __init__(self, d_model: int, width: int, seed: int) -> None:
        super().__init__()
        generator = torch_generator(seed, "critic")
        start = torch.randn(width, d_model, generator=generator) / d_model**0.5
        self.hidden_weight = nn.Parameter(start)
        self.hidden_bias = nn.Parameter(torch.zeros(width))
        self.out_weight = nn.Parameter(torch.zeros(width))
        self.out_bias = nn.Parameter(torch.zeros(()))

    def forward(self, states: Float[Tensor, "*places d_model"]) -> Float[Tensor, " *places"]:
        """Values [...] of states [..., D]; gradients stop at the states."""
        x = F.layer_norm(states.detach(), states.shape[-1:])
        x = torch.tanh(F.linear(x, self.hidden_weight, self.hidden_bias))
        return x @ self.out_weight + self.out_bias
