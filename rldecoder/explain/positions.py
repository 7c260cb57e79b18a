"""Where predictions are explained: in cached text, and at the end of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import Past, Places, join_pasts, past_of_prompts, past_of_rows
from rldecoder.explain.frozen_effects import FrozenPlaces
from rldecoder.explain.texts import Texts, join_texts, texts_of_rows
from rldecoder.lm.text_tokens import encode_prompts
from rldecoder.sae.selection import SparseLatents, join_latents

PROMPTS_PER_BATCH = 16


class Positions(NamedTuple):
    """Predictions to explain, N of them, text by text."""

    source: list[str]
    """`text`, or the task's name."""
    seq_id: Tensor
    """[N]; -1 for prompts."""
    pos: Tensor
    """[N]; -1 for prompts."""
    context_token: Tensor
    """[N]: the last token that the prediction reads."""
    latents: SparseLatents
    """acts and indices [N, K]."""
    past: Past | None = None
    """What came before, for a decoder that looks back."""
    texts: Texts | None = None
    """The same for the frozen model; None where nobody asks it."""

    @property
    def places(self) -> Places:
        """Where the decoder predicts."""
        return Places(self.latents, self.past)

    @property
    def frozen_places(self) -> FrozenPlaces:
        """Where the frozen model predicts."""
        assert self.texts is not None
        return FrozenPlaces(self.latents, self.texts)

    def of(self, chosen: slice) -> Positions:
        """Only some of them."""
        places = self.places.of(chosen)
        return Positions(
            self.source[chosen],
            self.seq_id[chosen],
            self.pos[chosen],
            self.context_token[chosen],
            places.latents,
            places.past,
            None if self.texts is None else self.texts.of(chosen),
        )


@torch.no_grad()
def positions_from_cache(
    reader: ActivationReader,
    decoder: SaeDecoderForCausalLM,
    count: int,
    seed: int,
    *,
    per_text: int = 1,
    tokens: NDArray[Any] | None = None,
) -> Positions:
    """`count` random positions of random sequences (all of a split that has fewer).

    Args:
        per_text: how many, on average, are in one sequence: what comes before them is run once.
        tokens: [S, T] of the split, for `Positions.texts`.
    """
    available = reader.sequence_batches(1)
    wanted = min(available, max(1, -(-count // per_text)))
    # A split's sequences may be shorter than usual, so that more are needed.
    longest = max(1, reader.num_tokens // max(available, 1))
    wanted = min(available, max(wanted, -(-count // longest)))
    rows = next(iter(reader.shuffled_sequences(wanted, seed=seed)))
    assert rows.resid is not None

    lot = torch.randperm(len(rows.pos), generator=torch.Generator().manual_seed(seed))
    # In reading order: all positions of a text stand together.
    order = torch.argsort(rows.seq_id * (int(rows.pos.max()) + 1) + rows.pos)
    here = order[torch.isin(order, lot[:count])]
    batch = rows.select(here)
    assert batch.resid is not None
    device = decoder.W.device
    lm, sae = decoder.frozen.lm, decoder.frozen.sae
    past = None
    if decoder.looks_back:
        everything = sae.encode(rows.resid.to(device).float())
        past = past_of_rows(
            everything, rows.seq_id.to(device), rows.pos.to(device),
            batch.seq_id.to(device), batch.pos.to(device),
        )  # fmt: skip
    texts = None
    if tokens is not None:
        layer = sae.spec.hook_layer
        texts = texts_of_rows(lm, layer, rows, tokens, batch.seq_id, batch.pos)
    return Positions(
        ["text"] * len(batch.pos), batch.seq_id, batch.pos, batch.token_id,
        sae.encode(batch.resid.to(device).float()), past, texts,
    )  # fmt: skip


@torch.no_grad()
def positions_from_prompts(
    decoder: SaeDecoderForCausalLM, prompts: Sequence[str], source: str
) -> Positions:
    """The last position of each prompt."""
    lm = decoder.frozen.lm
    parts, last_tokens, pasts, texts = [], [], [], []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        rows = encode_prompts(
            lm.tokenizer, prompts[start : start + PROMPTS_PER_BATCH], lm.context_length
        )

        # Padded on the left: the last column is each prompt's last token.
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), lm.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        mask = mask.to(lm.device)

        found = decoder.features(ids.to(lm.device), mask)
        parts.append(SparseLatents(found.latents.acts[:, -1], found.latents.indices[:, -1]))
        last_tokens.append(ids[:, -1])
        if decoder.looks_back:
            pasts.append(past_of_prompts(found.latents, mask))
        lengths = torch.tensor([len(row) for row in rows], device=lm.device)
        texts.append(
            Texts(
                tuple(resid[longest - len(row) :].float() for resid, row in
                      zip(found.resid, rows, strict=True)),
                torch.arange(len(rows), device=lm.device),
                lengths - 1,
            )
        )  # fmt: skip

    nowhere = torch.full((len(prompts),), -1)
    return Positions(
        [source] * len(prompts), nowhere, nowhere, torch.cat(last_tokens), join_latents(parts),
        join_pasts(pasts) if pasts else None, join_texts(texts),
    )  # fmt: skip


def join_positions(parts: Sequence[Positions]) -> Positions:
    """Concatenate along N."""
    pasts = [part.past for part in parts if part.past is not None]
    texts = [part.texts for part in parts if part.texts is not None]
    return Positions(
        [name for part in parts for name in part.source],
        torch.cat([part.seq_id for part in parts]),
        torch.cat([part.pos for part in parts]),
        torch.cat([part.context_token for part in parts]),
        join_latents([part.latents for part in parts]),
        join_pasts(pasts) if len(pasts) == len(parts) else None,
        join_texts(texts) if len(texts) == len(parts) else None,
    )
