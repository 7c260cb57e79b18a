"""A tiny random language model in a real Hugging Face folder, for tests and the debug run."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rldecoder.errors import BadInputError
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.seeds import derive_seed

Architecture = Literal["gpt2", "llama"]

END_OF_TEXT = "<|endoftext|>"
_SMALLEST_VOCABULARY = 257  # 256 bytes and END_OF_TEXT
# The library's default of 0.02 makes a small model's predictions almost uniform: every KL would
# be near zero and no test of a decoder could fail.
_INITIALIZER_RANGE = 0.15


def make_random_model(
    folder: Path,
    *,
    architecture: Architecture = "gpt2",
    n_layer: int = 4,
    d_model: int = 64,
    n_head: int = 4,
    vocab_size: int = 512,
    n_positions: int = 512,
    seed: int = 0,
) -> Path:
    """Write a random model with its own byte-level BPE tokenizer and return `folder`.

    The folder is what `save_pretrained` writes (config.json, model.safetensors in float32,
    tokenizer.json, ...), so everything that reads a downloaded model reads it too. The tokenizer
    is trained on the language reference inside the standard library. Same arguments, same bytes.

    Raises:
        BadInputError: the sizes do not make a model.
    """
    _check_sizes(n_layer, d_model, n_head, vocab_size, n_positions)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(vocab_size, n_positions)
    if len(tokenizer) != vocab_size:
        raise BadInputError(
            f"A vocabulary of {vocab_size} tokens was asked for, but {len(tokenizer)} were learnt.",
            "The standard library's documentation has no more pairs to merge.",
            "Lower `vocab_size`.",
        )
    config = random_config(architecture, n_layer, d_model, n_head, vocab_size, n_positions)
    model = _build_model(config, derive_seed(seed, "random_model", architecture))
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _check_sizes(
    n_layer: int, d_model: int, n_head: int, vocab_size: int, n_positions: int
) -> None:
    if min(n_layer, d_model, n_head, n_positions) < 1:
        raise BadInputError(
            f"Sizes must be positive: n_layer={n_layer}, d_model={d_model}, n_head={n_head}, "
            f"n_positions={n_positions}."
        )
    if d_model % (2 * n_head):
        raise BadInputError(
            f"d_model={d_model} does not divide into {n_head} heads of an even width.",
            "Rotary positions turn pairs of dimensions.",
            "Choose d_model as a multiple of 2 * n_head.",
        )
    if vocab_size < _SMALLEST_VOCABULARY:
        raise BadInputError(
            f"vocab_size={vocab_size} is too small.",
            "A byte-level vocabulary holds 256 bytes and one special token.",
            f"Use at least {_SMALLEST_VOCABULARY}.",
        )


def _train_tokenizer(vocab_size: int, n_positions: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    topics = pydoc_data.topics.topics
    tokenizer.train_from_iterator((topics[name] for name in sorted(topics)), trainer)
    # One special token for all purposes, as in GPT-2: code that mistakes padding for the end of
    # a text (or the reverse) must meet its bug here and not on the real model.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=n_positions,
        clean_up_tokenization_spaces=False,
    )


def random_config(
    architecture: Architecture,
    n_layer: int,
    d_model: int,
    n_head: int,
    vocab_size: int,
    n_positions: int,
) -> PreTrainedConfig:
    """The configuration of such a model; nothing is built."""
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": d_model,
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "max_position_embeddings": n_positions,
        "initializer_range": _INITIALIZER_RANGE,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if architecture == "gpt2":
        return GPT2Config(**common)
    return LlamaConfig(
        intermediate_size=3 * d_model,
        num_key_value_heads=1 if n_head % 2 else n_head // 2,
        tie_word_embeddings=True,
        **common,
    )


def _build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(config, GPT2Config):
            return GPT2LMHeadModel(config)
        assert isinstance(config, LlamaConfig)
        return LlamaForCausalLM(config)
