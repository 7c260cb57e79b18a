"""What a release is made of: which artifacts, which of their files, in which folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import (
    Clusters,
    Controls,
    Corpus,
    DecoderGate,
    Evaluation,
    FinalDecoder,
    Importance,
    Labels,
    ModelFolder,
    SaeGate,
    SupervisedDecoder,
    TrainedExplainer,
    TrainedSae,
)
from rldecoder.artifacts.manifests import Manifest
from rldecoder.data.provenance import Provenance, SplitProvenance
from rldecoder.release.leaks import without_places
from rldecoder.release.manifest import SUFFIXES
from rldecoder.schemas import JsonRecord

PIN = "model/pin.json"
"""Hashes of the frozen model, and where to get it (`rldecoder.lm.pins.ModelPin`)."""
SETTINGS = "settings.json"
CORPUS = "corpus.json"


class ReleaseInputs(NamedTuple):
    """What must have been published: what is released, and what is measured of it."""

    model: ModelFolder
    corpus: Corpus
    sae: TrainedSae
    sae_gate: SaeGate
    decoder_gate: DecoderGate
    controls: Controls
    final: FinalDecoder
    importance: Importance
    labels: Labels
    clusters: Clusters
    explainer: TrainedExplainer
    evaluation: Evaluation


class SupervisedInputs(NamedTuple):
    """What is added on request."""

    supervised: SupervisedDecoder


# Not the model (it has a pin), no text of the corpus but the examples, nothing that was sent to
# a language model, not what the explainer was trained on.
_LEFT_OUT: Mapping[type[Artifact], tuple[str, ...]] = {
    ModelFolder: (ModelFolder.model.name,),
    Labels: (Labels.ledger.name,),
    TrainedExplainer: (TrainedExplainer.pairs.name,),
}


class CorpusSource(JsonRecord):
    """What a source gave to all splits."""

    name: str
    """Of a file or folder its last part."""
    documents: int
    """Of which tokens were kept."""
    tokens: int
    """Kept."""
    licences: tuple[str, ...]
    """Of its documents."""


class ReleasedCorpus(JsonRecord):
    """Which text the numbers are about, and under which licences it is. The text is not here."""

    splits: dict[str, SplitProvenance]
    """By name."""
    sources: tuple[CorpusSource, ...]
    """In the order of their names."""

    @classmethod
    def of(cls, provenance: Provenance) -> ReleasedCorpus:
        """What may be said anywhere of a run's corpus."""
        sources = (
            CorpusSource(name=without_places(name), **source.model_dump())
            for name, source in provenance.sources.items()
        )
        return cls(splits=provenance.splits, sources=tuple(sources))

    @property
    def licences(self) -> list[str]:
        """All that occur, each once."""
        return list(dict.fromkeys(name for source in self.sources for name in source.licences))


def released_files(kind: type[Artifact], manifest: Manifest) -> Iterable[str]:
    """Names, in the artifact's folder, of what is released of it: tensors, JSON, Parquet."""
    left_out = _LEFT_OUT.get(kind, ())
    for name in sorted(manifest.files):
        if name.endswith(SUFFIXES) and name.split("/")[0] not in left_out and kind is not Corpus:
            yield name


def folder_of(kind: type[Artifact], root: Path) -> Path:
    """Where an artifact lies in a release."""
    return root / kind.kind


class Settings(JsonRecord):
    """The settings that can change a result, by stage; paths of the run's machine are cut."""

    name: str
    """Of the run."""
    seed: int
    """Of the run."""
    stages: dict[str, dict[str, Any]]
    """By stage."""
