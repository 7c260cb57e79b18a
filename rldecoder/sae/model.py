"""The sparse autoencoder: what it computes, and how it lies on disk (sae_lens 6.54 layout).

    pre_acts = (x - b_dec) @ W_enc + b_enc        acts = TopK(relu(pre_acts)) or relu(pre_acts)
    recon    = acts @ W_dec + b_dec

A saved SAE reads raw residuals: whatever scaling training used is folded into the weights.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rldecoder.config.base import Config
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.sae.sparse_ops import SparseLatents, decode_sparse, sparsify, top_k
from rldecoder.seeds import torch_generator

__all__ = ["Sae", "SaeOutput", "SaeSpec", "SparseLatents", "fold_input_scale"]

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
TENSOR_NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
_LENS_ARCHITECTURE = {"topk": "topk", "relu": "standard"}
_ARCHITECTURE = {lens: ours for ours, lens in _LENS_ARCHITECTURE.items()}


class SaeSpec(Config):
    """The shape of an SAE and where in which model it sits."""

    architecture: Literal["topk", "relu"] = "topk"
    """`topk` keeps the k largest positive pre-activations of a token, `relu` all positive ones."""
    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    num_latents: int = Field(gt=0)
    """Number of dictionary columns."""
    k: int | None = None
    """Latents kept per token; for `topk` only."""
    hook_layer: int = Field(default=0, ge=0)
    """The residual stream after this many blocks."""
    model_name: str = ""
    """The language model whose residuals it reads."""
    context_length: int | None = None
    """Tokens per sequence of its training text; informative."""
    dtype: Literal["float32"] = "float32"
    """Of the weights on disk and of the computation."""

    @model_validator(mode="after")
    def _check(self) -> SaeSpec:
        if self.architecture == "topk":
            if self.k is None or not 0 < self.k <= self.num_latents:
                raise ValueError(
                    f"topk needs 1 <= k <= num_latents={self.num_latents}, got {self.k}"
                )
        elif self.k is not None:
            raise ValueError("k belongs to the topk architecture only")
        return self

    @property
    def hook_name(self) -> str:
        """The hook point in TransformerLens words, as sae_lens expects it."""
        if self.hook_layer == 0:
            return "blocks.0.hook_resid_pre"
        return f"blocks.{self.hook_layer - 1}.hook_resid_post"


class SaeOutput(NamedTuple):
    """A reconstruction and the latents it was made from."""

    recon: Tensor
    """[..., D] float32, in the units of the input."""
    latents: SparseLatents


class Sae(nn.Module):
    """A sparse autoencoder over residuals; weights and computation are float32.

    Attributes:
        W_enc: [D, L].  b_enc: [L].  W_dec: [L, D], one latent's direction a row.  b_dec: [D].
    """

    def __init__(self, spec: SaeSpec) -> None:
        super().__init__()
        self.spec = spec
        d_model, num_latents = spec.d_model, spec.num_latents
        self.W_enc = nn.Parameter(torch.zeros(d_model, num_latents))
        self.b_enc = nn.Parameter(torch.zeros(num_latents))
        self.W_dec = nn.Parameter(torch.zeros(num_latents, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.spec.d_model

    @property
    def num_latents(self) -> int:
        """Number of dictionary columns."""
        return self.spec.num_latents

    def pre_acts(self, x: Tensor) -> Tensor:
        """Pre-activations [..., L] float32 of residuals [..., D] in any float dtype."""
        centred = (x.float() - self.b_dec).reshape(-1, self.d_model)
        flat = torch.addmm(self.b_enc, centred, self.W_enc)
        return flat.view(*x.shape[:-1], self.num_latents)

    def encode(self, x: Tensor) -> SparseLatents:
        """The active latents of residuals [..., D]: K = k, or for relu the batch's largest L0."""
        if self.spec.k is not None:
            return top_k(self.pre_acts(x), self.spec.k)
        return sparsify(torch.relu(self.pre_acts(x)))

    def encode_dense(self, x: Tensor) -> Tensor:
        """Activations [..., L] float32 of residuals [..., D], zeros included."""
        if self.spec.k is None:
            return torch.relu(self.pre_acts(x))
        latents = self.encode(x)
        dense = latents.acts.new_zeros(*x.shape[:-1], self.num_latents)
        return dense.scatter(-1, latents.indices, latents.acts)

    def decode(self, latents: SparseLatents) -> Tensor:
        """The reconstruction [..., D] float32; reads only the rows of W_dec that are active."""
        return decode_sparse(latents, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> SaeOutput:
        """Encode and decode residuals [..., D]."""
        latents = self.encode(x)
        return SaeOutput(self.decode(latents), latents)

    @classmethod
    def random_init(cls, spec: SaeSpec, seed: int, mean: Tensor | None = None) -> Sae:
        """Random unit rows as decoder, their transpose as encoder, `mean` [D] as b_dec.

        It is the start of training and the control of every quality metric (what an untrained
        dictionary reaches at the same L0).
        """
        sae = cls(spec)
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
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in TENSOR_NAMES}
        save_file(tensors, folder / WEIGHTS_FILE)
        text = json.dumps(_lens_config(self.spec), indent=2, sort_keys=True)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Sae:
        """Read a folder written by `save` or by sae_lens; the result has no gradients.

        Raises:
            BadInputError: the folder or a file is missing, or uses what this project does not.
            DamagedFileError: a file cannot be parsed, a shape is wrong, a value is not finite.
        """
        config = _read_config(folder)
        tensors = _read_tensors(folder)
        spec = _spec_from_lens(config, folder)
        shapes = {name: tuple(param.shape) for name, param in cls(spec).named_parameters()}
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise DamagedFileError(
                    f"{name} in {folder / WEIGHTS_FILE} has shape {tuple(tensors[name].shape)}.",
                    f"{CONFIG_FILE} says {shape}.",
                    "Build the SAE again, or copy both files from the same source.",
                )
            if not bool(torch.isfinite(tensors[name]).all()):
                raise DamagedFileError(
                    f"{name} in {folder / WEIGHTS_FILE} holds NaN or infinity.",
                    "The file was damaged, or training diverged.",
                    "Build the SAE again with a lower `train_sae.lr`.",
                )
        sae = cls(spec)
        sae.load_state_dict(_fold_lens_options(tensors, config))
        return sae.to(device).eval().requires_grad_(False)


