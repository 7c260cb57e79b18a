"""Labels are words beside the claims: renaming them must change no claim, verdict or score."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rldecoder.explain.claim_scores import Renaming
from rldecoder.explain.explanation import Explanation
from rldecoder.explain.inputs import LabelText


def renamed_labels(labels: Mapping[int, LabelText], seed: int) -> dict[int, LabelText]:
    """The same labels dealt out anew over the latents, each with a new word in it."""
    texts = [
        label._replace(text=_renamed(label.text), description=_renamed(label.description))
        for _, label in sorted(labels.items())
    ]
    random.Random(seed).shuffle(texts)
    return dict(zip(sorted(labels), texts, strict=True))


def _renamed(words: str | None) -> str | None:
    return None if words is None else f"renamed {words}"


def count_unchanged(
    examples: Sequence[Explanation], explain: Callable[[str], Explanation]
) -> Renaming:
    """In how many examples nothing but words changes.

    Args:
        explain: explains a prompt with the renamed labels.
    """
    same = [without_words(explain(one.prompt)) == without_words(one) for one in examples]
    return Renaming(num_examples=len(same), num_unchanged=sum(same))


def without_words(explanation: Explanation) -> dict[str, Any]:
    """All that an explanation says except in words: predictions, claims, verdicts, effects.

    Left out are label texts, descriptions, confidences, and the sentences that quote them.
    """
    value = explanation.to_json()
    del value["method_a"], value["method_b"]
    for feature in value["ranked"]:
        for name in ("label", "unsure_label", "description", "confidence", "quoted"):
            del feature[name]
    for checked in value["claims"]:
        del checked["sentence"]
        for name in ("label", "label_confidence", "description", "quoted"):
            del checked["claim"][name]
    return value
