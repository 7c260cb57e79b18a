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

from rldecoder.explain.claims import CheckedClaim, Verdict, claim_sentence
from rldecoder.explain.ranking import RankedFeature
from rldecoder.schemas import JsonFile, write_json
from rldecoder.visible_text import visible_text, visible_token

SHOWN_PROMPT_CHARACTERS = 600
VERDICT_STYLE: dict[Verdict, str] = {
    "supported": "green",
    "decoder only": "yellow",
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
    """What removing the claimed features does, beside removing others: nats of log p."""

    claimed_removed: float
    """Measured effect of removing all claimed features at once."""
    claimed_predicted: float
    """What the reconstructor says about it, from the claims alone."""
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

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in `examples.json`: all fields, and what follows from them in words."""
        value = asdict(self)
        for plain, feature in zip(value["ranked"], self.ranked, strict=True):
            plain["quoted"] = feature.quoted
        for plain, checked in zip(value["claims"], self.claims, strict=True):
            plain["sentence"] = claim_sentence(checked.claim)
            plain["claim"]["quoted"] = checked.claim.label is not None
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

    lines: list[RenderableType] = [
        Text(visible_text(prompt, SHOWN_PROMPT_CHARACTERS + 1), style="italic"),
        Text(),
        predictions,
        Text(f"KL(frozen || decoder) {explanation.kl:.3f} nats", style="dim"),
        Text(),
        Text.assemble(("A  ", "bold"), explanation.method_a),
        Text(),
    ]
    # Method B says so where it makes no claim.
    if not explanation.claims:
        lines.append(Text.assemble(("B  ", "bold"), explanation.method_b))
    for place, checked in enumerate(explanation.claims, start=1):
        lines.append(_claim_line(place, checked))
    sanity = explanation.sanity
    if sanity is not None:
        lines.append(
            Text(
                f"removing all claimed features: {sanity.claimed_removed:+.2f} nats measured, "
                f"{sanity.claimed_predicted:+.2f} predicted from the claims; as many others: "
                f"{sanity.others_removed:+.2f}",
                style="dim",
            )
        )
    return Panel(Group(*lines), title="explanation", title_align="left", border_style="dim")


def _claim_line(place: int, checked: CheckedClaim) -> Text:
    measured = f"measured {checked.effect:+.2f} nats (chance {checked.claim.noise:.2f})"
    if checked.frozen_effect is not None:
        measured += (
            f", frozen model {checked.frozen_effect:+.2f} (chance {checked.frozen_noise:.2f})"
        )
    return Text.assemble(
        (f"B{place} ", "bold"),
        f"{claim_sentence(checked.claim)} ",
        (f"[{checked.verdict}: {measured}]", VERDICT_STYLE[checked.verdict]),
    )
