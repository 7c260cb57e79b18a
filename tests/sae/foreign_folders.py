"""Tiny SAEs in the forms in which others publish them, and what they compute, in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCK = 2
"""Its output is layer 3 here."""
FORMS = ("sae_lens", "gemma_npz", "gemma_safetensors", "sparsify", "qwen_scope")


class Weights(NamedTuple):
    """In the usual orientation: W_enc [D, L], W_dec [L, D]."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor


class Foreign(NamedTuple):
    """A folder, and what its SAE computes."""

    folder: Path
    weights: Weights
    k: int | None
    """Of TopK; None of JumpReLU."""
    b_dec_is_subtracted: bool

    def acts(self, x: Tensor) -> Tensor:
        """Activations [N, L] in float64, from the papers' formulas."""
        w = Weights(*(tensor.double() for tensor in self.weights))
        pre_acts = (x.double() - w.b_dec * self.b_dec_is_subtracted) @ w.W_enc + w.b_enc
        if self.k is None:
            return torch.where(pre_acts > w.threshold, pre_acts.clamp_min(0), 0)
        kept = pre_acts.topk(self.k, dim=1)
        return torch.zeros_like(pre_acts).scatter(1, kept.indices, kept.values.clamp_min(0))

    def recon(self, x: Tensor) -> Tensor:
        """Reconstructions [N, D] in float64."""
        return self.acts(x) @ self.weights.W_dec.double() + self.weights.b_dec.double()


def random_weights(
    d_model: int, num_latents: int, mean: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Weights:
    """Of an SAE that fires here and there on residuals of about unit size around `mean`."""
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(num_latents, d_model, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    b_dec = 0.1 * torch.randn(d_model, generator=generator) if mean is None else mean
    b_enc = 0.05 * torch.randn(num_latents, generator=generator)
    threshold = 0.3 + torch.rand(num_latents, generator=generator)
    enc = rows.T + 0.01 * torch.randn(d_model, num_latents, generator=generator)
    parts = (enc, b_enc, rows, b_dec, threshold)
    return Weights(*(part.to(dtype) for part in parts))


def write_foreign(form: str, root: Path, weights: Weights, *, k: int = 6) -> Foreign:
    """A folder under `root`, named as its publisher names it."""
    named = {name: tensor.contiguous() for name, tensor in weights._asdict().items()}
    d_model, num_latents = weights.W_enc.shape
    turned = {name: named[name].T.contiguous() for name in ("W_enc", "W_dec")}
    if form == "sae_lens":
        folder = root / "mine"
        folder.mkdir(parents=True)
        save_file(named, folder / "sae_weights.safetensors")
        write_config(folder, {
            "architecture": "jumprelu", "d_in": d_model, "d_sae": num_latents, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": "6.54.12", "hook_name": f"blocks.{BLOCK}.hook_resid_post",
                "model_name": "random", "context_size": 64, "prepend_bos": False,
            },
        })  # fmt: skip
        return Foreign(folder, weights, None, True)
    if form == "gemma_npz":
        folder = root / "gemma-scope-2b-pt-res" / f"layer_{BLOCK}" / "width_16k" / "average_l0_9"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **{name: part.numpy() for name, part in named.items()})
        return Foreign(folder, weights, None, False)
    if form == "gemma_safetensors":
        folder = root / "any" / f"layer_{BLOCK}_width_16k_l0_medium"
        folder.mkdir(parents=True)
        lower = {name.lower(): part for name, part in named.items()}
        save_file(lower, folder / "params.safetensors")
        write_config(folder, {
            "architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "l0": 40,
            "hf_hook_point_in": f"model.layers.{BLOCK}.output",
        }, "config.json")  # fmt: skip
        return Foreign(folder, weights, None, False)
    if form == "sparsify":
        folder = root / "sae-tiny" / f"layers.{BLOCK}"
        folder.mkdir(parents=True)
        save_file({
            "encoder.weight": turned["W_enc"], "encoder.bias": named["b_enc"],
            "W_dec": named["W_dec"], "b_dec": named["b_dec"],
        }, folder / "sae.safetensors")  # fmt: skip
        write_config(folder, {
            "activation": "topk", "expansion_factor": 32, "normalize_decoder": True,
            "num_latents": num_latents, "k": k, "multi_topk": False, "skip_connection": False,
            "transcode": False, "d_in": d_model,
        })  # fmt: skip
        write_config(folder.parent, {"model": "random", "ctx_len": 2048}, "config.json")
        return Foreign(folder, weights, k, True)
    assert form == "qwen_scope"
    folder = root / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{k}"
    folder.mkdir(parents=True)
    biases = {name: named[name] for name in ("b_enc", "b_dec")}
    save_file(turned | biases, folder / f"layer{BLOCK}.sae.safetensors")
    return Foreign(folder, weights, k, False)


def write_config(folder: Path, config: dict[str, Any], name: str = "cfg.json") -> None:
    """Write or overwrite a config."""
    (folder / name).write_text(json.dumps(config), encoding="utf-8")


def changed_config(folder: Path, name: str = "cfg.json", **changes: Any) -> None:
    """Change some keys of a config; those of `metadata` as a mapping of that name."""
    config = json.loads((folder / name).read_text(encoding="utf-8"))
    metadata = config.get("metadata", {}) | changes.pop("metadata", {})
    write_config(folder, config | changes | ({"metadata": metadata} if metadata else {}), name)
