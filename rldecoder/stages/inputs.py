"""What each stage reads: the pipeline's graph, in the types that stages are given.

Apart from the rooms, because a plan needs them all, and must not import torch for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import (
    ActivationCache,
    Baselines,
    Clusters,
    Controls,
    Corpus,
    DecoderGate,
    Evaluation,
    FinalDecoder,
    Frontier,
    Importance,
    Labels,
    ModelFolder,
    Policy,
    SaeGate,
    SupervisedDecoder,
    Sweep,
    TrainedExplainer,
    TrainedSae,
)


class Nothing(NamedTuple):
    """The first stage reads no artifact."""


class IngestInputs(NamedTuple):
    """Documents are cut into tokens."""

    model: ModelFolder


class TextInputs(NamedTuple):
    """Model and text: baselines, the sweep and the activation cache."""

    model: ModelFolder
    corpus: Corpus


class FrontierInputs(NamedTuple):
    """The swept SAEs are read by decoders of several depths."""

    model: ModelFolder
    corpus: Corpus
    sweep: Sweep


class SaeInputs(NamedTuple):
    """The cache, or model and text where activations are streamed."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache


class SaeGateInputs(NamedTuple):
    """The SAE on the test split."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache
    sae: TrainedSae


class DecoderInputs(NamedTuple):
    """The gated SAE, the lens to start from, and the depth that the frontier recommends."""

    model: ModelFolder
    corpus: Corpus
    baselines: Baselines
    frontier: Frontier
    cache: ActivationCache
    sae: TrainedSae
    sae_gate: SaeGate


class DecoderGateInputs(NamedTuple):
    """The supervised decoder on the test split."""

    model: ModelFolder
    cache: ActivationCache
    sae: TrainedSae
    supervised: SupervisedDecoder


class PpoInputs(NamedTuple):
    """The gated supervised decoder; the text where it is streamed."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache
    sae: TrainedSae
    supervised: SupervisedDecoder
    decoder_gate: DecoderGate


class ControlInputs(NamedTuple):
    """The trained policy beside the decoder that it started from."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache
    sae: TrainedSae
    supervised: SupervisedDecoder
    decoder_gate: DecoderGate
    policy: Policy


class FreezeInputs(NamedTuple):
    """Both decoders and the verdict on them."""

    model: ModelFolder
    cache: ActivationCache
    sae: TrainedSae
    supervised: SupervisedDecoder
    policy: Policy
    controls: Controls


class RankInputs(NamedTuple):
    """The final decoder over text."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache
    sae: TrainedSae
    final: FinalDecoder


class LabelInputs(NamedTuple):
    """The ranking says which latents are labelled."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache
    sae: TrainedSae
    final: FinalDecoder
    importance: Importance


class ClusterInputs(NamedTuple):
    """Labelled latents are compared."""

    model: ModelFolder
    cache: ActivationCache
    sae: TrainedSae
    final: FinalDecoder
    importance: Importance
    labels: Labels


class ExplainerInputs(NamedTuple):
    """The final decoder with its labelled latents."""

    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache
    sae: TrainedSae
    final: FinalDecoder
    importance: Importance
    labels: Labels
    clusters: Clusters


class EvaluateInputs(NamedTuple):
    """Everything that a target of the plan is measured on."""

    model: ModelFolder
    cache: ActivationCache
    sae: TrainedSae
    sae_gate: SaeGate
    supervised: SupervisedDecoder
    decoder_gate: DecoderGate
    policy: Policy
    controls: Controls
    final: FinalDecoder
    importance: Importance
    labels: Labels
    explainer: TrainedExplainer


class ReportInputs(NamedTuple):
    """All other artifacts."""

    model: ModelFolder
    corpus: Corpus
    baselines: Baselines
    sweep: Sweep
    frontier: Frontier
    cache: ActivationCache
    sae: TrainedSae
    sae_gate: SaeGate
    supervised: SupervisedDecoder
    decoder_gate: DecoderGate
    policy: Policy
    controls: Controls
    final: FinalDecoder
    importance: Importance
    labels: Labels
    clusters: Clusters
    explainer: TrainedExplainer
    evaluation: Evaluation


Inputs = TypeVar("Inputs", bound=tuple[Artifact, ...])


class Placed(BaseModel):
    """A stage's input as another process is told of it, on the same file system."""

    model_config = ConfigDict(frozen=True)

    folder: Path
    digest: str
    config: dict[str, Any]


def placed(inputs: tuple[Artifact, ...]) -> tuple[Placed, ...]:
    """Where inputs are; paths are made absolute, for other processes stand elsewhere."""
    return tuple(
        Placed(folder=artifact.folder.absolute(), digest=artifact.digest,
               config=dict(artifact.config))
        for artifact in inputs
    )  # fmt: skip


def opened(kind: type[Inputs], places: tuple[Placed, ...]) -> Inputs:
    """The inputs again. Who told of them has verified their files."""
    artifacts: list[type[Artifact]] = list(get_type_hints(kind).values())
    found = [
        artifact(folder=place.folder, digest=place.digest, metrics={}, config=place.config)
        for artifact, place in zip(artifacts, places, strict=True)
    ]
    return kind(*found)  # type: ignore[arg-type]  # a NamedTuple's fields
