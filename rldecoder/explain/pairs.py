"""Training pairs of Method B: (features of a prediction, what removing them really does)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from pydantic import RootModel
from torch import Tensor

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.places import (
    Past,
    Places,
    join_pasts,
    past_of_prompts,
    past_of_rows,
)
from rldecoder.explain.patching import (
    Candidates,
    Measured,
    find_candidates,
    measure,
    random_removals,
)
from rldecoder.lm.text_tokens import encode_prompts
from rldecoder.sae.model import SparseLatents
from rldecoder.schemas import JsonFile

RATIONALE_LENGTH = 5
PROMPTS_PER_BATCH = 16
ROWS_PER_BATCH = 4096

PAIRS = pa.schema(
    [
        ("source", pa.string()),
        ("seq_id", pa.int32()),
        ("pos", pa.int32()),
        ("context_token", pa.int32()),
        ("output_token", pa.int32()),
        ("logprob", pa.float32()),
        ("latents", pa.list_(pa.int32())),
        ("acts", pa.list_(pa.float32())),
        ("effects", pa.list_(pa.float32())),
        ("rationale", pa.list_(pa.int32())),
    ]
)
"""One row a pair. `effects` (nats) are exact single removals, positive supports the output token;
`rationale` names the latents with the largest |effect|, strongest first. seq_id and pos are -1
for task prompts."""


class Positions(NamedTuple):
    """Predictions to explain, N of them."""

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

    @property
    def places(self) -> Places:
        """Where the predictions are made."""
        return Places(self.latents, self.past)


class Pairs(NamedTuple):
    """Positions with their candidates and exact effects."""

    positions: Positions
    candidates: Candidates
    measured: Measured
    removals: Tensor
    """[N, M, C]: the joint interventions of `measured.joint`."""


@torch.no_grad()
def positions_from_cache(
    reader: ActivationReader, decoder: SaeDecoderForCausalLM, count: int, seed: int
) -> Positions:
    """`count` positions of a split, in random order (all of it, when it has fewer)."""
    device = decoder.W.device
    batch = next(iter(reader.shuffled(min(count, reader.num_tokens), seed=seed)))
    assert batch.resid is not None
    latents = decoder.frozen.sae.encode(batch.resid.to(device).float())
    seq_id, pos = batch.seq_id.long(), batch.pos.long()
    past = None
    if decoder.looks_back:
        past = _past_in_cache(reader, decoder, seq_id.to(device), pos.to(device))
    return Positions(["text"] * len(batch.pos), seq_id, pos, batch.token_id.long(), latents, past)


def _past_in_cache(
    reader: ActivationReader, decoder: SaeDecoderForCausalLM, seq_id: Tensor, pos: Tensor
) -> Past:
    """All cached rows of the sequences that the positions [N] lie in, encoded."""
    wanted = seq_id.unique()
    parts, sequences, places = [], [], []
    for batch in reader.ordered(ROWS_PER_BATCH, columns=("resid",)):
        assert batch.resid is not None
        row = batch.seq_id.to(wanted)
        inside = torch.isin(row, wanted)
        if bool(inside.any()):
            resid = batch.resid.to(wanted.device)[inside].float()
            parts.append(decoder.frozen.sae.encode(resid))
            sequences.append(row[inside])
            places.append(batch.pos.to(wanted)[inside])
    return past_of_rows(join_latents(parts), torch.cat(sequences), torch.cat(places), seq_id, pos)


@torch.no_grad()
def positions_from_prompts(
    decoder: SaeDecoderForCausalLM, prompts: Sequence[str], source: str
) -> Positions:
    """The last position of each prompt."""
    lm = decoder.frozen.lm
    parts, last_tokens, pasts = [], [], []
    for start in range(0, len(prompts), PROMPTS_PER_BATCH):
        texts = prompts[start : start + PROMPTS_PER_BATCH]
        rows = encode_prompts(lm.tokenizer, texts, lm.context_length)

        # Padded on the left: the last column is each prompt's last token.
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), lm.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, longest - len(row) :] = torch.tensor(row)
            mask[i, longest - len(row) :] = 1
        mask = mask.to(lm.device)

        found = decoder.features(ids.to(lm.device), mask).latents
        parts.append(SparseLatents(found.acts[:, -1], found.indices[:, -1]))
        last_tokens.append(ids[:, -1])
        if decoder.looks_back:
            pasts.append(past_of_prompts(found, mask))

    nowhere = torch.full((len(prompts),), -1)
    return Positions(
        [source] * len(prompts),
        nowhere,
        nowhere,
        torch.cat(last_tokens),
        join_latents(parts),
        join_pasts(pasts) if pasts else None,
    )


def join_latents(parts: Sequence[SparseLatents]) -> SparseLatents:
    """Concatenate along N; a ReLU SAE's batches differ in K and are padded with act 0."""
    widest = max(part.acts.shape[-1] for part in parts)
    return SparseLatents(
        *(
            torch.cat([F.pad(column, (0, widest - column.shape[-1])) for column in columns])
            for columns in zip(*parts, strict=True)
        )
    )


