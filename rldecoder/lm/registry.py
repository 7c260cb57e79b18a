"""From a model's name to its spec and sources, and the list of what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rldecoder.errors import RlDecoderError
from rldecoder.lm.model_sources import SourceUnavailableError, locate_one
from rldecoder.lm.specs import (
    HfCacheSource,
    HubSource,
    LocalSource,
    ModelSource,
    ModelSpec,
    WheelSource,
    list_model_specs,
    load_model_spec,
)
from rldecoder.lm.wheel import wheel_model_folder


@dataclass(frozen=True)
class ModelChoice:
    """A model that a run names, before any file was looked for."""

    name: str
    spec: ModelSpec | None
    """None for a model without a spec: its own config is believed."""
    sources: tuple[ModelSource, ...]


class ModelRow(NamedTuple):
    """A line of `rldecoder models`."""

    name: str
    parameters: str
    num_layers: int
    d_model: int
    hook_layer: int
    licence: str
    weights: str
    """Where they are, or what it takes to get them."""


def choose_model(
    model: str, *, path: str | None = None, repo: str | None = None, revision: str = "main"
) -> ModelChoice:
    """Turn the settings of `SyncTokenizerConfig` (all but `random`) into a spec and sources.

    Raises:
        BadInputError: there is no such spec.
    """
    if model == "folder":
        assert path is not None
        return ModelChoice(Path(path).name, None, (LocalSource(path=path),))
    if model == "hub":
        assert repo is not None
        sources = (
            HfCacheSource(repo=repo, revision=revision),
            HubSource(repo=repo, revision=revision),
        )
        return ModelChoice(repo, None, sources)
    spec = load_model_spec(model)
    return ModelChoice(spec.name, spec, (LocalSource(path=path),) if path else spec.sources)


def list_models() -> list[ModelRow]:
    """All specs with their sizes, licence, and whether their weights are on this machine.

    Nothing is downloaded and no network is used.
    """
    rows = []
    for name in list_model_specs():
        spec = load_model_spec(name)
        rows.append(
            ModelRow(
                name=name,
                parameters=f"{spec.architecture.parameters / 1e6:,.0f}M",
                num_layers=spec.architecture.num_layers,
                d_model=spec.architecture.d_model,
                hook_layer=spec.hook_layer,
                licence=spec.licence,
                weights=_whereabouts(spec),
            )
        )
    return rows


def _whereabouts(spec: ModelSpec) -> str:
    offers: list[str] = []
    for source in spec.sources:
        if isinstance(source, HubSource):
            offers.append(f"hub: {source.repo}")
        elif isinstance(source, WheelSource):
            if wheel_model_folder(source).is_dir():
                return "here (converted from its wheel)"
            offers.append(f"package index: {source.package} {source.version}")
        else:
            try:
                return f"here ({locate_one(source).description})"
            except SourceUnavailableError:
                continue
            except RlDecoderError as error:
                return f"unusable: {error.what}"
    return "; ".join(offers) or "not here"
