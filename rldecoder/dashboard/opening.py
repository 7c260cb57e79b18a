"""The report's first five sentences: what was decoded, how faithfully, what RL changed, which
features mean something, and what not to believe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rldecoder.evals.comparison import RL, SUPERVISED
from rldecoder.evals.statistics import wilson_interval
from rldecoder.visible_text import visible_text

if TYPE_CHECKING:
    from rldecoder.data.provenance import SourceProvenance
    from rldecoder.decoder.faithfulness import Faithfulness
    from rldecoder.evals.targets import TargetRow
    from rldecoder.interp.kinds import Coverages
    from rldecoder.interp.records import FeatureLabels
    from rldecoder.rl.controls import Comparison
    from rldecoder.stages.inputs import ReportInputs

_SHOWN_SOURCES = 3
_SHOWN_TARGETS = 4


class Sentence(NamedTuple):
    """One of the five."""

    about: str
    """Its first word or two, set apart."""
    text: str


def five_sentences(inputs: ReportInputs) -> list[Sentence]:
    """What somebody with three minutes must know; all texts have passed `visible_text`."""
    corpus, meta = inputs.corpus.provenance, inputs.cache.meta
    model = visible_text(inputs.model.record.name or meta.model_name, 80)
    train = corpus.splits["train"].tokens
    text = f"{train:,} tokens of {sources(corpus.sources)}"
    decoded = f"{model}, after block {meta.hook_layer} of {meta.num_layers}, from {text}."

    # The published decoder's own numbers; the other one's stand in the tables.
    which = RL if inputs.final.freeze.which == "ppo" else SUPERVISED
    splits = {name: inputs.evaluation.faithfulness[name].get(which) for name in ("test", "ood")}
    control = next(
        (one for one in inputs.controls.record.comparisons if one.control == SUPERVISED), None
    )
    return [
        Sentence("Decoded:", decoded),
        Sentence("Faithful:", faithful(splits["test"], splits["ood"])),
        Sentence("RL:", rl_changed(control, inputs.controls.record.verdict)),
        Sentence(
            "Meaning:",
            meaning(inputs.labels.labels, inputs.labels.controls.coverage),
        ),
        Sentence("Do not believe:", not_to_believe(inputs.evaluation.targets.root, splits["ood"])),
    ]


def meaning(labels: FeatureLabels, found: Coverages | None) -> str:
    """How many features have a label that passed, beside the control, and how many a sure one."""
    held = sum(feature.kind != "none" for feature in labels.features)
    sure = sum(feature.high_confidence for feature in labels.features)
    interval = wilson_interval(held, len(labels.features))
    control = None if found is None else found.methods["random_sae"].coverage.value
    beside = "" if control is None else f"; of an untrained SAE's {100 * control:.0f} %"
    return (
        f"{held} of {len(labels.features)} examined features have a label that held on text it was "
        f"not made from ({100 * interval.low:.0f} to {100 * interval.high:.0f} % of such features "
        f"would, 95 %{beside}), {sure} a sure one; of all others only what they fire on and raise "
        "is known."
    )


def sources(found: Mapping[str, SourceProvenance]) -> str:
    """The largest sources of a corpus by name, and how many there are beside."""
    by_size = sorted(found, key=lambda name: -found[name].tokens)
    shown = [visible_text(name, 60) for name in by_size[:_SHOWN_SOURCES]]
    more = len(by_size) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more sources" if more > 0 else "")


def faithful(test: Faithfulness | None, ood: Faithfulness | None) -> str:
    """How close the published decoder is to the frozen model, on text like this and on other."""
    if test is None:
        return "not measured."
    said = (
        f"on text like this (test split) its predictions lie KL {test.kl:.2f} "
        f"[{test.kl_low:.2f}, {test.kl_high:.2f}] nats per token from the frozen model's, and its "
        f"first choice is the same for {100 * test.agreement:.0f} % of tokens"
    )
    if ood is not None:
        said += f"; on other text (ood split) KL {ood.kl:.2f} and {100 * ood.agreement:.0f} %"
    return said + "."


def rl_changed(against_start: Comparison | None, verdict: str) -> str:
    """What PPO did to the decoder that it started from, with intervals."""
    if against_start is None:
        return "what it changed was not measured."
    one = against_start
    # Differences of KL are kept as what was won; here they are told as what was added.
    kl, low, high = -one.kl_difference, -one.kl_high, -one.kl_low
    clear = "a clear gain" if one.beaten else "no clear change"
    if one.score_high < 0:
        clear = "a loss"
    return (
        f"against the decoder that it started from, task score {one.score_difference:+.2f} "
        f"[{one.score_low:+.2f}, {one.score_high:+.2f}] and KL {kl:+.3f} [{low:+.3f}, "
        f"{high:+.3f}] nats per token on control_ppo's prompts and text: {clear}; the controls "
        f"{'were beaten' if verdict == 'pass' else 'were not beaten'}."
    )


def _inside(name: str) -> str:
    """A name as it stands inside a sentence; `SAE` and `KL` stay as they are."""
    return name if name[1:2].isupper() else name[:1].lower() + name[1:]


def not_to_believe(targets: Sequence[TargetRow], ood: Faithfulness | None) -> str:
    """Which of the page's subjects fall short of the plan."""
    missed = [_inside(row.name) for row in targets if row.met is False]
    parts = []
    if missed:
        shown = "; ".join(missed[:_SHOWN_TARGETS])
        more = len(missed) - _SHOWN_TARGETS
        parts.append(
            f"what rests on the {len(missed)} of {len(targets)} targets that are missed ({shown}"
            + (f"; and {more} more" if more > 0 else "")
            + ")"
        )
    parts.append("labels called unsure, claims below their noise")
    if ood is None:
        parts.append("anything about other text, which was not measured")
    else:
        parts.append("numbers of text like this for text unlike it")
    return visible_text(", ".join(parts) + ".", 600)
