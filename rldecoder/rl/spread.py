"""How many latents carry a prediction, on held-out text and in responses to held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.sequences import slopes_of_choices, whole_sequences
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.rl import core
from rldecoder.rl.rollout import DecoderSampler
from rldecoder.rl.states import predict
from rldecoder.sae.selection import SparseLatents
from rldecoder.seeds import torch_generator

Key = TypeVar("Key")

_RESPONSES = 64
"""Prompts that are sampled at a time: memory does not grow with the test set."""


class Spread(NamedTuple):
    """Means over the tokens of each of n sequences (or responses)."""

    entropy: NDArray[np.float64]
    """[n] contribution entropy, 0 (one latent does all) to 1 (all active ones share alike)."""
    effective: NDArray[np.float64]
    """[n] effective number of latents."""


def sequence_spread(
    decoders: Mapping[Key, SaeDecoderForCausalLM], reader: ActivationReader, num_tokens: int
) -> dict[Key, Spread]:
    """Spread of the contributions to each decoder's own first choice, on the same rows for all."""
    spreads: dict[Key, list[Tensor]] = {key: [] for key in decoders}
    sequences = []
    for batch in whole_sequences(reader, 1024, columns=("resid",), max_tokens=num_tokens):
        for key, decoder in decoders.items():
            used = contributions_on_text(decoder, batch)
            spread = [core.contribution_entropy(used), core.effective_latents(used)]
            spreads[key].append(torch.stack(spread).cpu())
        sequences.append(batch.seq_id)
    seq_id = torch.cat(sequences)
    return {
        key: Spread(*(sequence_means(values, seq_id) for values in torch.cat(parts, dim=1)))
        for key, parts in spreads.items()
    }


def sequence_means(
    values: Float[Tensor, " tokens"], seq_id: Int[Tensor, " tokens"]
) -> Float[np.ndarray, " sequences"]:
    """Mean of the values [N] of each sequence, in the order of the ids."""
    _, row, counts = np.unique(seq_id.numpy(), return_inverse=True, return_counts=True)
    return np.bincount(row, weights=values.double().numpy()) / counts


@torch.no_grad()
def response_spread(
    decoder: SaeDecoderForCausalLM, prompts: Sequence[TaskPrompt], *, temperature: float, seed: int
) -> Spread:
    """Spread of the contributions to the tokens that a decoder samples itself, a prompt each.

    As in the rewards: the same states, the sampled tokens, slopes by `states.predict`.
    """
    sampler = DecoderSampler(decoder, temperature=temperature, frozen_states=False)
    generator = torch_generator(seed, "responses")
    entropy, effective = [], []
    for start in range(0, len(prompts), _RESPONSES):
        rollout = sampler(prompts[start : start + _RESPONSES], generator)
        keep = rollout.mask.bool()
        rows = torch.arange(len(keep), device=keep.device)
        slopes = predict(decoder, rollout, rows, slopes=True).slopes
        assert slopes is not None
        latents = SparseLatents(rollout.latents.acts[keep], rollout.latents.indices[keep])
        used = decoder.along(latents, slopes)
        row = keep.nonzero()[:, 0].cpu()
        entropy.append(sequence_means(core.contribution_entropy(used).cpu(), row))
        effective.append(sequence_means(core.effective_latents(used).cpu(), row))
    return Spread(np.concatenate(entropy), np.concatenate(effective))


@torch.no_grad()
def contributions_on_text(
    decoder: SaeDecoderForCausalLM, batch: ActivationBatch
) -> Float[Tensor, "tokens active"]:
    """What each active latent adds to the decoder's first choices, [N, K], for rows of whole
    sequences (`slopes_of_choices`)."""
    assert batch.resid is not None
    latents = decoder.frozen.sae.encode(batch.resid.to(decoder.device).float())
    return decoder.along(latents, slopes_of_choices(decoder, latents, batch.seq_id, batch.pos))
