"""The report's first sentences, in words and numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from rldecoder.dashboard.opening import faithful, meaning, not_to_believe, rl_changed, sources
from rldecoder.interp.kinds import Accepted, coverages
from tests.interp.test_records import feature, labels


def faithfulness(**changes: float) -> Any:
    values = {"kl": 0.274, "kl_low": 0.25, "kl_high": 0.3, "agreement": 0.736}
    return SimpleNamespace(**(values | changes))


def comparison(**changes: object) -> Any:
    values = {
        "score_difference": -0.08, "score_low": -0.17, "score_high": 0.02, "kl_difference": -0.0381,
        "kl_low": -0.05, "kl_high": -0.03, "beaten": False,
    }  # fmt: skip
    return SimpleNamespace(**(values | changes))


def test_faithfulness_is_of_text_like_this() -> None:
    said = faithful(faithfulness(), faithfulness(kl=0.61, agreement=0.5))
    assert said == (
        "on text like this (test split) its predictions lie KL 0.27 [0.25, 0.30] nats per token "
        "from the frozen model's, and its first choice is the same for 74 % of tokens; on other "
        "text (ood split) KL 0.61 and 50 %."
    )
    assert "other text" not in faithful(faithfulness(), None)
    assert faithful(None, None) == "not measured."


def test_a_loss_is_no_gain_of_minus_something() -> None:
    said = rl_changed(comparison(), "fail")
    assert "task score -0.08 [-0.17, +0.02] and KL +0.038 [+0.030, +0.050]" in said
    assert "no clear change; the controls were not beaten." in said
    assert "higher" not in said
    assert "a loss" in rl_changed(comparison(score_high=-0.01), "fail")
    gain = rl_changed(comparison(score_difference=0.1, score_low=0.02, beaten=True), "pass")
    assert "a clear gain; the controls were beaten." in gain
    assert rl_changed(None, "fail") == "what it changed was not measured."


def test_labels_that_held_stand_beside_the_control_and_the_sure_ones() -> None:
    found = labels(
        [feature(kind="both", high_confidence=True), feature(kind="output"), feature(kind="none")]
    )
    said = meaning(found, None)
    assert said.startswith("2 of 3 examined features have a label that held on text")
    assert "(21 to 94 % of such features would, 95 %), 1 a sure one;" in said
    none, all_four = np.zeros(4, bool), np.ones(4, bool)
    accepted = {name: Accepted(none, all_four) for name in ("label", "shuffled", "drawn")}
    beside = coverages(accepted | {"random_sae": Accepted(none, np.arange(4) < 1)})
    assert "95 %; of an untrained SAE's 25 %), 1 a sure one" in meaning(found, beside)


def test_what_not_to_believe_names_what_was_missed() -> None:
    targets: Any = [SimpleNamespace(name=f"Target {i}", met=i % 2 == 0) for i in range(12)]
    said = not_to_believe(targets, faithfulness())
    assert said.startswith("what rests on the 6 of 12 targets that are missed (target 1; target 3;")
    assert "and 2 more" in said
    sae: Any = [SimpleNamespace(name="SAE: mean L0", met=False)]
    assert "(SAE: mean L0)" in not_to_believe(sae, None)
    assert "text unlike it" in said
    assert "not measured" in not_to_believe(targets[:1], None)
    assert "missed" not in not_to_believe(targets[:1], None)


def test_the_largest_sources_are_named_and_inert() -> None:
    counts = {"a": 5, "b\u202e": 50, "c": 7, "d": 1, "e": 9}
    found: Any = {name: SimpleNamespace(tokens=n) for name, n in counts.items()}
    said = sources(found)
    assert said.endswith(", e, c and 2 more sources")
    assert "\u202e" not in said
