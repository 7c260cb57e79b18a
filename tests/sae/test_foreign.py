"""SAEs of others: read as they compute, or refused by the name of what is not computed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from safetensors.torch import load_file, save_file

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.sae.foreign import describe
from rldecoder.sae.model import Sae
from tests.sae.test_interop import D_MODEL, INPUTS, NUM_LATENTS, K, assert_same, randomise

METADATA = {"hook_name": "blocks.5.hook_resid_post", "model_name": "gpt2"}
PLAIN: dict[str, Any] = {
    "architecture": "standard", "d_in": 8, "d_sae": 32, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
    "metadata": METADATA | {"sae_lens_version": "6.54.12"},
}  # fmt: skip
# gpt2-small-res-jb and its like, before sae_lens 6.
OLD: dict[str, Any] = {
    "architecture": "standard", "d_in": D_MODEL, "d_sae": NUM_LATENTS, "dtype": "float32",
    "device": "cpu", "model_name": "gpt2", "hook_name": "blocks.5.hook_resid_pre", "hook_layer": 5,
    "hook_head_index": None, "activation_fn_str": "relu", "apply_b_dec_to_input": True,
    "finetuning_scaling_factor": False, "sae_lens_training_version": "3.9.0", "prepend_bos": True,
    "dataset_path": "x", "context_size": 128, "normalize_activations": "none",
    "l1_coefficient": 0.1, "b_dec_init_method": "mean", "scale_sparsity_penalty_by_decoder_norm":
    True, "normalize_sae_decoder": False, "noise": 0.1, "mse_loss_normalization": "dense_batch",
}  # fmt: skip


def folder_of(folder: Path, config: dict[str, Any], **more: torch.Tensor) -> Path:
    """An SAE of `INPUTS`' width with this config."""
    kind = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=D_MODEL, d_sae=NUM_LATENTS))
    randomise(dict(kind.named_parameters()))
    save_file(kind.state_dict() | more, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def test_topk_under_the_name_standard(tmp_path: Path) -> None:
    """As sae_lens wrote it before 6: its own reader agrees, and k latents are active."""
    config = OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    sae = Sae.load(folder_of(tmp_path, config))
    assert (sae.spec.architecture, sae.spec.k, sae.spec.hook_layer) == ("topk", K, 5)
    assert_same(sae, sae_lens.SAE.load_from_disk(tmp_path))
    assert bool(((sae.encode_dense(INPUTS) > 0).sum(1) == K).all())


def test_old_configs_are_read_as_sae_lens_reads_them(tmp_path: Path) -> None:
    sae = Sae.load(folder_of(tmp_path, OLD, scaling_factor=torch.ones(NUM_LATENTS)))
    weights = load_file(tmp_path / "sae_weights.safetensors")
    del weights["scaling_factor"]  # sae_lens reads no such file from a disk any more
    save_file(weights, tmp_path / "sae_weights.safetensors")
    assert_same(sae, sae_lens.SAE.load_from_disk(tmp_path))
    assert (sae.spec.model_name, sae.spec.context_length) == ("gpt2", 128)


def test_a_scale_beside_the_weights_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, OLD, scaling_factor=torch.full((NUM_LATENTS,), 1.1))
    with pytest.raises(DamagedFileError, match="scaling_factor"):
        Sae.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "block", "layer"),
    [
        ("blocks.5.hook_resid_post", 5, 6),
        ("blocks.5.hook_resid_pre", 5, 5),
        ("blocks.0.hook_resid_pre", None, 0),
        ("model.layers.5", 5, 6),
        ("layers.5", None, 6),
        ("transformer.h.11", 11, 12),
        ("gpt_neox.layers.3", 3, 4),
        ("model.language_model.layers.20", 20, 21),
    ],
)
def test_residual_streams_and_their_layer(name: str, block: int | None, layer: int) -> None:
    metadata = {"hook_name": name} | ({} if block is None else {"hook_layer": block})
    assert describe(PLAIN | {"metadata": metadata}).hook_layer == layer


