"""What a label is worth, in words; the numbers behind them stand folded beneath."""

from __future__ import annotations

from rldecoder.interp.records import FeatureLabel, Kind, OutputScores, Scores
from rldecoder.interp.shown import Shown

KINDS: dict[Kind, str] = {
    "input": "It says what the feature fires on. That held on text that was not used to make it.",
    "output": "It says which next tokens the feature makes likelier. That held on text that was "
    "not used to make it.",
    "both": "It says what the feature fires on, and which next tokens it makes likelier. Both held "
    "on text that was not used to make them.",
    "none": "No label held on text that was not used to make it: this is a description.",
}
NO_LABEL = "The run labels its most important features only: this is a description, no label."


def kind_words(feature: FeatureLabel | None, said: Shown) -> str:
    """What sort of statement it is that is shown of a latent."""
    if feature is None:
        return NO_LABEL
    if not said.is_label:
        return KINDS["none"]
    if feature.by_person or feature.kind == "none":
        return "A person stands for it."
    return KINDS[feature.kind]


def worth_words(feature: FeatureLabel, said: Shown, bar: float | None) -> list[str]:
    """How far to trust a label, a sentence each.

    Args:
        bar: least confidence of a label that may be quoted; None: none is safe in this run.
    """
    found = []
    low_bar = (
        "this run knows no confidence that is high enough to quote a label"
        if bar is None
        else f"to be quoted it takes {_percent(bar)}, so it is a guess"
    )
    if said.is_label:
        low, high = feature.confidence_low, feature.confidence_high
        found.append(
            f"The chance that a label with its record holds is {_percent(feature.confidence)} "
            f"({_percent(low)} to {_percent(high)}): "
            + ("it may be quoted." if said.sure else f"{low_bar}.")
        )
    if feature.input is not None and feature.input.text is not None:
        found += _input_words(feature.input.scores)
    if feature.output is not None and feature.output.text is not None:
        found += _output_words(feature.output.scores)
    return found


def _input_words(scores: Scores) -> list[str]:
    found = []
    if scores.precision is not None and scores.recall is not None:
        found.append(
            f"On unseen text the feature fires on {_percent(scores.precision)} of the tokens that "
            f"the input label names, and the label names {_percent(scores.recall)} of the tokens "
            "on which it fires strongly."
        )
    if scores.detection is not None:
        found.append(
            "By the input label alone, pieces of text in which it fires are told from others in "
            f"{_percent(scores.detection)} of cases (guessing: 50 %)."
        )
    return found


def _output_words(scores: OutputScores) -> list[str]:
    return [
        f"Without the feature, the tokens of the output label lose {scores.drop:.2f} nats in the "
        f"frozen model; without another feature of the same length, {scores.other_drop:.2f}.",
        f"They lose more than the tokens of {_percent(scores.auroc)} of the other features do "
        "(guessing: 50 %).",
    ]


def numbers(feature: FeatureLabel) -> list[tuple[str, str]]:
    """Every number of a label by its name, for those who unfold them."""
    rows: list[tuple[str, object]] = [
        ("importance, nats a position", feature.importance),
        ("rank by importance", feature.importance_rank),
        ("share of tokens on which it fires", feature.density),
        ("confidence", feature.confidence),
        ("confidence, lower end", feature.confidence_low),
        ("confidence, upper end", feature.confidence_high),
    ]
    sets: list[tuple[str, Scores | OutputScores]] = []
    if feature.input is not None:
        sets = [("input", feature.input.scores), ("input, weak firings too", feature.input.weak)]
    if feature.output is not None:
        sets.append(("output", feature.output.scores))
    for name, scores in sets:
        rows += [(f"{name}: {key.replace('_', ' ')}", value) for key, value in scores]
    return [(name, _number(value)) for name, value in rows if value is not None]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
