"""What is said about one prediction: as data, in `examples.json`, and in the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import RootModel
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rldecoder.explain.claims import (
    CheckedClaim,
    Verdict,
    claim_sentence,
    measured_text,
    prediction_text,
)
from rldecoder.explain.ranking import RankedFeature, ranking_rows
from rldecoder.schemas import JsonFile, write_json
from rldecoder.visible_text import visible_text, visible_token

SHOWN_PROMPT_CHARACTERS = 600
SHOWN_REASONS = 3
"""Claims that are read before a reader asks for all."""
VERDICT_STYLE: dict[Verdict, str] = {
    "supported": "green",
    "contradicted": "red",
    "too small to tell": "yellow",
}


@dataclass(frozen=True)
class Prediction:
    """The next-token distribution of one model, as far as a reader needs it."""

    token: str
    token_id: int
    probability: float
    top: tuple[tuple[str, float], ...]
    """The most likely tokens with their probabilities, the first included."""


@dataclass(frozen=True)
class Sanity:
    """What removing the claimed features does to the frozen model, beside others: nats of log p."""

    claimed_removed: float
    """Measured effect of removing all claimed features at once."""
    claimed_predicted: float
    """What the claims add up to."""
    others_removed: float
    """Measured effect of removing as many of the active features that no claim names."""


@dataclass(frozen=True)
class Explanation:
    """Everything that is shown about one prediction. Token text in it is raw, not escaped."""

    prompt: str
    tokens: tuple[str, ...]
    frozen: Prediction
    decoder: Prediction
    kl: float
    """KL(frozen || decoder) at this position, nats."""
    method_a: str
    ranked: tuple[RankedFeature, ...]
    claims: tuple[CheckedClaim, ...]
    method_b: str
    sanity: Sanity | None
    """None when no claim is made."""

    @property
    def says(self) -> str:
        """Method B's first sentence: what is expected, and how many reasons there are."""
        claims = [checked.claim for checked in self.claims]
        return prediction_text(self.frozen.token, self.frozen.probability, claims)

    @property
    def reasons(self) -> tuple[CheckedClaim, ...]:
        """The claims that are shown first: those that held, then the others, the largest first."""

        def first(checked: CheckedClaim) -> tuple[bool, float]:
            return checked.verdict != "supported", -checked.claim.strength

        return tuple(sorted(self.claims, key=first)[:SHOWN_REASONS])

    @property
    def tested(self) -> str:
        """What came out of the tests, in words; empty when no claim is made."""
        if self.sanity is None:
            return ""
        held = sum(checked.verdict == "supported" for checked in self.claims)
        agree = sum(
            checked.decoder_effect * (1 if checked.claim.direction == "supports" else -1) > 0
            for checked in self.claims
        )
        return (
            f"Tested by taking each feature out of the frozen model: {held} of "
            f"{len(self.claims)} claims hold. The decoder moves the same way in {agree}. Without "
            f"all of these features log p changes by {-self.sanity.claimed_removed:+.2f} nats (the "
            f"claims add up to {-self.sanity.claimed_predicted:+.2f}). Without as many others it "
            f"changes by {-self.sanity.others_removed:+.2f}."
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `examples.json`: all fields, and what follows from them in words."""
        value = asdict(self)
        for plain, feature in zip(value["ranked"], self.ranked, strict=True):
            plain["quoted"] = feature.quoted
        for plain, checked in zip(value["claims"], self.claims, strict=True):
            plain["sentence"] = claim_sentence(checked.claim)
            plain["claim"]["quoted"] = checked.claim.label is not None
        value["tested"] = self.tested
        return value


class ExampleExplanations(JsonFile, RootModel[tuple[Explanation, ...]]):
    """The predictions that a run shows as examples."""

    def save(self, path: Path) -> None:
        """Write them as JSON, sentences included."""
        write_json(path, [explanation.to_json() for explanation in self.root])


def render_explanation(explanation: Explanation) -> RenderableType:
    """An explanation for the terminal. Nothing in token text can act on it."""
    # Text objects take no markup, and visible_text leaves no control character in them.
    prompt = explanation.prompt
    if len(prompt) > SHOWN_PROMPT_CHARACTERS:
        prompt = "…" + prompt[-SHOWN_PROMPT_CHARACTERS:]
    predictions = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for who in ("frozen model", "decoder"):
        predictions.add_column(who, header_style="dim", no_wrap=True)
    both = zip(explanation.frozen.top, explanation.decoder.top, strict=True)
    for rank, choices in enumerate(both):
        predictions.add_row(
            *(
                Text(f"{p:.2f}  {visible_token(token, 30)}", style="bold" if rank == 0 else "")
                for token, p in choices
            )
        )
    active = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("A", "of its usual high", "active here"):
        active.add_column(name, header_style="bold" if name == "A" else "dim")
    for row in ranking_rows(explanation.ranked):
        active.add_row(*map(Text, row))

    lines: list[RenderableType] = [
        Text(visible_text(prompt, SHOWN_PROMPT_CHARACTERS + 1), style="italic"),
        Text(),
        predictions,
        Text(f"KL(frozen || decoder) {explanation.kl:.3f} nats", style="dim"),
        Text(),
        active if explanation.ranked else Text.assemble(("A  ", "bold"), explanation.method_a),
        Text(),
        Text.assemble(("B  ", "bold"), explanation.says),
    ]
    for place, checked in enumerate(explanation.reasons, start=1):
        lines.append(_claim_line(place, checked))
    left_out = len(explanation.claims) - len(explanation.reasons)
    if left_out:
        more = "One more claim" if left_out == 1 else f"{left_out} more claims"
        lines.append(Text(f"{more}: with --html or --json.", style="dim"))
    if explanation.tested:
        lines.append(Text(explanation.tested, style="dim"))
    return Panel(Group(*lines), title="explanation", title_align="left", border_style="dim")


def _claim_line(place: int, checked: CheckedClaim) -> Text:
    return Text.assemble(
        (f"B{place} ", "bold"),
        f"{claim_sentence(checked.claim)} ",
        (f"[{checked.verdict}: {measured_text(checked)}]", VERDICT_STYLE[checked.verdict]),
    )
