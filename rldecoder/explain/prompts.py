"""A prompt as tokens, and tokens as text."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM


def encode_prompt(lm: FrozenLM, prompt: str) -> Int[Tensor, " length"]:
    """Token ids [T] as in `tokenize_prompt`, no more than the model can read.

    Raises:
        BadInputError: the prompt is empty or longer than the model's context.
    """
    ids = tokenize_prompt(lm, prompt)
    longest = lm.context_length
    if len(ids) > longest:
        raise BadInputError(
            f"The prompt has {len(ids):,} tokens.",
            f"The model reads at most {longest:,}.",
            "Shorten the prompt.",
        )
    return ids


def tokenize_prompt(lm: FrozenLM, prompt: str) -> Int[Tensor, " length"]:
    """Token ids [T], T >= 2: the first position is an attention sink that no SAE was trained on.

    Raises:
        BadInputError: the prompt is empty.
    """
    ids = lm.encode_prompt(prompt)
    if ids == lm.encode_prompt(""):
        raise BadInputError(
            "The prompt is empty.", "There is no token to predict from.", "Write some text."
        )
    if len(ids) < 2:
        ids = [lm.eos_token_id, *ids]
    return torch.tensor(ids, device=lm.device)


def token_text(lm: FrozenLM, token: int) -> str:
    """What a token says, raw: escape it before showing."""
    return str(lm.tokenizer.decode([token]))
