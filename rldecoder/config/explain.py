"""Configuration of the stages that explain, evaluate and report."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from pydantic import Field

from rldecoder.config.base import Config, StageConfig, free, late
from rldecoder.config.decoder import MatmulPrecision
from rldecoder.config.tasks import FileTask, TaskName
from rldecoder.errors import BadInputError


class TrainExplainerConfig(StageConfig):
    """Method B: pairs from exact ablations, the pointer model, its evaluation and examples."""

    num_pairs: int = Field(5000, ge=8)
    """Positions (feature set, exact effects) of the label split and of training prompts."""
    num_test_positions: int = Field(300, ge=4)
    """Held-out positions of the test split that explanations are evaluated on."""
    held_out_features: float = Field(0.1, ge=0, lt=1)
    """Share of the latents that are in no training pair, so that claims about them test what was
    learnt of features in general. At test time they can be claimed like any other."""
    scale_tokens: int = Field(20_000, ge=1)
    """Tokens of the label split that give each feature's usual high (p99)."""
    max_candidates: int = Field(16, ge=1, le=64)
    """Active features a position that may be claimed: those with the largest |attribution|. Each
    costs a run of the blocks above the hook layer."""
    max_claims: int = Field(5, ge=1, le=16)
    """Most claims an explanation makes."""
    interventions_per_position: int = Field(4, ge=1)
    """Random interventions of each kind at a test position."""
    width: int = Field(96, ge=8, multiple_of=4)
    """Hidden width of the set encoder."""
    num_layers: int = Field(2, ge=1)
    """Attention layers of the set encoder."""
    steps: int = Field(300, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(32, ge=1)
    """Positions a step."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate (AdamW), after a warm-up of a tenth of the steps, then cosine to 0."""
    min_effect: float = Field(0.05, ge=0)
    """Nats of log p; smaller effects are never claimed, nor count as support for a claim."""
    bootstrap_resamples: int = Field(2000, ge=100)
    """Resamples of confidence intervals and paired tests."""
    example_tokens: int = Field(48, ge=2)
    """Tokens of context in a text that people are to judge (`rldecoder judge export`)."""


class HarnessConfig(Config):
    """Tasks that EleutherAI's lm-evaluation-harness asks (extra `eval`)."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names: of `evaluate.tasks` and `evaluate.file_tasks` (a yes/no task `name` has a second form,
    `name_choices`), of YAMLs in `include`, or of tasks published with the harness (hub)."""
    include: tuple[Path, ...] = free(())
    """Folders with YAMLs of tasks. The content of all their files is part of the digest."""
    spliced: bool = True
    """Whether the frozen model with the SAE's reconstructions is asked too; it writes without a
    cache, and so slowly."""
    limit: int | None = Field(None, ge=1)
    """Documents a task at most."""
    batch_size: int = free(16, ge=1)
    """Documents asked together."""


def require_harness() -> None:
    """Refuse what needs the harness where it is not installed.

    Raises:
        BadInputError: it is not.
    """
    if find_spec("lm_eval") is None:
        raise BadInputError(
            "The package lm_eval is not installed.",
            "It is an extra.",
            "pip install -c constraints.txt -e '.[eval]'",
        )


class EvaluateConfig(StageConfig):
    """Frozen, supervised and final decoder side by side, and the targets table."""

    num_prompts: int = Field(64, ge=2)
    """Test prompts a task (fewer where a file has fewer)."""
    tasks: tuple[TaskName, ...] = ("addition", "cloze")
    """Generated tasks."""
    file_tasks: tuple[FileTask, ...] = ()
    """Further tasks by file (GSM8K, BoolQ, SQuAD); a missing file is noted, not an error."""
    harness: HarnessConfig | None = late(None)
    """What lm-evaluation-harness asks the same models besides; None asks nothing."""
    batch_size: int = free(32, ge=1)
    """Prompts generated together."""
    num_tokens: int = Field(6144, ge=16)
    """Held-out tokens a split for faithfulness (KL, CE, accuracy, agreement)."""
    matmul_precision: MatmulPrecision = "medium"
    """Of the products with the unembedding, as in train_decoder."""
    deletion_positions: int = Field(128, ge=4)
    """Test positions of the comprehensiveness and sufficiency curves."""
    bootstrap_resamples: int = Field(2000, ge=100)
    """Resamples of confidence intervals."""


class ReportConfig(StageConfig):
    """The HTML report."""

    title: str = "RL-Decoder"
    """Heading of the report, normally the run's name."""
    max_feature_cards: int = Field(200, ge=1)
    """Features in the browser, most important first; the rest stay in the artifacts."""
