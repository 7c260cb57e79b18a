"""The stages, in the order in which they run: the pipeline's graph in one view.

A stage's room, `rldecoder/stages/<name>.py`, has its function `run`. It is imported when the stage
is built: to plan, to show a status or to reuse what is published takes no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rldecoder.errors import BadInputError
from rldecoder.stages import fingerprints
from rldecoder.stages.context import (
    FingerprintFunction,
    InputArtifact,
    Phase,
    RunFunction,
    Stage,
    StageContext,
    StageOutput,
    no_fingerprint,
)


def _stage(
    name: str,
    kind: str,
    version: int,
    inputs: tuple[str, ...],
    phase: Phase,
    *,
    gate: bool = False,
    fingerprint: FingerprintFunction = no_fingerprint,
) -> Stage:
    return Stage(name, kind, version, inputs, _run_of(name), phase, gate, fingerprint)


def _run_of(name: str) -> RunFunction:
    """The room's `run`, imported when it is called."""
    room = f"rldecoder.stages.{name}"

    def run(inputs: Mapping[str, InputArtifact], config: Any, ctx: StageContext) -> StageOutput:
        function: RunFunction = import_module(room).run
        return function(inputs, config, ctx)

    run.__module__ = room  # whose source counts as the stage's
    return run


STAGES: tuple[Stage, ...] = (
    _stage("sync_tokenizer", "model", 1, (), "prepare", fingerprint=fingerprints.sync_tokenizer),
    _stage("ingest", "tokens", 2, ("sync_tokenizer",), "prepare", fingerprint=fingerprints.ingest),
    _stage("baselines", "baselines", 4, ("sync_tokenizer", "ingest"), "prepare"),
    _stage("sweep_sae", "sweep", 3, ("sync_tokenizer", "ingest"), "prepare"),
    _stage("frontier", "frontier", 2, ("sync_tokenizer", "ingest", "sweep_sae"), "prepare"),
    _stage("cache_activations", "activations", 2, ("sync_tokenizer", "ingest"), "features"),
    _stage(
        "train_sae",
        "sae",
        4,
        ("sync_tokenizer", "ingest", "cache_activations"),
        "features",
        fingerprint=fingerprints.train_sae,
    ),
    _stage(
        "gate_sae",
        "qa_report",
        2,
        ("sync_tokenizer", "ingest", "cache_activations", "train_sae"),
        "features",
        gate=True,
    ),
    _stage(
        "train_decoder",
        "decoder_supervised_init",
        2,
        (
            "sync_tokenizer",
            "ingest",
            "baselines",
            "frontier",
            "cache_activations",
            "train_sae",
            "gate_sae",
        ),
        "decoder",
    ),
    _stage(
        "gate_decoder",
        "decoder_report",
        1,
        ("sync_tokenizer", "cache_activations", "train_sae", "train_decoder"),
        "decoder",
        gate=True,
    ),
    _stage(
        "train_ppo",
        "policy",
        8,
        ("sync_tokenizer", "cache_activations", "train_sae", "train_decoder", "gate_decoder"),
        "rl",
        fingerprint=fingerprints.train_ppo,
    ),
    _stage(
        "control_ppo",
        "verdict",
        9,
        (
            "sync_tokenizer",
            "cache_activations",
            "train_sae",
            "train_decoder",
            "gate_decoder",
            "train_ppo",
        ),
        "rl",
        gate=True,
    ),
    _stage(
        "freeze_decoder",
        "decoder_final",
        2,
        (
            "sync_tokenizer",
            "cache_activations",
            "train_sae",
            "train_decoder",
            "train_ppo",
            "control_ppo",
        ),
        "rl",
    ),
    _stage(
        "rank_features",
        "importance",
        4,
        ("sync_tokenizer", "ingest", "cache_activations", "train_sae", "freeze_decoder"),
        "interpretation",
    ),
    _stage(
        "label_features",
        "labels",
        5,
        (
            "sync_tokenizer",
            "ingest",
            "cache_activations",
            "train_sae",
            "freeze_decoder",
            "rank_features",
        ),
        "interpretation",
        fingerprint=fingerprints.label_features,
    ),
    _stage(
        "cluster_features",
        "clusters",
        3,
        (
            "sync_tokenizer",
            "cache_activations",
            "train_sae",
            "freeze_decoder",
            "rank_features",
            "label_features",
        ),
        "interpretation",
    ),
    _stage(
        "train_explainer",
        "explainer",
        5,
        (
            "sync_tokenizer",
            "cache_activations",
            "train_sae",
            "freeze_decoder",
            "rank_features",
            "label_features",
            "cluster_features",
        ),
        "explanations",
    ),
    _stage(
        "evaluate",
        "evaluation",
        5,
        (
            "sync_tokenizer",
            "cache_activations",
            "train_sae",
            "gate_sae",
            "train_decoder",
            "gate_decoder",
            "train_ppo",
            "control_ppo",
            "freeze_decoder",
            "rank_features",
            "label_features",
            "train_explainer",
        ),
        "explanations",
        fingerprint=fingerprints.evaluate,
    ),
    _stage(
        "report",
        "report",
        7,
        (
            "sync_tokenizer",
            "ingest",
            "baselines",
            "sweep_sae",
            "frontier",
            "cache_activations",
            "train_sae",
            "gate_sae",
            "train_decoder",
            "gate_decoder",
            "train_ppo",
            "control_ppo",
            "freeze_decoder",
            "rank_features",
            "label_features",
            "cluster_features",
            "train_explainer",
            "evaluate",
        ),
        "explanations",
    ),
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
