"""What explaining, serving and notebooks need: artifacts, models, labels and readings, each once.

A run (`rldecoder.run.Run`) finds them in its store, a release (`rldecoder.release.opening.Release`)
in its own folder; nothing that takes an `Opened` asks which of the two it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints, overload

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import (
    ActivationCache,
    Clusters,
    FinalDecoder,
    Labels,
    ModelFolder,
    TrainedExplainer,
    TrainedSae,
)
from rldecoder.stages.table import stage_named

if TYPE_CHECKING:
    import torch

    from rldecoder.dashboard.notebook import ShownExplanation, ShownReading
    from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
    from rldecoder.explain.explainer import Explainer
    from rldecoder.explain.reading import PromptReader
    from rldecoder.explain.steering import Steering
    from rldecoder.interp.contexts import HeldOutText, LatentContexts
    from rldecoder.interp.records import FeatureLabel
    from rldecoder.lm.frozen import FrozenLM
    from rldecoder.sae.model import Sae

A = TypeVar("A", bound=Artifact)
Several = TypeVar("Several", bound=tuple[Any, ...])
Named = str | type[Artifact]
"""A stage's name, or the class of what it publishes."""

EXPLAINING: tuple[type[Artifact], ...] = (
    ModelFolder, TrainedSae, FinalDecoder, Labels, Clusters, TrainedExplainer,
)  # fmt: skip
"""What explanations and the server read."""
CONTEXT_TOKENS = 32_768
"""Most tokens of a split that `contexts` reads: seconds, not minutes, whatever the budget."""


class Opened(ABC):
    """Artifacts, models and labels; each is verified and loaded once, when asked for."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self._artifacts: dict[str, Artifact] = {}
        self._held_out: dict[str, HeldOutText] = {}
        self.python: tuple[str, ...] = ()
        """Lines of Python that open the same as `run`; none where nobody said what was opened."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The run's name, for people."""

    @property
    @abstractmethod
    def threads(self) -> int | None:
        """CPU threads for torch; None takes all cores."""

    @property
    @abstractmethod
    def reviews(self) -> Path:
        """The file of verdicts on labels, unless a command names another."""

    @abstractmethod
    def missing(self, which: Iterable[Named] | None = None) -> list[str]:
        """Names of the stages whose artifacts are not here.

        Args:
            which: those to ask about; None: all.
        """

    @abstractmethod
    def require(self, which: Iterable[Named] | None = None, purpose: str = "") -> None:
        """Refuse to go on without some artifacts.

        Args:
            which: the stages whose artifacts must be here; None: all.
            purpose: what they are needed for, such as `to explain`.

        Raises:
            BadInputError: one is missing.
        """

    @abstractmethod
    def _open(self, kind: type[A]) -> A:
        """An artifact that is here, its files verified."""

    @property
    @abstractmethod
    def sources(self) -> tuple[str, ...]:
        """Names of the text that everything was trained on; paths cut to their last part."""

    def report(self, say: Callable[[str], None]) -> bytes | None:
        """The page of the run's report as it was published; None where there is none.

        Args:
            say: told why one that is there is not to be trusted.
        """
        return None

    @overload
    def artifact(self, which: type[A]) -> A: ...

    @overload
    def artifact(self, which: str) -> Any: ...

    def artifact(self, which: Named) -> Any:
        """A stage's published artifact, its files verified.

        Args:
            which: the stage's name, such as `train_sae`, or the artifact's class.

        Raises:
            BadInputError: there is no such stage, or its artifact is not here.
            DamagedFileError: the artifact is not what was published.
        """
        name = stage_name(which)
        if name not in self._artifacts:
            self.require([name])
            self._artifacts[name] = self._open(stage_named(name).artifact)
        return self._artifacts[name]

    def inputs(self, kinds: type[Several], purpose: str = "") -> Several:
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
        clamp: Mapping[int, tuple[float, float]] | None = None,
        start: int = 1,
    ) -> Steering:
        """Both models with some latents changed, for `.generate(prompt)`.

        Args:
            scale: factors by latent; an inactive latent stays inactive.
            set: activations by latent, in the SAE's units, active or not.
            clamp: least and greatest activation by latent.
            start: the first position that is changed; those after it are, too.

        Raises:
            BadInputError: no such latent, a value that cannot be meant, or the run has no SAE yet.
        """
        from rldecoder.explain.steering import Changes, Steering

        changes = Changes(dict(scale or {}), dict(set or {}), dict(clamp or {}))
        return Steering(self.lm(), self.sae(), self.decoder, changes, start)

    def contexts(self, latent: int, *, split: str = "test", count: int = 6) -> LatentContexts:
        """Where a latent fires most strongly in held-out text, any latent of the dictionary.

        The first call reads the split, a few seconds; what it found is kept.

        Args:
            split: `test` was used for no label (it scored them); `label` is what they are made of.
            count: windows of text, at most.

        Raises:
            BadInputError: no such latent or split, or the text is not here: no release has it.
        """
        if split not in self._held_out:
            from rldecoder.explain.prompts import token_text
            from rldecoder.interp.contexts import HeldOutText
            from rldecoder.interp.corpus import read_firings

            sae, lm = self.sae(), self.lm()
            reader = self.artifact(ActivationCache).reader(split)
            found = read_firings(reader, sae, split=split, max_tokens=CONTEXT_TOKENS)
            self._held_out[split] = HeldOutText(found, partial(token_text, lm))
        return self._held_out[split].contexts(latent, count)

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

        published = self.artifact(Labels)
        texts = label_texts(published.labels, published.descriptions)
        return PromptReader(self.lm(), self.sae(), self.decoder(), texts, self.explainer())


def stage_name(which: Named) -> str:
    """The stage's name, however it was named.

    Raises:
        BadInputError: there is no such stage.
    """
    return stage_named(which if isinstance(which, str) else which.stage).name
