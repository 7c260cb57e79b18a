"""A run: a config and a store, and the published, verified artifacts that they name.

Notebooks, the server and the commands open models, labels and tables through it, each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints, overload

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import (
    Clusters,
    FinalDecoder,
    Labels,
    ModelFolder,
    TrainedExplainer,
    TrainedSae,
)
from rldecoder.artifacts.store import ArtifactRef, ArtifactStore
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.runner import open_artifact, plan, store_for
from rldecoder.stages.table import STAGES, stage_named

if TYPE_CHECKING:
    import torch

    from rldecoder.dashboard.notebook import ShownExplanation, ShownReading
    from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
    from rldecoder.explain.explainer import Explainer
    from rldecoder.explain.reading import PromptReader
    from rldecoder.explain.steering import Steering
    from rldecoder.interp.records import FeatureLabel
    from rldecoder.lm.frozen import FrozenLM
    from rldecoder.sae.model import Sae

A = TypeVar("A", bound=Artifact)
Opened = TypeVar("Opened", bound=tuple[Any, ...])
Named = str | type[Artifact]
"""A stage's name, or the class of what it publishes."""

EXPLAINING: tuple[type[Artifact], ...] = (
    ModelFolder, TrainedSae, FinalDecoder, Labels, Clusters, TrainedExplainer,
)  # fmt: skip
"""What explanations and the server read."""


