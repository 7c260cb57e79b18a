"""The whole run's configuration: one YAML file, one section a stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from rldecoder.config.base import Config, StageConfig, free
from rldecoder.config.data import BaselinesConfig, CacheActivationsConfig, IngestConfig
from rldecoder.config.decoder import FrontierConfig, GateDecoderConfig, TrainDecoderConfig
from rldecoder.config.executor import ExecutorConfig
from rldecoder.config.explain import EvaluateConfig, ReportConfig, TrainExplainerConfig
from rldecoder.config.interp import ClusterFeaturesConfig, LabelFeaturesConfig, RankFeaturesConfig
from rldecoder.config.model import SyncTokenizerConfig
from rldecoder.config.named import config_path
from rldecoder.config.problems import pasted_keys, problem_lines, shown_key
from rldecoder.config.rl import ControlPpoConfig, FreezeDecoderConfig, TrainPpoConfig
from rldecoder.config.sae import GateSaeConfig, SweepSaeConfig, TrainSaeConfig
from rldecoder.config.store import BUCKET_URL, BucketUrl, S3Config
from rldecoder.config.yaml_files import YamlFaultError, parse_yaml, read_yaml
from rldecoder.errors import BadInputError
from rldecoder.urls import without_credentials


class TrackingConfig(Config):
    """Where metrics go beside the artifacts."""

    wandb: Literal["off", "offline", "online"] = free("offline")
    """`offline` needs no account; `online` needs WANDB_API_KEY in the environment."""
    project: str = free("rl-decoder")
    """The wandb project."""


class RunConfig(Config):
    """One run: what to build, from which model and text, with which budgets."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """The run's name, in reports and in docs/experiments/<name>.md."""
    description: str = free("")
    """One line about what the run is for."""
    seed: int = Field(0, ge=0)
    """The one seed; every stage derives its own from it."""
    store: BucketUrl | Path = free(Path("artifacts"))
    """The artifact store: a folder, relative to the working directory, or `s3://bucket/prefix`."""
    s3: S3Config = free(S3Config())
    """How a store in a bucket is used."""
    mirror: str | None = free(None, repr=False)
    """fsspec URL that published artifacts are copied to and fetched from (s3://...), or null. A
    user and password in it are used and never shown; better keep them in the environment."""
    threads: int | None = free(None, ge=1)
    """CPU threads for torch; null takes all cores. Bitwise equality holds at equal threads."""
    device: str = free("auto")
    """`auto` (a free GPU, else the CPU), `cpu`, `cuda`, or the UUID of a GPU."""
    device_timeout_seconds: float = free(3600.0, ge=0)
    """How long a stage waits for a device while all that would do are taken."""
    tracking: TrackingConfig = free(TrackingConfig())
    """wandb."""
    executor: ExecutorConfig = free(ExecutorConfig())
    """Who computes the shards of stages that have them: this process, or a Ray cluster."""

    sync_tokenizer: SyncTokenizerConfig
    ingest: IngestConfig = IngestConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    sweep_sae: SweepSaeConfig = SweepSaeConfig()
    frontier: FrontierConfig = FrontierConfig()
    cache_activations: CacheActivationsConfig = CacheActivationsConfig()
    train_sae: TrainSaeConfig = TrainSaeConfig()
    gate_sae: GateSaeConfig = GateSaeConfig()
    train_decoder: TrainDecoderConfig = TrainDecoderConfig()
    gate_decoder: GateDecoderConfig = GateDecoderConfig()
    train_ppo: TrainPpoConfig = TrainPpoConfig()
    control_ppo: ControlPpoConfig = ControlPpoConfig()
    freeze_decoder: FreezeDecoderConfig = FreezeDecoderConfig()
    rank_features: RankFeaturesConfig = RankFeaturesConfig()
    label_features: LabelFeaturesConfig = LabelFeaturesConfig()
    cluster_features: ClusterFeaturesConfig = ClusterFeaturesConfig()
    train_explainer: TrainExplainerConfig = TrainExplainerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()

    @field_serializer("mirror")
    def _without_credentials(self, mirror: str | None) -> str | None:
        """What is written anywhere (wandb, Prefect, a worker's request) has no password."""
        return None if mirror is None else without_credentials(mirror)

    @field_validator("store", mode="before")
    @classmethod
    def _no_other_url(cls, store: Any) -> Any:
        """A URL that is no bucket's would otherwise be taken for a folder of that name."""
        if isinstance(store, str) and "://" in store and not re.match(BUCKET_URL, store):
            raise ValueError(
                "a store is a folder, or s3://bucket/prefix without user, password and query"
            )
        return store

    @model_validator(mode="after")
    def _one_copy_elsewhere(self) -> Self:
        if isinstance(self.store, str) and self.mirror is not None:
            raise ValueError("mirror is for a store in a folder; a bucket is shared already")
        return self

    @model_validator(mode="after")
    def _one_bos(self) -> Self:
        """The model's tokenizer is made to do what `ingest.bos` says, for all stages at once."""
        wanted, model = self.ingest.bos, self.sync_tokenizer
        if model.bos not in ("auto", wanted):
            raise ValueError(f"sync_tokenizer.bos is {model.bos}: set ingest.bos, and no other")
        object.__setattr__(self, "sync_tokenizer", model.model_copy(update={"bos": wanted}))
        return self

    @model_validator(mode="after")
    def _the_hook_layer_has_a_lens(self) -> Self:
        layers, hook = self.baselines.lens_layers, self.cache_activations.hook_layer
        if layers != "all" and hook not in layers:
            raise ValueError(
                f"baselines.lens_layers {list(layers)} lacks cache_activations.hook_layer {hook}, "
                "and the decoder starts from the affine lens of its hook layer; add it"
            )
        return self

    @model_validator(mode="after")
    def _the_frontier_has_saes(self) -> Self:
        swept = {"layers": self.sweep_sae.layers, "ks": self.sweep_sae.ks}
        for name, offered in swept.items():
            asked = getattr(self.frontier, name)
            if self.frontier.depths and not offered:
                raise ValueError(f"frontier.depths needs SAEs, but sweep_sae.{name} is empty")
            if asked is not None and not set(asked) <= set(offered):
                raise ValueError(
                    f"frontier.{name} {list(asked)} is not part of sweep_sae.{name} {list(offered)}"
                )
        layers = self.frontier.layers or self.sweep_sae.layers
        hook = self.cache_activations.hook_layer
        if self.train_decoder.depth == "auto" and not (self.frontier.depths and hook in layers):
            raise ValueError(
                "train_decoder.depth: auto needs a frontier at cache_activations.hook_layer "
                f"{hook}; set frontier.depths and add that to sweep_sae.layers, or give a depth"
            )
        return self

    def stage(self, name: str) -> StageConfig:
        """The config of one stage."""
        config = getattr(self, name)
        assert isinstance(config, StageConfig), name
        return config


