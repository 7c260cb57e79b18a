"""From settings to a model that answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from rldecoder.config.llm import FROZEN, Endpoint, LlmConfig, LocalModel
from rldecoder.interp.llm.backends import ChatModel
from rldecoder.interp.llm.endpoint import EndpointModel
from rldecoder.interp.llm.local import LocalChatModel
from rldecoder.lm.model_sources import fetch, locate
from rldecoder.lm.registry import choose_model


class FrozenModel(NamedTuple):
    """The model that the run decodes, for `model: frozen`."""

    folder: Path
    digest: str
    """Of its artifact."""


def open_models(
    config: LlmConfig, frozen: FrozenModel, device: torch.device, note: Callable[[str], None]
) -> tuple[ChatModel, ChatModel]:
    """The labeler's model and the judge's; one and the same if they are set alike.

    Raises:
        BadInputError: no such model, or the variable with the endpoint's key is not set.
    """
    labeler = _open(config.labeler, config, frozen, device, note)
    if config.judge is None or config.judge == config.labeler:
        return labeler, labeler
    return labeler, _open(config.judge, config, frozen, device, note)


def _open(
    model: LocalModel | Endpoint,
    config: LlmConfig,
    frozen: FrozenModel,
    device: torch.device,
    note: Callable[[str], None],
) -> ChatModel:
    if isinstance(model, Endpoint):
        return EndpointModel(model, config.temperature)
    if model.model == FROZEN:
        folder, name, weights = frozen.folder, FROZEN, {"artifact": frozen.digest}
    else:
        choice = choose_model(
            model.model, path=model.path, repo=model.repo, revision=model.revision
        )
        located = locate(choice.sources)
        folder, name, weights = fetch(located, note), choice.name, located.identity
    dtype = getattr(torch, model.dtype)
    return LocalChatModel(folder, name, weights, config.temperature, dtype=dtype, device=device)