def fold_input_scale(sae: Sae, scale: float) -> Sae:
    """A copy of an SAE of scaled inputs `scale * x` that reads raw `x` instead.

    TopK and ReLU are positively homogeneous, so dividing both biases by the scale divides the
    activations and the reconstruction by it; W_enc and the unit rows of W_dec stay as they are.
    """
    out = Sae(sae.spec)
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    state["b_enc"] /= scale
    state["b_dec"] /= scale
    out.load_state_dict(state)
    return out.to(sae.W_enc.device)


def _lens_config(spec: SaeSpec) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architecture": _LENS_ARCHITECTURE[spec.architecture],
        "d_in": spec.d_model,
        "d_sae": spec.num_latents,
        "dtype": spec.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "hook_name": spec.hook_name,
            "hook_layer": spec.hook_layer,
            "model_name": spec.model_name,
            "context_size": spec.context_length,
            "made_by": "rl-decoder",
        },
    }
    if spec.k is not None:
        config |= {"k": spec.k, "rescale_acts_by_decoder_norm": False}
    return config


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise BadInputError(
            f"No SAE at {folder}: {CONFIG_FILE} is missing.",
            "An SAE is a folder with cfg.json and sae_weights.safetensors.",
            "Check the path, or run the stage `train_sae`.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.", f"{error}.", "Build the SAE again."
        ) from error
    needed = {"architecture", "d_in", "d_sae"}
    if not isinstance(config, dict) or not needed <= config.keys():
        raise DamagedFileError(
            f"{path} is not an SAE's config.",
            f"It needs the keys {sorted(needed)}.",
            "Build the SAE again, or save it with sae_lens 6.",
        )
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise BadInputError(
            f"No SAE weights at {path}.", "The file is missing.", "Build the SAE again."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.", f"{error}.", "Build the SAE again."
        ) from error
    if set(tensors) != set(TENSOR_NAMES):
        raise DamagedFileError(
            f"{path} holds the tensors {sorted(tensors)}.",
            f"An SAE holds exactly {sorted(TENSOR_NAMES)}.",
            "Only sae_lens's `standard` and `topk` SAEs can be used.",
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _spec_from_lens(config: dict[str, Any], folder: Path) -> SaeSpec:
    architecture = _ARCHITECTURE.get(config["architecture"])
    unscaled = config.get("normalize_activations", "none") in ("none", None)
    flat = config.get("reshape_activations", "none") in ("none", None)
    if architecture is None or not unscaled or not flat:
        raise BadInputError(
            f"The SAE at {folder} cannot be used: architecture {config['architecture']!r}, "
            f"normalize_activations {config.get('normalize_activations')!r}, "
            f"reshape_activations {config.get('reshape_activations')!r}.",
            f"Supported are {sorted(_ARCHITECTURE)} on raw, unreshaped activations.",
            "Fold the normalisation into the weights before saving it.",
        )
    metadata = config.get("metadata") or {}
    try:
        return SaeSpec(
            architecture=architecture,  # type: ignore[arg-type]  # checked just above
            d_model=config["d_in"],
            num_latents=config["d_sae"],
            k=config.get("k") if architecture == "topk" else None,
            hook_layer=_hook_layer(metadata),
            model_name=metadata.get("model_name") or "",
            context_length=metadata.get("context_size"),
        )
    except ValueError as error:
        raise DamagedFileError(
            f"{folder / CONFIG_FILE} describes no valid SAE.", f"{error}", "Build the SAE again."
        ) from error


def _hook_layer(metadata: dict[str, Any]) -> int:
    """Blocks before the hook point; sae_lens files name it by hook only."""
    if isinstance(metadata.get("hook_layer"), int):
        return int(metadata["hook_layer"])
    name = str(metadata.get("hook_name", ""))
    block = re.search(r"(?:blocks|layers|h)\.(\d+)", name)
    if block is None:
        return 0
    return int(block.group(1)) + (0 if name.endswith("hook_resid_pre") else 1)


def _fold_lens_options(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Express sae_lens's optional conventions in the one this project computes."""
    out = dict(tensors)
    if not config.get("apply_b_dec_to_input", True):
        out["b_enc"] = out["b_enc"] + out["b_dec"] @ out["W_enc"]
    if config.get("rescale_acts_by_decoder_norm", False):
        norm = out["W_dec"].norm(dim=1).clamp_min(1e-12)
        out["W_enc"] = out["W_enc"] * norm
        out["b_enc"] = out["b_enc"] * norm
        out["W_dec"] = out["W_dec"] / norm[:, None]
    return out
