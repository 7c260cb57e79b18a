"""Training pairs of Method B: features of a prediction, and what removing them really does.

The effects are exact ablations in the frozen model. They are made text by text and kept as
Parquet shards in the meantime, so that an interrupted run takes them up where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from pydantic import RootModel
from torch import Tensor

from rldecoder import interrupts, sealed
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.frozen_effects import TextReader, find_candidates, measure
from rldecoder.explain.patching import Candidates, Measured, random_removals
from rldecoder.explain.positions import Positions
from rldecoder.json_records import Columns
from rldecoder.reporting import Bar, SilentBar
from rldecoder.schemas import JsonFile, read_parquet, write_parquet
from rldecoder.seeds import torch_generator

RATIONALE_LENGTH = 5
PLACES_PER_SHARD = 256
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


class PairShards:
    """Pairs of earlier, interrupted runs, each shard sealed with its owner."""

    def __init__(self, folder: Path, owner: str, note: sealed.Note) -> None:
        self.folder, self.owner, self.note = folder, owner, note

    def path(self, number: int) -> Path:
        """Where a shard is."""
        return self.folder / f"pairs-{number:05d}.parquet"

    def load(self, number: int) -> pa.Table | None:
        """A shard that can be trusted; None where there is none."""
        path = self.path(number)
        if not path.exists() or not sealed.is_intact(path, owner=self.owner, note=self.note):
            return None
        return read_parquet(path, PAIRS.names)

    def save(self, number: int, columns: Columns) -> None:
        """Keep a shard; a kill in between leaves it out."""
        interrupts.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_parquet(self.path(number), columns, PAIRS)
        sealed.seal_file(self.path(number), owner=self.owner)


def make_pairs(
    decoder: SaeDecoderForCausalLM,
    positions: Positions,
    settings: PairSettings,
    *,
    excluded: Tensor | None = None,
    shards: PairShards | None = None,
    bar: Bar | None = None,
) -> Pairs:
    """Find the candidates of each position and measure what removing them does.

    Args:
        excluded: [L] bool, latents that must be in no pair (`held_out_latents`).
        shards: what an interrupted run left is read from here, and what is new is kept here.
    """
    bar = SilentBar() if bar is None else bar
    parts = []
    for number, rows in enumerate(_whole_texts(positions, PLACES_PER_SHARD)):
        here = positions.of(rows)
        kept = None if shards is None else shards.load(number)
        if kept is None:
            made = _measured(
                decoder, here, settings, excluded,
                torch_generator(settings.seed, "removals", str(number)),
            )  # fmt: skip
            if shards is not None:
                shards.save(number, pair_columns(made))
        else:
            made = pairs_of_table(here, kept, settings)
        parts.append(made)
        bar.advance(len(here.source))
    return _joined(positions, [part[1:] for part in parts])


def _joined(positions: Positions, parts: Sequence[tuple[Candidates, Measured, Tensor]]) -> Pairs:
    """All parts' candidates, effects and removals, one after the other."""
    found, effects, removed = zip(*parts, strict=True)
    return Pairs(
        positions,
        Candidates(*map(torch.cat, zip(*found, strict=True))),
        Measured(*map(torch.cat, zip(*effects, strict=True))),
        torch.cat(removed),
    )


def _measured(
    decoder: SaeDecoderForCausalLM,
    positions: Positions,
    settings: PairSettings,
    excluded: Tensor | None,
    generator: torch.Generator,
) -> Pairs:
    """Pairs of whole texts; each text is read once for its candidates and their effects."""
    reader, parts = TextReader(decoder.frozen), []
    for rows in _whole_texts(positions, 1):
        places = positions.of(rows).frozen_places
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
        parts.append((candidates, measured._replace(single=single), removals))
    return _joined(positions, parts)


def _whole_texts(positions: Positions, size: int) -> Iterator[slice]:
    """Slices of at least `size` positions, but for the last, that cut no text in two."""
    assert positions.texts is not None
    text = positions.texts.text.tolist()
    start = 0
    for end in range(1, len(text) + 1):
        if end == len(text) or (end - start >= size and text[end] != text[end - 1]):
            yield slice(start, end)
            start = end


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


def pairs_of_table(positions: Positions, table: pa.Table, settings: PairSettings) -> Pairs:
    """What `pair_columns` was given, from a table of PAIRS about the same positions."""
    device = positions.latents.acts.device
    size, width = len(positions.source), settings.candidates

    def padded(name: str, dtype: torch.dtype) -> Tensor:
        rows = torch.zeros(size, width, dtype=dtype)
        for row, values in zip(rows, table[name].to_pylist(), strict=True):
            row[: len(values)] = torch.tensor(values, dtype=dtype)
        return rows.to(device)

    def whole(name: str) -> Tensor:
        return torch.tensor(table[name].to_pylist(), dtype=torch.float32, device=device)

    removals = torch.zeros(size, settings.interventions, width)
    for row, values in zip(removals, table["removals"].to_pylist(), strict=True):
        row[:, : len(values[0])] = torch.tensor(values)
    candidates = Candidates(
        torch.tensor(table["output_token"].to_pylist(), device=device),
        whole("logprob"),
        padded("acts", torch.float32),
        padded("latents", torch.int64),
        padded("contributions", torch.float32),
        padded("attributions", torch.float32),
        whole("sensitivity"),
    )
    single = padded("effects", torch.float32)
    measured = Measured(single, whole("joint"), whole("margins"))
    return Pairs(positions, candidates, measured, removals.to(device))
