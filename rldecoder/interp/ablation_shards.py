"""Ablations of many places, computed in shards by the workers of a cluster.

A shard is a run of whole sequences, so that its places are grouped as one pass would group them.
It keeps what each place says, and no sums: those are added up in the order of the places, whoever
ran them, and so round as in one pass.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from rldecoder import files
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.shards import read_token_table
from rldecoder.executors.jobs import Measured, Runs, TensorWorker, as_tensor, as_text, whole_ends
from rldecoder.executors.stage_shards import StageShards
from rldecoder.interp.ablation_pass import Ablated, Ablations, IntArray, Places, Texts
from rldecoder.interp.output_sets import Gains, SetGroup, Tried, Trier
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Advance, Note
from rldecoder.sae.model import Sae

PLACES = 512
"""Places a shard, at least; the last sequence's are all in it."""
_SLOW, _FOLDER = "slow", "ablation-shards"


class Asked(NamedTuple):
    """What is asked of some places."""

    places: Places
    groups: Sequence[SetGroup] | None
    """Sets that are tried there; None asks for gains, which sets are fitted to."""
    again: bool = False
    """Whether gains come with what it takes to try sets at these places later."""

    @property
    def others(self) -> bool:
        """Whether other latents are taken out too."""
        return self.again or self.groups is not None

    def meter(self, device: torch.device) -> Callable[[Ablated], Gains | Tried]:
        """What turns places that were run into the answer."""
        if self.groups is None:
            return Gains.of
        return Trier(self.groups, self.places.row, device).of

    def save(self, path: Path) -> None:
        """Write it for workers, whole or not at all."""
        arrays = {f"place.{name}": column for name, column in self.places._asdict().items()}
        arrays["again"] = np.array(self.again)
        for number, group in enumerate(self.groups or ()):
            sizes = [len(tokens) for tokens in group.tokens]
            flat = [token for tokens in group.tokens for token in tokens]
            arrays[f"tokens.{number}"] = np.array(flat, np.int64)
            arrays[f"sizes.{number}"] = np.array(sizes, np.int64)
            arrays[f"own.{number}"] = group.own
            if group.rivals is not None:
                arrays[f"rivals.{number}"] = group.rivals
        with files.aside(path) as draft:
            save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, draft)

    @classmethod
    def load(cls, path: Path) -> Asked:
        """Read what `save` wrote."""
        arrays = load_file(path)
        places = Places(*(arrays[f"place.{name}"] for name in Places._fields))  # type: ignore[arg-type]
        groups: list[SetGroup] = []
        while (number := len(groups)) < sum(name.startswith("own.") for name in arrays):
            ends = arrays[f"sizes.{number}"].cumsum()
            parts = np.split(arrays[f"tokens.{number}"], ends[:-1])
            groups.append(
                SetGroup(
                    [tuple(part.tolist()) for part in parts],
                    arrays[f"own.{number}"],
                    arrays.get(f"rivals.{number}"),
                )
            )
        return cls(places, groups or None, bool(arrays["again"]))


class AblationSettings(Runs):
    """Which model and SAE, over which text, and what is asked."""

    model: Path
    record: Path
    sae: Path
    """Its folder."""
    cache: Path
    """Folder of the cached activations."""
    tokens: Path
    """Folder of the token tables."""
    split: str
    asked: Path
    """File of an `Asked`."""


class Ran(NamedTuple):
    """What some places say."""

    answer: Gains | Tried
    slow_because: str | None
    """Why they had to be run as whole sequences, if they had to."""


class AblationWorker(TensorWorker[AblationSettings, Ran]):
    """The frozen model's upper blocks and an SAE."""

    settings_type = AblationSettings
    unit = "place"

    def __init__(self, settings: AblationSettings, device: torch.device, note: Note) -> None:
        super().__init__(settings, device, note)
        lm = FrozenLM.load(settings.model, device=device, record=settings.record)
        sae = Sae.load(settings.sae, device=device)
        table = read_token_table(settings.tokens, settings.split)
        reader = ActivationReader(settings.cache, settings.split)
        # No sequence comes a second time in a job.
        texts = Texts(lm, sae.spec.hook_layer, reader, table, held_bytes=0)
        self._ablations, self._asked = Ablations(texts, sae), Asked.load(settings.asked)
        self._meter = self._asked.meter(lm.device)
        self._places = 0

    def measured(self) -> Measured:
        """Places that were run."""
        return {"places": self._places}

    def compute(self, number: int, advance: Advance) -> Ran:
        """The answers of a shard's places."""
        first, end = self.settings.bounds(number)
        found = []
        for part in self._ablations.run(
            self._asked.places, others=self._asked.others, first=first, end=end
        ):
            found.append(self._meter(part))
            self._places += part.places.size
            advance(part.places.size)
        columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Ran(type(found[0])(*columns), self._ablations.texts.blocks.slow_because)

    @classmethod
    def pack(cls, result: Ran) -> Mapping[str, Tensor]:
        """Columns of the answers, named after their kind, and the reason in UTF-8."""
        kind = type(result.answer).__name__
        columns = {
            f"{kind}.{name}": torch.from_numpy(column)
            for name, column in result.answer._asdict().items()
        }
        return columns | {_SLOW: as_tensor(result.slow_because or "")}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Ran:
        """See `TensorWorker.unpack`."""
        kind = Gains if any(name.startswith("Gains.") for name in tensors) else Tried
        columns = (tensors[f"{kind.__name__}.{name}"].numpy() for name in kind._fields)
        return Ran(kind(*columns), as_text(tensors[_SLOW]) or None)


@dataclass(frozen=True)
class AblationCrew:
    """Has places run by the workers of an executor.

    Args:
        model: its folder; `record` is that of its record.
        reads: folders of artifacts that workers read.
    """

    shards: StageShards
    model: Path
    record: Path
    cache: Path
    tokens: Path
    reads: tuple[Path, ...]

    def run(self, name: str, split: str, sae: Sae, asked: Asked) -> Iterator[tuple[IntArray, Ran]]:
        """Numbers of some places, in order, and what they say.

        Args:
            name: of the pass, for progress and its files.
        """
        if not asked.places.row.size:
            return
        # Written anew by each run: the same bytes, if it is the same owner's.
        folder = self._folder(name)
        sae.save(folder / "sae")
        asked.save(folder / "asked.safetensors")
        settings = AblationSettings(
            name="places",
            ends=whole_ends(asked.places.seq_id.tolist(), PLACES),
            model=self.model.absolute(),
            record=self.record.absolute(),
            sae=(folder / "sae").absolute(),
            cache=self.cache.absolute(),
            tokens=self.tokens.absolute(),
            split=split,
            asked=(folder / "asked.safetensors").absolute(),
        )
        shards = self.shards.results(
            AblationWorker, settings, self.reads, f"{_FOLDER}/{name}", f"ablations, {name}"
        )
        for number, ran in enumerate(shards):
            yield np.arange(*settings.bounds(number)), ran

    def forget(self, name: str) -> None:
        """Remove a pass's shards: every set's drop at every place is much to keep."""
        shutil.rmtree(self._folder(name), ignore_errors=True)

    def _folder(self, name: str) -> Path:
        return self.shards.folder / _FOLDER / name
