"""The stages, in the order in which they run."""

from __future__ import annotations

from rldecoder.errors import BadInputError
from rldecoder.stages import (
    baselines,
    cache_activations,
    cluster_features,
    control_ppo,
    evaluate,
    freeze_decoder,
    gate_decoder,
    gate_sae,
    ingest,
    label_features,
    rank_features,
    report,
    sweep_sae,
    sync_tokenizer,
    train_decoder,
    train_explainer,
    train_ppo,
    train_sae,
)
from rldecoder.stages.context import Stage

STAGES: tuple[Stage, ...] = (
    sync_tokenizer.STAGE,
    ingest.STAGE,
    baselines.STAGE,
    sweep_sae.STAGE,
    cache_activations.STAGE,
    train_sae.STAGE,
    gate_sae.STAGE,
    train_decoder.STAGE,
    gate_decoder.STAGE,
    train_ppo.STAGE,
    control_ppo.STAGE,
    freeze_decoder.STAGE,
    rank_features.STAGE,
    label_features.STAGE,
    cluster_features.STAGE,
    train_explainer.STAGE,
    evaluate.STAGE,
    report.STAGE,
)


def stage_named(name: str) -> Stage:
    """The stage called `name`.

    Raises:
        BadInputError: there is none.
    """
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise BadInputError(
        f"There is no stage called {name}.", "", f"Stages: {', '.join(s.name for s in STAGES)}."
    )