def open_run(
    config: Path | str | RunConfig,
    store: Path | str | ArtifactStore | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Run:
    """Open a run that `rldecoder run` has built, or the part of it that is there.

    Nothing is built or loaded yet.

    Args:
        config: a run's YAML, or what was loaded from one.
        store: where the artifacts are; None: the config's `store`.
        device: where models go.

    Raises:
        BadInputError: the config cannot be used.
    """
    loaded = config if isinstance(config, RunConfig) else load_run_config(Path(config))
    if not isinstance(store, ArtifactStore):
        store = store_for(loaded, None if store is None else Path(store))
    return Run(loaded, store, device=device)


class Run:
    """A run's artifacts, models and labels; each is verified and loaded once, when asked for.

    Args:
        config: decides what the artifacts are.
        store: where they are.
        device: where models go.
        refs: the address of every artifact, where a run that has just ended knows them.
    """

    def __init__(
        self,
        config: RunConfig,
        store: ArtifactStore,
        *,
        device: torch.device | str = "cpu",
        refs: Mapping[str, ArtifactRef] | None = None,
    ) -> None:
        self.config, self.store, self.device = config, store, device
        self._refs = refs
        self._artifacts: dict[str, Artifact] = {}

    def __repr__(self) -> str:
        published, damaged = self.look()
        facts = [f"{len(published)} of {len(STAGES)} stages in {self.store.root}"]
        facts += [f"{one.stage}: {one.verdict}" for one in published if one.verdict is not None]
        if damaged:
            facts.append(f"damaged: {', '.join(damaged)}")
        return f"<Run {self.config.name}: {'; '.join(facts)}>"

    def _repr_html_(self) -> str:
        from rldecoder.dashboard.notebook import run_html

        published, damaged = self.look()
        return run_html(self.config.name, str(self.store.root), published, damaged)

    @cached_property
    def refs(self) -> Mapping[str, ArtifactRef]:
        """The address of every stage's artifact, published or not."""
        return plan(self.config) if self._refs is None else self._refs

    @overload
    def artifact(self, which: type[A]) -> A: ...

    @overload
    def artifact(self, which: str) -> Any: ...

    def artifact(self, which: Named) -> Any:
        """A stage's published artifact, its files verified.

        Args:
            which: the stage's name, such as `train_sae`, or the artifact's class.

        Raises:
            BadInputError: there is no such stage, or it has not published yet.
            DamagedFileError: the artifact is not what was published.
        """
        name = _stage_name(which)
        if name not in self._artifacts:
            self.require([name])
            kind = stage_named(name).artifact
            self._artifacts[name] = open_artifact(kind, self.refs[name], self.store)
        return self._artifacts[name]

    def inputs(self, kinds: type[Opened], purpose: str = "") -> Opened:
        """Several artifacts: an instance of a NamedTuple of artifact classes.

        Args:
            kinds: such as those of `rldecoder.stages.inputs`.
            purpose: what they are needed for, such as `to explain`.

        Raises:
            BadInputError: one is missing.
        """
        hints: dict[str, type[Artifact]] = get_type_hints(kinds)
        self.require(hints.values(), purpose)
        return kinds(**{field: self.artifact(kind) for field, kind in hints.items()})

    def missing(self, which: Iterable[Named] | None = None) -> list[str]:
        """Names of the stages that have not published yet.

        Args:
            which: those to ask about; None: all.
        """
        names = [stage.name for stage in STAGES] if which is None else map(_stage_name, which)
        return [name for name in names if not self.store.is_published(self.refs[name])]

    def look(self) -> tuple[list[Artifact], list[str]]:
        """What is published, by its manifests alone, and the stages whose manifest is damaged.

        To be shown, not to be worked with: the other files are not read, which may be gigabytes.
        """
        published, damaged = [], []
        for stage in STAGES:
            ref = self.refs[stage.name]
            if not self.store.is_published(ref):
                continue
            try:
                manifest = self.store.manifest(ref)
            except DamagedFileError:
                damaged.append(stage.name)
            else:
                published.append(stage.artifact.opened(self.store.path(ref), manifest))
        return published, damaged

    def require(self, which: Iterable[Named] | None = None, purpose: str = "") -> None:
        """Refuse to go on without some artifacts.

        Args:
            which: the stages that must have published; None: all.
            purpose: what they are needed for, such as `to explain`.

        Raises:
            BadInputError: one is missing.
        """
        missing = self.missing(which)
        if missing:
            last = max(missing, key=[stage.name for stage in STAGES].index)
            raise BadInputError(
                f"The run {self.config.name} has not come far enough{purpose and f' {purpose}'}.",
                f"Missing in {self.store.root}: {', '.join(missing)}.",
                f"Run `rldecoder run CONFIG --until {last}`, with the same --store and --set.",
            )

    def lm(self) -> FrozenLM:
        """The frozen model, in float32 whatever the stages computed in: an effect is a small
        difference, which a residual rounded to bfloat16 after its edit would lose."""
        return self._lm

    def sae(self) -> Sae:
        """The SAE."""
        return self._sae

    def decoder(self) -> SaeDecoderForCausalLM:
        """The final decoder, attached to `lm()` and `sae()`."""
        return self._decoder

    def explainer(self) -> Explainer:
        """What makes the claims of Method B."""
        return self._explainer

    @cached_property
    def labels(self) -> Mapping[int, FeatureLabel]:
        """What is known of each labelled latent, by its number; most important first."""
        return {feature.latent: feature for feature in self.artifact(Labels).labels.features}

    def reader(self) -> PromptReader:
        """The models that read prompts, as server and commands use them."""
        return self._reader

    def read(self, prompt: str) -> ShownReading:
        """Run a prompt through the frozen model, once, and through SAE and decoder.

        Raises:
            BadInputError: it is empty or too long, or the run has not come so far.
        """
        from rldecoder.dashboard.notebook import ShownReading
        from rldecoder.explain.prompts import encode_prompt

        reader = self._reader
        return ShownReading(reader, encode_prompt(reader.lm, prompt).tolist(), prompt)

    def explain(self, prompt: str) -> ShownExplanation:
        """Explain the next token after a prompt, in claims tested by intervention.

        Raises:
            BadInputError: as in `read`.
        """
        return self.read(prompt).explain()

    def steer(
        self,
        scale: Mapping[int, float] | None = None,
        *,
        set: Mapping[int, float] | None = None,
        start: int = 1,
    ) -> Steering:
        """Both models with some latents changed, for `.generate(prompt)`.

        Args:
            scale: factors by latent; an inactive latent stays inactive.
            set: activations by latent, in the SAE's units, active or not.
            start: the first position that is changed; those after it are, too.

        Raises:
            BadInputError: no such latent, a value that cannot be meant, or the run has no SAE yet.
        """
        from rldecoder.explain.steering import Changes, Steering

        changes = Changes(dict(scale or {}), dict(set or {}))
        return Steering(self.lm(), self.sae(), self.decoder, changes, start)

    @cached_property
    def _lm(self) -> FrozenLM:
        import torch

        return self.artifact(ModelFolder).load(self.device, torch.float32)

    @cached_property
    def _sae(self) -> Sae:
        return self.artifact(TrainedSae).load(self.device)

    @cached_property
    def _decoder(self) -> SaeDecoderForCausalLM:
        return self.artifact(FinalDecoder).load(self.lm(), self.sae())

    @cached_property
    def _explainer(self) -> Explainer:
        return self.artifact(TrainedExplainer).load(self.device)

    @cached_property
    def _reader(self) -> PromptReader:
        self.require(EXPLAINING, "to explain")
        from rldecoder.explain.inputs import label_texts
        from rldecoder.explain.reading import PromptReader

        texts = label_texts(self.artifact(Labels).labels)
        return PromptReader(self.lm(), self.sae(), self.decoder(), texts, self.explainer())


def _stage_name(which: Named) -> str:
    return stage_named(which if isinstance(which, str) else which.stage).name
