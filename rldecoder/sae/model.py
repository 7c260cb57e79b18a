"""The sparse autoencoder: what it computes.

    pre_acts = (x - b_dec) @ W_enc + b_enc, or x @ W_enc + b_enc (`SaeSpec.b_dec_is_subtracted`)
    acts     = TopK(relu(pre_acts)), relu(pre_acts), or pre_acts where they exceed a threshold
    recon    = acts @ W_dec + b_dec

A saved SAE reads raw residuals: whatever scaling training used is folded into the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rldecoder.sae.interop import read_sae, tensor_shapes, write_sae
from rldecoder.sae.selection import SparseLatents, top_k
from rldecoder.sae.sparse_ops import decode_sparse, sparsify
from rldecoder.sae.spec import SaeSpec
from rldecoder.seeds import torch_generator

__all__ = ["Sae", "SaeOutput", "SaeSpec", "SparseLatents", "fold_input_scale", "subtract_b_dec"]


class SaeOutput(NamedTuple):
    """A reconstruction and the latents it was made from."""

    recon: Tensor
    """[..., D] float32, in the units of the input."""
    latents: SparseLatents


class Sae(nn.Module):
    """A sparse autoencoder over residuals; weights and computation are float32.

    Attributes:
        W_enc: [D, L].  b_enc: [L].  W_dec: [L, D], one latent's direction a row.  b_dec: [D].
        threshold: [L], for jumprelu only, >= 0.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    threshold: nn.Parameter

    def __init__(self, spec: SaeSpec) -> None:
        super().__init__()
        self.spec = spec
        for name, shape in tensor_shapes(spec).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.spec.d_model

    @property
    def num_latents(self) -> int:
        """Number of dictionary columns."""
        return self.spec.num_latents

    def pre_acts(self, x: Float[Tensor, "*places d_model"]) -> Float[Tensor, "*places latents"]:
        """Pre-activations [..., L] float32 of residuals [..., D] in any float dtype."""
        read = x.float() - self.b_dec if self.spec.b_dec_is_subtracted else x.float()
        flat = torch.addmm(self.b_enc, read.reshape(-1, self.d_model), self.W_enc)
        return flat.view(*x.shape[:-1], self.num_latents)

    def encode(self, x: Float[Tensor, "*places d_model"]) -> SparseLatents:
        """The active latents of residuals [..., D]: K = k for topk, else the batch's largest L0."""
        if self.spec.k is not None:
            return top_k(self.pre_acts(x), self.spec.k)
        return sparsify(self._above(self.pre_acts(x)))

    def _above(self, pre_acts: Tensor) -> Tensor:
        """Activations [..., L] of architectures in which each latent decides for itself."""
        acts = torch.relu(pre_acts)
        if self.spec.architecture == "jumprelu":
            acts = acts * (pre_acts > self.threshold)
        return acts

    def encode_dense(self, x: Float[Tensor, "*places d_model"]) -> Float[Tensor, "*places latents"]:
        """Activations [..., L] float32 of residuals [..., D], zeros included."""
        if self.spec.k is None:
            return self._above(self.pre_acts(x))
        latents = self.encode(x)
        dense = latents.acts.new_zeros(*x.shape[:-1], self.num_latents)
        return dense.scatter(-1, latents.indices, latents.acts)

    def decode(self, latents: SparseLatents) -> Float[Tensor, "*places d_model"]:
        """The reconstruction [..., D] float32; reads only the rows of W_dec that are active."""
        return decode_sparse(latents, self.W_dec, self.b_dec)

    def forward(self, x: Float[Tensor, "*places d_model"]) -> SaeOutput:
        """Encode and decode residuals [..., D]."""
        latents = self.encode(x)
        return SaeOutput(self.decode(latents), latents)

    @classmethod
    def random_init(
        cls, spec: SaeSpec, seed: int, mean: Float[Tensor, " d_model"] | None = None
    ) -> Sae:
        """Random unit rows as decoder, their transpose as encoder, `mean` [D] as b_dec.

        It is the start of training and the control of every quality metric (what an untrained
        dictionary reaches at the same L0). It reads residuals less b_dec, whatever `spec` says.
        """
        sae = cls(spec.model_copy(update={"b_dec_is_subtracted": True}))
        generator = torch_generator(seed, "sae-init")
        rows = torch.randn(spec.num_latents, spec.d_model, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        with torch.no_grad():
            sae.W_dec.copy_(rows)
            sae.W_enc.copy_(rows.T)
            if mean is not None:
                sae.b_dec.copy_(mean)
        return sae

    def save(self, folder: Path) -> None:
        """Write `cfg.json` and `sae_weights.safetensors`; sae_lens loads the folder."""
        write_sae(folder, self.spec, self.state_dict())

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read a folder written by `save` or by sae_lens; the result has no gradients.

        Raises:
            BadInputError: the folder or a file is missing, or uses what this project does not.
            DamagedFileError: a file cannot be parsed, a shape is wrong, a value is not finite.
        """
        spec, tensors = read_sae(folder)
        sae = cls(spec)
        sae.load_state_dict(tensors)
        return sae.to(device).eval().requires_grad_(False)


def subtract_b_dec(sae: Sae) -> Sae:
    """The same function as one that reads residuals less b_dec, as training needs it."""
    if sae.spec.b_dec_is_subtracted:
        return sae
    out = Sae(sae.spec.model_copy(update={"b_dec_is_subtracted": True}))
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    state["b_enc"] += state["b_dec"] @ state["W_enc"]
    out.load_state_dict(state)
    return out.to(sae.W_enc.device)


def fold_input_scale(sae: Sae, scale: float) -> Sae:
    """A copy of an SAE of scaled inputs `scale * x` that reads raw `x` instead.

    All three architectures are positively homogeneous, so dividing biases and thresholds by the
    scale divides the activations and the reconstruction by it; W_enc and the unit rows of W_dec
    stay as they are.
    """
    out = Sae(sae.spec)
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    for name in state.keys() - {"W_enc", "W_dec"}:
        state[name] /= scale
    out.load_state_dict(state)
    return out.to(sae.W_enc.device)