def load_run_config(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a run's YAML and apply `a.b=c` overrides (values are YAML).

    `path` may be a name: `debug` is configs/debug.yaml (rldecoder/config/named.py).

    Raises:
        BadInputError: no such file, not YAML, an unknown key, or a value out of range; every
            problem is named at once.
    """
    path = config_path(path)
    # What two sections share by an alias is one object, which an override would change in both.
    values = _unshared(read_yaml(path, what="config"))
    if not isinstance(values, dict):
        raise BadInputError(f"{path} holds no settings.", "A mapping of keys was expected.")
    for override in overrides or []:
        _apply(values, override)
    problems = [
        f"{place}: this looks like a service's key; keys are read from the environment only"
        for place in pasted_keys(values)
    ]
    if not problems:
        try:
            return RunConfig.model_validate(values)
        except ValidationError as error:
            problems = problem_lines(error, RunConfig)
    listed = "\n".join(f"  {problem}" for problem in problems)
    raise BadInputError(
        f"{path} has settings that cannot be used:\n{listed}\n",
        "",
        "`rldecoder settings STAGE` lists the settings of a stage with their meaning.",
    )


def _unshared(value: Any) -> Any:
    """A copy in which no part stands twice."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        raise BadInputError(
            "A --set is not of the form a.b=c.",
            "It has no `=`, or nothing before it.",
            "Example: --set train_sae.k=32",
        )
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise BadInputError(f"--set {shown_key(key)}: {shown_key(parent)} is not a section.")
    try:
        place[last] = parse_yaml(text)
    except YamlFaultError as error:
        raise BadInputError(
            f"--set {shown_key(key)}: the value is not YAML.", f"{error}."
        ) from None