@pytest.mark.parametrize(
    "name",
    [
        "blocks.5.hook_mlp_out", "blocks.5.hook_attn_out", "blocks.5.attn.hook_z",
        "blocks.5.hook_resid_mid", "blocks.5.mlp.hook_post", "blocks.5.ln2.hook_normalized",
        "blocks.5.hook_mlp_in", "hook_embed", "ln_final.hook_normalized", "model.layers.5.mlp",
        "model.layers.5.self_attn.o_proj", "model.layers.5.input_layernorm", "model.norm",
        "blocks.5.hook_resid_post ", "blocks.-1.hook_resid_post", "", None, 5,
    ],
)  # fmt: skip
def test_what_is_no_residual_stream_is_refused(name: Any) -> None:
    with pytest.raises(BadInputError, match="hook_name"):
        describe(PLAIN | {"metadata": {"hook_name": name}})


META_CHANGES: list[dict[str, Any]] = [
    {"hook_layer": 6}, {"hook_layer": 4}, {"hook_layer": "5"}, {"hook_head_index": 3},
    {"hook_name_out": "blocks.5.hook_mlp_out"}, {"hook_layer_out": 7, "hook_layer": 5},
    {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
    {"model_from_pretrained_kwargs": {"checkpoint_index": 3}},
    {"center_writing_weights": True},
]  # fmt: skip
CHANGES: list[dict[str, Any]] = [
    {"architecture": "gated"}, {"architecture": "batchtopk"}, {"architecture": "transcoder"},
    {"architecture": ["standard"]}, {"activation_fn": "tanh-relu"}, {"activation_fn_str": "gelu"},
    {"architecture": "jumprelu", "activation_fn": "topk"}, {"activation_fn_kwargs": {"k": 4}},
    {"activation_fn": "relu", "activation_fn_kwargs": {"power": 2}},
    {"architecture": "topk", "k": 4, "activation_fn_kwargs": {"k": 5}},
    {"normalize_activations": "expected_average_only_in"}, {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"}, {"normalize_activations": True},
    {"normalize_activations": "covariance_whitening"}, {"reshape_activations": "hook_z"},
    {"finetuning_scaling_factor": True}, {"use_error_term": True}, {"d_out": 9},
    {"apply_b_dec_to_input": "false"}, {"rescale_acts_by_decoder_norm": True},
    {"hook_name": "blocks.4.hook_resid_post"}, {"model_name": "pythia-70m"},
    {"skip_connection": True}, {"input_scale": 0.2}, {"act_fn": "gelu"}, {"use_centring": 1},
    {"subtract_mean": True}, {"metadata": ["blocks.5.hook_resid_post"]},
]  # fmt: skip


@pytest.mark.parametrize("change", META_CHANGES + CHANGES, ids=str)
def test_what_is_not_computed_here_is_refused_by_name(change: dict[str, Any]) -> None:
    describe(PLAIN)
    inside = change in META_CHANGES
    config = PLAIN | {"metadata": METADATA | change} if inside else PLAIN | change
    with pytest.raises(BadInputError) as caught:
        describe(config)
    text = str(caught.value)
    assert any(key.removesuffix("_str") in text for key in change), text


def test_what_changes_nothing_is_no_reason_to_refuse() -> None:
    harmless = {
        "author": "someone", "notes": "x", "seed": 3, "training_tokens": 10,
        "use_ghost_grads": True,
        "normalize_activations": False, "reshape_activations": None, "hook_head_index": None,
        "finetuning_scaling_factor": None, "d_out": 8, "input_scale": None,
    }  # fmt: skip
    metadata = METADATA | {
        "model_from_pretrained_kwargs": {"center_writing_weights": False, "n_devices": 1},
        "prepend_bos": True, "neuronpedia_id": "gpt2-small/5-res-jb", "seqpos_slice": [None],
    }  # fmt: skip
    found = describe(PLAIN | harmless | {"metadata": metadata})
    assert (found.architecture, found.hook_layer) == ("relu", 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    folder_of(tmp_path, OLD, b_dec=torch.full((D_MODEL,), value))
    with pytest.raises(DamagedFileError, match="NaN"):
        Sae.load(tmp_path)
