"""Training pairs of Method B: features of a prediction, and what removing them really does.

The effects are exact ablations in the frozen model, made text by text; `pair_shards` has them
made by workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from pydantic import RootModel
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.executors.jobs import whole_ends
from rldecoder.explain.frozen_effects import TextReader, find_candidates, measure
from rldecoder.explain.patching import Candidates, Measured, random_removals
from rldecoder.explain.positions import Positions
from rldecoder.json_records import Columns
from rldecoder.schemas import JsonFile
from rldecoder.seeds import torch_generator

RATIONALE_LENGTH = 5
PER_CANDIDATE = ("acts", "indices", "contributions", "attributions")

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
        ("contributions", pa.list_(pa.float32())),
        ("attributions", pa.list_(pa.float32())),
        ("sensitivity", pa.list_(pa.float32())),
        ("effects", pa.list_(pa.float32())),
        ("rationale", pa.list_(pa.int32())),
        ("removals", pa.list_(pa.list_(pa.float32()))),
        ("joint", pa.list_(pa.float32())),
        ("margins", pa.list_(pa.float32())),
    ]
)
"""One row a pair. `output_token` and `logprob` are the frozen model's; `effects` (nats) are exact
single removals in it, positive supports the output token; `rationale` names the latents with the
largest |effect|, strongest first. `removals` are joint interventions, removed shares of `latents`,
`joint` their exact effects and `margins` what is left of the token's lead. seq_id and pos are -1
for task prompts. Numbers of `Candidates` and `Measured` (rldecoder/explain/patching.py)."""


class Pairs(NamedTuple):
    """Positions with their candidates and exact effects."""

    positions: Positions
    candidates: Candidates
    measured: Measured
    removals: Tensor
    """[N, M, C]: the joint interventions of `measured.joint`."""


class HeldOutFeatures(JsonFile, RootModel[tuple[int, ...]]):
    """The latents that no training pair shows, in ascending order."""


def held_out_latents(
    num_latents: int, share: float, generator: torch.Generator
) -> Bool[Tensor, " latents"]:
    """[L] bool: a random `share` of the dictionary, whose effects no training pair may show."""
    held_out = torch.zeros(num_latents, dtype=torch.bool)
    held_out[torch.randperm(num_latents, generator=generator)[: round(share * num_latents)]] = True
    return held_out


class PairSettings(NamedTuple):
    """How pairs are made."""

    candidates: int
    """C: places with fewer active features are padded."""
    interventions: int
    """M, random joint removals a position."""
    probes: int
    """Random directions for the curvature of the noise floor; 0: first order alone."""
    seed: int
    """Of the removals."""


class PairParts(NamedTuple):
    """`Pairs` without their positions."""

    candidates: Candidates
    measured: Measured
    removals: Tensor


def make_pairs(
    decoder: SaeDecoderForCausalLM,
    positions: Positions,
    settings: PairSettings,
    *,
    excluded: Bool[Tensor, " latents"] | None = None,
    number: int = 0,
) -> Pairs:
    """Find the candidates of each position and measure what removing them does.

    Each text is read once for its candidates and their effects.

    Args:
        excluded: latents that must be in no pair (`held_out_latents`).
        number: of the shard; each one's removals are drawn by themselves.
    """
    generator = torch_generator(settings.seed, "removals", str(number))
    reader, parts = TextReader(decoder.frozen), []
    for rows in pairwise((0, *ends_of_texts(positions, 1))):
        places = positions.of(slice(*rows)).frozen_places
        candidates = find_candidates(
            decoder, places, settings.candidates, excluded, settings.probes, reader
        )
        # As many columns everywhere: a shard does not depend on how many are active in it.
        missing = settings.candidates - candidates.acts.shape[1]
        wide = {name: F.pad(getattr(candidates, name), (0, missing)) for name in PER_CANDIDATE}
        candidates = candidates._replace(**wide)

        removals = random_removals(candidates.acts, settings.interventions, generator)
        measured = measure(decoder.frozen, places, candidates, removals, reader)
        single = measured.single * (candidates.acts > 0)
        parts.append(PairParts(candidates, measured._replace(single=single), removals))
    return join_pairs(positions, parts)


def join_pairs(positions: Positions, parts: Iterable[PairParts]) -> Pairs:
    """The pairs of all positions, from those of runs of them; on the positions' device."""
    device = positions.latents.acts.device
    found, effects, removed = zip(*parts, strict=True)
    return Pairs(
        positions,
        Candidates(*(torch.cat(column).to(device) for column in zip(*found, strict=True))),
        Measured(*(torch.cat(column).to(device) for column in zip(*effects, strict=True))),
        torch.cat(removed).to(device),
    )


def ends_of_texts(positions: Positions, size: int) -> tuple[int, ...]:
    """The ends of runs of at least `size` positions, but for the last, that cut no text in two."""
    assert positions.texts is not None
    return whole_ends(positions.texts.text.tolist(), size)


def pair_columns(pairs: Pairs) -> Columns:
    """The columns of PAIRS; padding is left out."""
    candidates, measured = pairs.candidates, pairs.measured
    keep = (candidates.acts > 0).cpu().numpy()

    def ragged(values: Tensor) -> list[Any]:
        rows = values.cpu().numpy()
        return [row[..., mask] for row, mask in zip(rows, keep, strict=True)]

    latents, effects = ragged(candidates.indices), ragged(measured.single)
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
        "acts": ragged(candidates.acts),
        "contributions": ragged(candidates.contributions),
        "attributions": ragged(candidates.attributions),
        "sensitivity": list(candidates.sensitivity.cpu().numpy()),
        "effects": effects,
        "rationale": rationale,
        "removals": [list(row) for row in ragged(pairs.removals)],
        "joint": list(measured.joint.cpu().numpy()),
        "margins": list(measured.margins.cpu().numpy()),
    }
