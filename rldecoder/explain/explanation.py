"""One explained prediction: what it holds, as plain values, and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from rldecoder.explain.claims import CheckedClaim, Verdict, claim_sentence
from rldecoder.explain.ranking import RankedFeature
from rldecoder.explain.text import visible_text, visible_token

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
        """Plain values, as in `examples.json`."""
        value = asdict(self)
        value["ranked"] = [
            {**feature._asdict(), "quoted": feature.quoted} for feature in self.ranked
        ]
        for claim, checked in zip(value["claims"], self.claims, strict=True):
            claim["sentence"] = claim_sentence(checked.claim)
            claim["claim"]["quoted"] = checked.claim.label is not None
        return value


def render_explanation(explanation: Explanation) -> RenderableType:
    """An explanation for the terminal. Nothing in token text can act on it."""
    return render_example(explanation.to_json())


def render_example(example: Mapping[str, Any]) -> RenderableType:
    """The same from the plain values of `examples.json`."""
    # Text objects take no markup, and visible_text leaves no control character in them.
    prompt = example["prompt"]
    if len(prompt) > SHOWN_PROMPT_CHARACTERS:
        prompt = "…" + prompt[-SHOWN_PROMPT_CHARACTERS:]
    lines: list[RenderableType] = [
        Text(visible_text(prompt, SHOWN_PROMPT_CHARACTERS + 1), style="italic"),
        Text(),
        _side_by_side(example["frozen"], example["decoder"]),
        Text(f"KL(frozen || decoder) {example['kl']:.3f} nats", style="dim"),
        Text(),
        Text.assemble(("A  ", "bold"), example["method_a"]),
        Text(),
    ]
    if not example["claims"]:
        lines.append(Text.assemble(("B  ", "bold"), example["method_b"]))
    for place, claim in enumerate(example["claims"], start=1):
        lines.append(_claim_line(place, claim))
    sanity = example["sanity"]
    if sanity is not None:
        lines.append(
            Text(
                f"removing all claimed features: {sanity['claimed_removed']:+.2f} nats measured, "
                f"{sanity['claimed_predicted']:+.2f} predicted from the claims; as many others: "
                f"{sanity['others_removed']:+.2f}",
                style="dim",
            )
        )
    return Panel(Group(*lines), title="explanation", title_align="left", border_style="dim")


def _side_by_side(frozen: Mapping[str, Any], decoder: Mapping[str, Any]) -> Table:
    """Both models' first choices, a rank a row."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for who in ("frozen model", "decoder"):
        table.add_column(who, header_style="dim", no_wrap=True)
    for place, choices in enumerate(zip(frozen["top"], decoder["top"], strict=True)):
        table.add_row(
            *(
                Text(f"{p:.2f}  {visible_token(token, 30)}", style="bold" if place == 0 else "")
                for token, p in choices
            )
        )
    return table


def _claim_line(place: int, checked: Mapping[str, Any]) -> Text:
    verdict: Verdict = checked["verdict"]
    frozen = checked["frozen_effect"]
    measured = f"measured {checked['effect']:+.2f} nats (chance {checked['claim']['noise']:.2f})"
    if frozen is not None:
        measured += f", frozen model {frozen:+.2f} (chance {checked['frozen_noise']:.2f})"
    return Text.assemble(
        (f"B{place} ", "bold"),
        f"{checked['sentence']} ",
        (f"[{verdict}: {measured}]", VERDICT_STYLE[verdict]),
    )
