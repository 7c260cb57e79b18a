"""What is known of any latent without a label: on which tokens it fires most, what it raises.

Read off in the pass over the `label` split, for the whole dictionary: a prompt may wake any
latent, and a number alone says nothing to people.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rldecoder.data.activations import ActivationBatch
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row
from rldecoder.sae.model import SparseLatents

DESCRIPTIONS = pa.schema(
    [("latent", pa.int32()), ("fires_on", pa.list_(pa.string())), ("raises", pa.list_(pa.string()))]
)
"""One row a latent that fires on the `label` split. `fires_on`: texts, raw, of the tokens of its
strongest activations, each once. `raises`: tokens whose logit the decoder's row raises most; not
tested by ablation."""
KEPT = 6
"""Tokens of a latent that are kept."""
ROWS_PER_PRODUCT = 256


class StrongestTokens:
    """The tokens of each latent's strongest activations, in bounded memory."""

    def __init__(self, num_latents: int) -> None:
        self.num_latents = num_latents
        self._latent = np.zeros(0, np.int64)
        self._token = np.zeros(0, np.int64)
        self._act = np.zeros(0, np.float32)

    def add(self, batch: ActivationBatch, latents: SparseLatents) -> None:
        """Take a batch of rows and what the SAE makes of them, [N, K]."""
        acts, indices = latents.acts.float().cpu().numpy(), latents.indices.cpu().numpy()
        tokens = np.broadcast_to(batch.token_id.numpy()[:, None], acts.shape)
        least = np.zeros(self.num_latents, np.float32)
        full = np.bincount(self._latent, minlength=self.num_latents) >= KEPT
        np.minimum.at(low := np.full(self.num_latents, np.inf, np.float32), self._latent, self._act)
        least[full] = low[full]
        keep = acts > least[indices]
        latent = np.concatenate([self._latent, indices[keep]])
        token = np.concatenate([self._token, tokens[keep]])
        act = np.concatenate([self._act, acts[keep]])

        # Each token once, by its strongest activation; then the strongest tokens.
        order = np.lexsort((-act, token, latent))
        latent, token, act = latent[order], token[order], act[order]
        first = np.ones(latent.size, bool)
        first[1:] = (np.diff(latent) != 0) | (np.diff(token) != 0)
        latent, token, act = latent[first], token[first], act[first]
        order = np.lexsort((token, -act, latent))
        latent, token, act = latent[order], token[order], act[order]
        rank = np.arange(latent.size) - np.searchsorted(latent, latent)
        keep = rank < KEPT
        self._latent, self._token, self._act = latent[keep], token[keep], act[keep]

    def tokens(self) -> dict[int, list[int]]:
        """Token ids by latent, the strongest activation first."""
        found: dict[int, list[int]] = {}
        for latent, token in zip(self._latent.tolist(), self._token.tolist(), strict=True):
            found.setdefault(latent, []).append(token)
        return found


@torch.no_grad()
def description_rows(
    strongest: StrongestTokens, decoder: SaeDecoderForCausalLM, vocabulary: Vocabulary
) -> list[Row]:
    """Rows of DESCRIPTIONS."""
    found = strongest.tokens()
    latents = sorted(found)
    raised = _raised(decoder, np.array(latents, np.int64), vocabulary)
    return [
        {
            "latent": latent,
            "fires_on": [vocabulary.texts[token] for token in found[latent]],
            "raises": [vocabulary.texts[token] for token in tokens],
        }
        for latent, tokens in zip(latents, raised, strict=True)
    ]


def _raised(
    decoder: SaeDecoderForCausalLM, latents: NDArray[np.int64], vocabulary: Vocabulary
) -> list[list[int]]:
    unembedding = decoder.frozen.lm.unembedding.float()
    unnamed = torch.tensor([not text for text in vocabulary.texts], device=unembedding.device)
    count = min(KEPT, int((~unnamed).sum()))
    out: list[list[int]] = []
    for start in range(0, latents.size, ROWS_PER_PRODUCT):
        rows = decoder.direct(torch.from_numpy(latents[start : start + ROWS_PER_PRODUCT]))
        logits = (rows.float() @ unembedding.T).masked_fill_(unnamed, -torch.inf)
        out += logits.topk(count).indices.tolist()
    return out