def join_positions(parts: Sequence[Positions]) -> Positions:
    """Concatenate along N."""
    pasts = [part.past for part in parts if part.past is not None]
    return Positions(
        [name for part in parts for name in part.source],
        torch.cat([part.seq_id for part in parts]),
        torch.cat([part.pos for part in parts]),
        torch.cat([part.context_token for part in parts]),
        join_latents([part.latents for part in parts]),
        join_pasts(pasts) if len(pasts) == len(parts) else None,
    )


def make_pairs(
    decoder: SaeDecoderForCausalLM,
    positions: Positions,
    *,
    max_candidates: int,
    interventions: int,
    generator: torch.Generator,
    excluded: Bool[Tensor, " latents"] | None = None,
) -> Pairs:
    """Find the candidates of each position and measure what removing them does.

    Args:
        max_candidates: C, at most.
        interventions: M, random joint removals a position.
        excluded: [L] bool, latents that must be in no pair (`held_out_latents`).
    """
    candidates = find_candidates(decoder, positions.places, max_candidates, excluded)
    removals = random_removals(candidates.acts, interventions, generator)
    measured = measure(decoder, positions.places, candidates, removals)
    return Pairs(positions, candidates, measured, removals)


class HeldOutFeatures(JsonFile, RootModel[tuple[int, ...]]):
    """The latents that no training pair shows, in ascending order."""


def held_out_latents(
    num_latents: int, share: float, generator: torch.Generator
) -> Bool[Tensor, " latents"]:
    """[L] bool: a random `share` of the dictionary, whose effects no training pair may show."""
    held_out = torch.zeros(num_latents, dtype=torch.bool)
    held_out[torch.randperm(num_latents, generator=generator)[: round(share * num_latents)]] = True
    return held_out


def pair_columns(pairs: Pairs) -> dict[str, Sequence[Any]]:
    """The columns of PAIRS; padding is left out."""
    candidates, single = pairs.candidates, pairs.measured.single
    keep = (candidates.acts > 0).cpu().numpy()
    latents, acts, effects = (
        _ragged(column, keep) for column in (candidates.indices, candidates.acts, single)
    )
    rationale = [
        row[np.argsort(-np.abs(effect), kind="stable")[:RATIONALE_LENGTH]]
        for row, effect in zip(latents, effects, strict=True)
    ]
    positions = pairs.positions
    return {
        "source": positions.source,
        "seq_id": positions.seq_id.tolist(),
        "pos": positions.pos.tolist(),
        "context_token": positions.context_token.tolist(),
        "output_token": candidates.tokens.tolist(),
        "logprob": candidates.logprobs.tolist(),
        "latents": latents,
        "acts": acts,
        "effects": effects,
        "rationale": rationale,
    }


def _ragged(
    values: Tensor, keep: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return [row[mask] for row, mask in zip(values.cpu().numpy(), keep, strict=True)]
