"""The report's table of labels and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rldecoder.dashboard.collect import format_value
from rldecoder.interp.control_gaps import ControlGaps, ScoreSummary
from rldecoder.interp.imported_labels import ImportedLabels
from rldecoder.interp.label_controls import LabelControls

METHODS = {
    "label": "labels of the most important latents",
    "shuffled": "control: shuffled labels",
    "drawn": "labels of latents drawn uniformly",
    "random_sae": "control: random SAE, drawn alike",
}
GAPS = {
    "label_shuffled": "gap: labels above shuffled",
    "drawn_random_sae": "gap: drawn above random SAE",
}
WORDS = {
    "label": "in words, by a language model",
    "shuffled": "in words, control: shuffled labels",
    "drawn": "in words, latents drawn uniformly",
    "random_sae": "in words, control: random SAE, drawn alike",
}
WORD_GAPS = {
    "label_shuffled": "in words, gap: labels above shuffled",
    "drawn_random_sae": "in words, gap: drawn above random SAE",
}
OTHERS = {
    "imported": "labels of others that could be scored",
    "shuffled": "labels of others, control: shuffled",
    "random_sae": "labels of others, control: on a random SAE",
    "ours": "this run's labels of the same latents",
}
OTHERS_OUTPUT = {
    "imported": "labels of others of what the model is made to say",
    "shuffled": "these, control: shuffled",
    "random_sae": "these, control: on a random SAE",
    "ours": "this run's output labels of the same latents",
}
OTHERS_WORDS = {
    "imported": "labels of others in free words, by the judge",
    "shuffled": "these, control: shuffled",
    "random_sae": "these, control: on a random SAE",
    "ours": "this run's labels in words of the same latents",
}
SCORES = {
    "detection": "detection",
    "detection_hard": "on near misses",
    "fuzzing": "fuzzing",
    "fuzzing_hard": "on near misses",
    "intruder": "intruder",
    "simulation": "simulation r",
    "f1": "F1",
    "auprc": "AUPRC",
}
NONE = "–"


def label_columns() -> list[str]:
    """Heads of the columns."""
    return ["labels", "latents", "labelled", "accepted on test", *SCORES.values()]


def label_rows(controls: LabelControls) -> list[list[str]]:
    """One row a method, failures counting 0, with intervals where there are any; then the gaps.

    The same follows of labels in words, if there are any: their scores are a judge's answers about
    some windows, and not to be compared with those of the rows above.
    """
    rows = [
        _row(shown, found, found.accepted)
        for name, shown in METHODS.items()
        if (found := controls.methods.get(name)) is not None
    ]
    rows += _gap_rows(controls.gaps, GAPS)
    llm = controls.llm
    if llm is None:
        return rows

    # Of these the judge saw other labels: they have means and no more.
    shuffled = [format_value(llm.shuffled_latents)] * 2 + [NONE]
    shuffled += [_number(llm.means_shuffled.get(name), None) for name in SCORES]
    rows += [_row(WORDS["label"], llm, None), [WORDS["shuffled"], *shuffled]]
    rows += [
        _row(WORDS[name], llm.controls[name], None)
        for name in ("drawn", "random_sae")
        if name in llm.controls
    ]
    return rows + _gap_rows(llm.gaps, WORD_GAPS)


def imported_rows(imported: ImportedLabels | None) -> list[list[str]]:
    """Labels of others beside their controls; a label that could not be read is in no mean."""
    if imported is None:
        return []
    rows = []
    for name, shown in OTHERS.items():
        found = imported.methods[name]
        counts = [format_value(imported.latents if name == "imported" else found.latents)]
        counts += [format_value(found.latents), format_value(found.accepted)]
        scores = [_number(found.means.get(score), None) for score in SCORES]
        rows.append([shown, *counts, *scores])
    # The columns are of scores of the input: what there is of outputs stands in the name.
    for name, shown in OTHERS_OUTPUT.items():
        said = imported.outputs.get(name)
        if said is not None and imported.outputs["imported"].latents:
            counts = [format_value(said.latents)] * 2 + [format_value(said.accepted)]
            auroc = _number(said.means.get("auroc"), None)
            rows.append([f"{shown}: mean AUROC {auroc}", *counts, *[NONE] * len(SCORES)])
    # Judged by a judge that is not to be believed, they say so, and none is accepted.
    believed = imported.judge is None or imported.judge.trusted
    for name, shown in OTHERS_WORDS.items():
        judged = imported.words.get(name)
        if judged is not None:
            accepted = format_value(judged.accepted) if believed else NONE
            counts = [*[format_value(judged.latents)] * 2, accepted]
            scores = [_number(judged.means.get(score), None) for score in SCORES]
            rows.append([shown + ("" if believed else " (not trusted)"), *counts, *scores])
    for why, count in imported.unscored.items():
        nothing = [NONE] * (2 + len(SCORES))
        rows.append([f"labels of others without scores: {why}", format_value(count), *nothing])
    return rows


def _row(shown: str, found: ScoreSummary, accepted: int | None) -> list[str]:
    counts = [format_value(found.latents), format_value(found.labelled)]
    counts.append(NONE if accepted is None else format_value(accepted))
    scores = [_number(found.means.get(name), found.intervals.get(name)) for name in SCORES]
    return [shown, *counts, *scores]


def _gap_rows(gaps: ControlGaps, names: Mapping[str, str]) -> list[list[str]]:
    """Those that there are."""
    pairs = {"label_shuffled": gaps.label_shuffled, "drawn_random_sae": gaps.drawn_random_sae}
    rows = []
    for name, shown in names.items():
        by_score = pairs[name]
        if by_score:
            found = [by_score.get(score) for score in SCORES]
            shares = [
                NONE if gap is None else _number(gap.difference, (gap.low, gap.high))
                for gap in found
            ]
            rows.append([shown, NONE, NONE, NONE, *shares])
    return rows


def _number(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return NONE
    ends = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.2f}{ends}"
