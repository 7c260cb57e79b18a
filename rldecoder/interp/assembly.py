"""The records of `feature_labels.json`, from labels of both kinds, their scores and confidences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.interp.example_pass import PassResult
from rldecoder.interp.examples import contrasts, top_examples
from rldecoder.interp.kind_confidence import Picked
from rldecoder.interp.kinds import Accepted, BothKinds
from rldecoder.interp.labelling import Confidences
from rldecoder.interp.output_sets import OutputSet
from rldecoder.interp.records import (
    FeatureLabel,
    InputLabel,
    OtherLabel,
    OutputLabel,
    TokenEffect,
    TokenGain,
)
from rldecoder.interp.set_names import name_set, show_set
from rldecoder.interp.shown import described
from rldecoder.interp.vocabulary import Vocabulary

INPUT_LABELER, OUTPUT_LABELER = "predicate-1", "ablation-1"


class Material(NamedTuple):
    """What records are made of; rows as in the firings."""

    found: BothKinds
    passed: Accepted
    inputs: Confidences
    outputs: Confidences
    picked: Picked
    highs: NDArray[np.float64]
    """[K] usual highs."""
    importance: NDArray[np.float64]
    examples: PassResult
    effects: Sequence[tuple[list[TokenEffect], list[TokenEffect]]]
    """Of each latent, what the decoder's row raises and lowers."""
    vocabulary: Vocabulary
    phrases: Sequence[str | None]
    """What MiniLM calls each output set, where it was asked."""
    strong_share: float
    output_share: float
    num_shown: int


def records(
    material: Material, tau: float | None, audit: Collection[int], others: Mapping[int, OtherLabel]
) -> list[FeatureLabel]:
    """One record a latent, most important first.

    Args:
        tau: least confidence of a label of high confidence; None: no threshold is safe enough.
        audit: latents drawn for the audit.
        others: labels in words, by latent.
    """
    m = material
    strongest = top_examples(m.examples.table, m.vocabulary, m.num_shown)
    contrasting = contrasts(m.examples.table, m.vocabulary) if m.num_shown else {}
    peaks = top_examples(m.examples.table, m.vocabulary, m.examples.table.num_rows)
    out = []
    for row, (latent, kind) in enumerate(
        zip(m.found.latents.tolist(), m.passed.kinds(), strict=True)
    ):
        says_input, says_output = input_label(m, row), output_label(m, row)
        shown_input = kind in ("input", "both")
        shown_output = kind in ("output", "both")
        if kind == "none":
            shown_output = bool(m.picked.output[row]) or says_input.text is None
            shown_input = not shown_output
        # Of two labels that pass, the likelier one comes first, and its confidence counts.
        first_output = shown_output and (not shown_input or bool(m.picked.output[row]))
        texts = [says_input.text] * shown_input + [says_output.text] * shown_output
        words = [text for text in (texts[::-1] if first_output else texts) if text is not None]
        sure = m.outputs if first_output else m.inputs
        label = "; ".join(words) or None
        p, low, high = (float(values[row]) for values in sure[:3])
        failure = None
        if label is None:
            failure = f"input: {says_input.failure}; output: {says_output.failure}"

        promoted, suppressed = m.effects[row]
        fires_on = [example.tokens[example.focus] for example in peaks.get(latent, [])]
        raised = [gain.token for gain in says_output.raised] or [t.token for t in promoted]
        out.append(
            FeatureLabel(
                latent=latent,
                status="failed" if label is None else "labelled",
                kind=kind,
                label=label,
                description=described(fires_on, raised),
                input=says_input,
                output=says_output,
                failure=failure,
                predicate=says_input.predicate if shown_input else None,
                labeler=OUTPUT_LABELER if first_output else INPUT_LABELER,
                confidence=p,
                confidence_low=low,
                confidence_high=high,
                high_confidence=label is not None and tau is not None and p >= tau,
                importance=float(m.importance[row]),
                importance_rank=row + 1,
                density=float(m.examples.density[row]),
                scores=says_input.scores,
                examples=strongest.get(latent, []),
                contrasts=contrasting.get(latent, []),
                promoted=promoted,
                suppressed=suppressed,
                audit=latent in audit,
                other_labels=[others[latent]] if latent in others else [],
            )
        )
    return out


def input_label(material: Material, row: int) -> InputLabel:
    """What a latent fires strongly on."""
    m = material
    draft, scores = m.found.inputs.drafts[row], m.found.inputs.scores[row]
    text = None
    if draft.text is not None:
        text = f"fires strongly ({m.strong_share:g} of its usual high or more) where {draft.text}"
    high = float(m.highs[row])
    return InputLabel(
        text=text, failure=draft.failure, predicate=draft.predicate, share=m.strong_share,
        usual_high=high if np.isfinite(high) else None, scores=scores.published,
        weak=m.found.weak[row].published, confidence=float(m.inputs.p[row]),
        accepted=bool(m.passed.inputs[row]),
    )  # fmt: skip


def output_label(material: Material, row: int) -> OutputLabel:
    """What a latent raises in the frozen model."""
    m = material
    held = m.found.outputs.sets[row]
    name, text = output_words(held, m.vocabulary, m.phrases[row])
    return OutputLabel(
        text=text,
        failure=held.failure,
        name=name,
        raised=_gains(held.tokens, held.gains, m.vocabulary),
        lowered=_gains(held.lowered, held.lowered_by, m.vocabulary),
        places=held.places,
        documents=held.documents,
        share=m.output_share,
        scores=m.found.outputs.scores[row],
        confidence=float(m.outputs.p[row]),
        accepted=bool(m.passed.outputs[row]),
    )


def output_words(
    held: OutputSet, vocabulary: Vocabulary, phrase: str | None
) -> tuple[str | None, str | None]:
    """Name and label of an output set; `phrase` names one that no class or affix covers."""
    if held.failure:
        return None, None
    name = name_set(held.tokens, held.gains, vocabulary)
    if name is None and phrase is not None:
        name = f"{phrase} (by MiniLM)"
    shown = show_set(held.tokens, vocabulary)
    return name, f"raises {shown}" if name is None else f"raises {name}: {shown}"


def _gains(
    tokens: Sequence[int], gains: Sequence[float], vocabulary: Vocabulary
) -> list[TokenGain]:
    return [
        TokenGain(token=vocabulary.texts[token], token_id=token, gain=gain)
        for token, gain in zip(tokens, gains, strict=True)
    ]
