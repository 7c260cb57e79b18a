"""What a reading of a prompt gives: records of plain values. Token texts in them are raw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, overload

from rldecoder.explain.ranking import RankedFeature


class Choice(NamedTuple):
    """One token that a model may say next, raw text."""

    token: str
    token_id: int
    probability: float


class TokenTrace(NamedTuple):
    """One position of a prompt and what both models predict after it."""

    token: str
    """Raw text."""
    frozen: list[Choice]
    """Most likely first."""
    decoder: list[Choice]
    kl: float
    """KL(frozen || decoder), nats."""
    actual: tuple[float, float] | None
    """Probability of the token that follows, by frozen model and decoder; None at the end."""
    features: list[RankedFeature]
    """The strongest; none at position 0, an attention sink that no SAE was trained on."""
    num_active: int
    sink: bool = False
    """Whether it is an attention sink: nothing about it compares with other tokens."""

    @property
    def agree(self) -> bool:
        """Whether both models would say the same."""
        return self.frozen[0].token_id == self.decoder[0].token_id


class Feature(NamedTuple):
    """One active feature of a position."""

    latent: int
    label: str | None
    """None where there is none that may be quoted."""
    activation: float
    """In the SAE's units."""
    effect: float
    """Measured on the decoder: the target less the target without the feature, nats. The target is
    log p of the decoder's most likely token where no other was asked for."""
    normalised: float
    """Activation over the latent's usual high (p99 on the label split); 0 if never seen."""
    confidence: float | None
    """Of the label, quoted or not."""
    unsure_label: str | None
    """A label below the bar of confidence: a guess, to be shown as one."""
    description: str | None = None
    """What is known of a latent without a label that may be quoted."""

    @property
    def quoted(self) -> bool:
        """Whether the label may be quoted as what is known of the latent (pages read it)."""
        return self.label is not None


class FeatureTable(Sequence[Feature]):
    """All active features of one position, strongest first; `pandas.DataFrame` takes it."""

    def __init__(
        self, rows: Sequence[Feature], token: Choice, at: int, minus: Choice | None = None
    ) -> None:
        self._rows = tuple(rows)
        self.token = token
        """What the effects are about, with the decoder's probability: its most likely next token,
        or the one that was asked for."""
        self.at = at
        """The position."""
        self.minus = minus
        """A token whose log p is taken off (`Target.minus_id`)."""

    @overload
    def __getitem__(self, index: int) -> Feature: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Feature]: ...

    def __getitem__(self, index: int | slice) -> Feature | Sequence[Feature]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        less = "" if self.minus is None else f" less {self.minus.token!r}"
        lines = [f"features at {self.at}; effects on {self.token.token!r}{less}, nats"]
        lines += [
            f"#{row.latent:<7} {row.activation:9.3f} {row.effect:+8.3f}  "
            f"{row.label or row.description}"
            for row in self._rows
        ]
        return "\n".join(lines)


class Shift(NamedTuple):
    """One token's probability before and after a change."""

    token: str
    """Raw text."""
    token_id: int
    before: float
    after: float


class Change(NamedTuple):
    """One model before and after an intervention."""

    shifts: list[Shift]
    """The most likely tokens before, those that came to be among them after, and the target's."""
    effect: float
    """The target before less after, nats. The target is log p of the token most likely before
    where no other was asked for: > 0 when the change makes it less likely."""
    moved: list[float]
    """KL(before || after), nats, at position `first` of the intervention and at every later one
    that can move: with a linear decoder none after the last change does."""
    target: tuple[float, float] = (0.0, 0.0)
    """The target before and after, nats."""


class Intervention(NamedTuple):
    """What happens when activations are changed."""

    at: int
    """The position whose predictions `shifts` and `effect` are about."""
    first: int
    """The first position that may differ: the first that was changed."""
    act: float
    """What the changed latents' activations add up to before, in the SAE's units."""
    new_act: float
    """And after."""
    decoder: Change
    frozen: Change
