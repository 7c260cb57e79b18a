"""Tiny random models of every causal architecture of the pinned transformers, and of every model
of several media with text among them; and what becomes of them: exact or refused.

A configuration is made small by its own setting names, so that a new architecture needs no line
here as long as it uses the common ones.
"""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.loading import read_model
from rldecoder.lm.proof import prove
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.text_part import text_part


def _classes() -> dict[str, str]:
    """Model type -> the class that makes text of text, and maybe of pictures and sounds."""
    kinds = ("CAUSAL_LM", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
    found: dict[str, str] = {}
    for kind in kinds:
        found |= getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES")
    return found


@functools.cache
def has_text_part(model_type: str) -> bool:
    """Whether it is made of several parts, of which one is a text model."""
    try:
        config = AutoConfig.for_model(model_type)
    except Exception:  # no configuration without arguments
        return False
    return isinstance(getattr(config, "text_config", None), PreTrainedConfig)


CLASSES = _classes()
ARCHITECTURES = tuple(sorted(CLASSES))

DEPTH = 4
LENGTH = 24
"""Beyond every window below."""
_SMALL: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "ffn_hidden_size": 48,
    "max_position_embeddings": 128, "n_positions": 128, "initializer_range": 0.2, "init_std": 0.2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "sliding_window": 6,
    # Factors that an implementation may forget must not be 1.
    "logits_scaling": 4.0, "logit_scale": 0.25, "final_logit_softcapping": 3.0,
    "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4,
    "lm_head_multiplier": 0.3, "query_pre_attn_scalar": 8, "scale_emb": 3,
    # Experts.
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_k": 2,
    "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 16,
    # Latent attention, indexers.
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4,
    # State-space and linear attention.
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
    "mamba_n_groups": 1, "mamba_chunk_size": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "mamba_d_ssm": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "time_step_rank": 4, "conv_kernel": 4, "lru_width": 32,
    "attention_window_size": 6, "attention_chunk_size": 6, "block_size": 8,
    # Per-layer embeddings, shared keys and values.
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 512, "laurel_rank": 4,
    "num_kv_shared_layers": 0, "global_head_dim": 8, "altup_num_inputs": 2,
    # Encoder-decoders and others of their own names.
    "d_model": 32, "d_kv": 8, "d_ff": 48, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "n_layers": DEPTH, "n_heads": 4, "n_layer": DEPTH, "n_head": 4,
    "n_embd": 32, "n_inner": 48, "rotary_dim": 4, "max_seq_len": 128, "embedding_size": 32,
    "ffn_dim": 48, "attention_heads": 4, "num_layers": DEPTH, "max_position_embedding": 128,
}  # fmt: skip
_MOST_PARAMETERS = 20_000_000
_MIXED = ["sliding_attention", "full_attention"] * 2
_TWO_ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(_MIXED)}
_OWN: dict[str, dict[str, Any]] = {
    "aya_vision": {"text_config": {"logit_scale": 1.0}},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "cohere2_vision": {"text_config": {"logit_scale": 1.0}},
    "cohere_compass": {"text_config": {"layer_types": _MIXED, "rope_parameters": _TWO_ROPES}},
    "cohere_compass_text": {"layer_types": _MIXED, "rope_parameters": _TWO_ROPES},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 1.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "layer_types": ["sliding_attention", "indexed_attention"] * 2, "head_dim": 16,
        "shared_experts_intermediate_size": 16, "per_layer_config": None,
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "exaone4_5": {
        "text_config": {"model_type": "exaone4"},
        "vision_config": {
            "depth": 2, "hidden_size": 32, "num_heads": 4, "num_key_value_heads": 2,
            "intermediate_size": 48, "out_hidden_size": 32,
        },
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3": {"text_config": {"final_logit_softcapping": None, "layer_types": _MIXED}},
    "gemma4": {"text_config": {"layer_types": _MIXED, "hidden_size_per_layer_input": 0}},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "gemma4_text": {"layer_types": _MIXED},
    "gemma4_unified": {"text_config": {"layer_types": _MIXED}},
    "gemma4_unified_text": {"layer_types": _MIXED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "janus": {
        "vision_config": {"projection_dim": 32},
        "vq_config": {
            "num_embeddings": 64, "base_channels": 32, "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
    },
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "kolibri1": {"layer_types": _MIXED},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["sliding_attention", "conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 32}}},
        "word_timestamp_config": {"blank_token_id": 511},
    },
    "nemotron_h_omni": {
        "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 64},
        "projector_hidden_size": 32, "vision_hidden_size": 32,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "hc_lowrank": 8,
    },
    "reformer": {
        "is_decoder": True, "axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16),
        "attention_head_size": 8, "feed_forward_size": 48, "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0,
    },
    "vibevoice_asr": {
        part: {"num_filters": 4, "depths": (1,) * 7}
        for part in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config")
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What single architectures need besides."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, alibi": ("falcon", {"alibi": True}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3, mixed": ("gemma3_text", {"layer_types": _MIXED}),
    "gemma3, capped": ("gemma3", {"text_config": {"final_logit_softcapping": 3.0}}),
    "gemma4, plain": ("gemma4_text", {"layer_types": _MIXED, "hidden_size_per_layer_input": 0}),
    "gemma4, shared keys": (
        "gemma4_unified_text", {"layer_types": _MIXED, "num_kv_shared_layers": 2},
    ),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt2, inverse": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, upcast": ("gpt2", {"reorder_and_upcast_attn": True}),
    "granite 4, hybrid": ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 2}),
    "granite 4, dense": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * DEPTH, "num_local_experts": 0, "num_experts_per_tok": 0},
    ),
    "llama, biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "phi, normed": ("phi", {"qk_layernorm": True}),
    "phi3, partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
}  # fmt: skip
"""Settings under which an architecture runs other code: name -> (model type, settings)."""


@dataclass(frozen=True)
class Outcome:
    """What the project makes of one architecture."""

    name: str
    """Of the architecture (its `model_type`) or variant."""
    status: str
    """`exact`, `refused`, `wrong` or `not made`."""
    reason: str
    """The whole message."""
    why: str
    """Its middle: the cause."""
    error: float
    """Largest relative error of a token, where it was accepted."""
    seconds: float


def tiny_config(name: str) -> Any:
    """The configuration of an architecture or variant, with small sizes, those of its parts too."""
    model_type, own = VARIANTS.get(name, (name, _OWN.get(name, {})))
    try:
        known = AutoConfig.for_model(model_type)
    except StrictDataclassClassValidationError:  # its own defaults do not fit together
        known = AutoConfig.for_model(model_type, **own)
    values = _small_values(known)
    return AutoConfig.for_model(model_type, **_merged(values, own))


def _some_config(name: str) -> Any:
    """The tiny configuration, or where its settings do not fit together the one of full size.

    It is enough for those that are refused by their type, or by their structure.
    """
    try:
        return tiny_config(name)
    except Exception:  # each configuration says in its own way that its settings clash
        model_type, _ = VARIANTS.get(name, (name, {}))
        return AutoConfig.for_model(model_type)


def _merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The values with others, also inside the configurations of parts."""
    merged = dict(values)
    for key, value in own.items():
        inner = values.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merged(inner, value) if both else value
    return merged


def _small_values(known: Any) -> dict[str, Any]:
    names = set(vars(known)) | set(getattr(type(known), "attribute_map", {}))
    values: dict[str, Any] = {}
    for name in names:
        try:
            default = getattr(known, name, None)
        except Exception:  # settings that have no one value (one for each block)
            default = None
        if isinstance(default, PreTrainedConfig):
            values[name] = _small_values(default)
        elif name in _SMALL and not isinstance(default, list | tuple | dict | str):
            values[name] = _SMALL[name]
    if "kv_lora_rank" in names:  # latent attention has keys for every head
        values["num_key_value_heads"] = _SMALL["num_attention_heads"]
    return values


def outcome(name: str, tokenizer_folder: Path) -> Outcome:
    """Make a tiny model and try it."""
    started = time.perf_counter()

    def done(status: str, said: str | BadInputError = "", error: float = 0.0) -> Outcome:
        why = said.why or said.what if isinstance(said, BadInputError) else said
        return Outcome(name, status, str(said), why, error, time.perf_counter() - started)

    model_type, _ = VARIANTS.get(name, (name, {}))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = torch.randint(5, 400, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    try:
        with quiet_transformers():
            config = _some_config(name)
            text_part(config)  # what loading refuses before a weight is read
            make = getattr(transformers, CLASSES[model_type])
            with torch.device("meta"):  # what its structure alone rules out needs no weights
                shape = make(config)
                if not has_text_part(model_type):
                    FrozenLM(shape, tokenizer, tokenizer_folder)
            size = sum(parameter.numel() for parameter in shape.parameters())
            if size > _MOST_PARAMETERS:
                return done("not made", f"{size:,} parameters with all small settings")
            torch.manual_seed(0)
            model = make(config).eval()
            for place, parameter in model.named_parameters():
                if place.endswith("bias") or "norm" in place:
                    torch.nn.init.normal_(parameter, 0.5, 0.3)
            with torch.no_grad():
                own = model(input_ids=ids, use_cache=False).logits.float()
    except BadInputError as error:
        return done("refused", error)
    except Exception as error:  # the small settings do not fit together
        return done("not made", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    try:
        if has_text_part(model_type):
            model = _text_part(model, tokenizer)
        lm = FrozenLM(model, tokenizer, tokenizer_folder)
        prove(lm)
    except BadInputError as error:
        return done("refused", error)
    with torch.no_grad():
        error = _error(lm.model(input_ids=ids, use_cache=False).logits.float(), own)
    error = max(error, largest_error(lm))
    return done("exact" if error < 1e-3 else "wrong", error=error)


def _text_part(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """What is read of a model of several parts that was saved."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return read_model(Path(folder), None)[0]


@torch.no_grad()
def largest_error(lm: FrozenLM) -> float:
    """Largest relative error of a token, over every layer, with padding and with caches.

    Shares no code with `proof`, and reads beyond the windows.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, lm.vocab_size, (2, LENGTH), generator=generator)
    residuals: list[Tensor] = []
    with_hooks = [
        lm.base.get_submodule(lm._blocks_name)[n].register_forward_pre_hook(
            lambda _, args, kwargs: residuals.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for n in range(lm.num_layers)
    ]
    logits = lm.model(input_ids=ids, use_cache=False).logits.float()
    for handle in with_hooks:
        handle.remove()
    final = lm.base(input_ids=ids, use_cache=False).last_hidden_state
    errors = [_error(lm.unembed(final), logits)]
    pad = 5
    padded = torch.cat([torch.zeros(2, pad, dtype=torch.long), ids], 1)
    mask = (torch.arange(pad + LENGTH) >= pad).long().expand(2, -1)
    assert any(map(lm.has_caches, range(1, lm.num_layers + 1)))
    for layer in range(lm.num_layers + 1):
        resid = lm.trunk(ids, layer).resid
        if layer < lm.num_layers:
            errors.append(_error(resid, residuals[layer]))
        errors.append(_error(lm.unembed(lm.tail(resid, layer)), logits))
        left = lm.trunk(padded, layer, attention_mask=mask).resid
        errors.append(_error(left[:, pad:], resid))
        errors.append(_error(lm.tail(left, layer, attention_mask=mask)[:, pad:], final))
        if layer == 0 or not lm.has_caches(layer):
            continue
        for cache in (None, DynamicCache()):
            parts = []
            for start, end in ((0, pad + 9), (pad + 9, pad + 10), (pad + 10, pad + LENGTH)):
                part, cache = lm.trunk(
                    padded[:, start:end], layer, attention_mask=mask[:, :end],
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip
                parts.append(part)
            errors.append(_error(torch.cat(parts, 1)[:, pad:], resid))
        tail_cache = lm.tail_cache(layer)
        parts = [
            lm.tail(resid[:, start:end], layer, past_key_values=tail_cache)
            for start, end in ((0, 9), (9, 10), (10, LENGTH))
        ]
        errors.append(_error(torch.cat(parts, 1), final))
    return max(errors)


def _error(found: Tensor, own: Tensor) -> float:
    return float(((found - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-30)).max())
