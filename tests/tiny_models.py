"""Tiny random models of every architecture that the project supports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PhiConfig,
)

from rldecoder.data.activations import ActivationMeta
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.specs import ModelRecord
from rldecoder.sae.model import Sae

VOCAB_SIZE = 512
WIDTH = 32


def _configs(depth: int) -> dict[str, Any]:
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    gated = {"intermediate_size": 48, "num_key_value_heads": 2}
    return {
        "gpt2": GPT2Config(**common),
        "llama": LlamaConfig(**common, **gated),
        "gpt_neox": GPTNeoXConfig(**common, intermediate_size=48, tie_word_embeddings=False),
        "gemma": GemmaConfig(**common, **gated, head_dim=8),
        # Sliding and full attention in turns, and capped logits.
        "gemma2": Gemma2Config(**common, **gated, head_dim=8, sliding_window=4),
        # Phi's unembedding has a bias.
        "phi": PhiConfig(**common, intermediate_size=48),
    }


ARCHITECTURES = sorted(_configs(1))


def tiny_frozen(architecture: str, tokenizer_folder: Path, depth: int = 3) -> FrozenLM:
    """A random model with `depth` blocks of width 32; norms and biases are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_configs(depth)[architecture])
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return FrozenLM(model, AutoTokenizer.from_pretrained(tokenizer_folder), tokenizer_folder)


BOS = 511
"""The token that `with_tokens_around` makes the beginning of a text."""


def with_tokens_around(folder: Path, target: Path, *, bos: bool = False, eos: bool = False) -> Path:
    """A copy of a model whose tokenizer puts tokens before or behind every text."""
    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    start, end = tokenizer.convert_ids_to_tokens(BOS), tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([start] * bos + ["$A"] + [end] * eos),
        pair="$A $B",
        special_tokens=[(start, BOS), (end, tokenizer.eos_token_id)],
    )
    tokenizer.save_pretrained(target)
    return target


@torch.no_grad()
def whole_decoder(lm: FrozenLM, sae: Sae, bos: int) -> SaeDecoderForCausalLM:
    """All blocks above the hook layer, no map between: the frozen model with the SAE spliced in."""
    above = list(range(sae.spec.hook_layer, lm.num_layers))
    decoder = new_decoder(lm, sae, above)
    decoder.blocks.copy_from(lm.base)
    seen, _ = lm.residuals(torch.tensor([[bos, 1]]))
    for sink, number in zip(decoder.blocks.sinks, above, strict=True):
        sink.copy_(seen[number][0, 0])
    decoder.W.copy_(sae.W_dec)
    decoder.b.copy_(sae.b_dec)
    return decoder


TINY_RECORD = ModelRecord(
    name="tiny",
    title="tiny",
    licence="none: random weights",
    hook_layer=None,
    compute_dtype="float32",
    source={"kind": "random"},
    weights_sha256="0" * 64,
    weight_files={},
    model_type="gpt2",
    parameters=265_600,
    num_layers=4,
    d_model=64,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    d_mlp=256,
    vocab_size=512,
    context_length=512,
    tied_embeddings=True,
)
"""What `sync_tokenizer` would say of the fixture `tiny_lm_dir`."""


def cache_meta(lm: FrozenLM, hook_layer: int, context_length: int) -> ActivationMeta:
    """What the activation cache of a tiny model says of itself."""
    return ActivationMeta(
        model_name="tiny", hook_layer=hook_layer, num_layers=lm.num_layers, d_model=lm.d_model,
        vocab_size=lm.vocab_size, context_length=context_length,
    )  # fmt: skip
