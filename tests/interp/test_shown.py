"""What interfaces say of latents: labels that passed, and descriptions that say what they are."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch

from rldecoder.data.activations import ActivationBatch
from rldecoder.explain.inputs import label_texts
from rldecoder.interp.descriptions import DESCRIPTIONS, KEPT, StrongestTokens
from rldecoder.interp.records import FeatureLabel
from rldecoder.interp.shown import UNKNOWN, ShownLatents, described, shown
from rldecoder.sae.model import SparseLatents
from tests.interp.test_records import feature, labels

WEAK = {"label": "token is made of letters", "kind": "none", "confidence": 0.0,
        "confidence_low": 0.0}  # fmt: skip


def test_a_label_that_passed_is_shown() -> None:
    said = shown(feature(kind="output", high_confidence=True))
    assert said == ("token is a number", True, True, 0.7, None)
    unsure = shown(feature(kind="input", description='raises "b"'))
    assert (unsure.sure, unsure.instead) == (False, 'no sure label; raises "b"')


@pytest.mark.parametrize(
    "weak", [WEAK, {"label": None, "status": "failed", "failure": "too few", "predicate": None}]
)
def test_what_passed_no_test_is_a_description(weak: dict[str, object]) -> None:
    found = feature(**weak, description='fires most strongly on "a"; raises "b"')
    said = shown(found)
    assert said.text == 'not labelled; fires most strongly on "a"; raises "b"'
    assert (said.is_label, said.sure, said.confidence) == (False, False, None)
    # A record without one still has tokens to name.
    assert shown(feature(**weak)).text == 'not labelled; raises "</script>"'


def test_people_stand_for_a_label() -> None:
    assert shown(feature(kind="none", labeler="person:ann")).is_label
    yes = {"reviewer": "ann", "accept": True, "shown": "token is a number"}
    assert shown(feature(kind="none", reviews=[yes])).is_label
    no = {**yes, "accept": False}
    assert not shown(feature(kind="none", reviews=[yes, no])).is_label
    other = {**yes, "shown": "something else"}
    assert not shown(feature(kind="none", reviews=[other])).is_label


def all_latents() -> tuple[list[FeatureLabel], pa.Table]:
    rows = [
        {"latent": 5, "fires_on": ["x"], "raises": ["y"]},
        {"latent": 9, "fires_on": [" cat", "cat", "\u202e"], "raises": [" sat", "\n"]},
    ]
    return [feature()], pa.Table.from_pylist(rows, DESCRIPTIONS)


def test_every_latent_of_the_dictionary_has_words() -> None:
    features, table = all_latents()
    said = ShownLatents(labels(features), table)
    assert said.latents == [5, 9]
    assert said.of(5).is_label
    assert said.of(9).text == (
        'not labelled; fires most strongly on "cat", "\\u202e"; points to "sat", "\\n"'
    )
    assert said.of(1234) == UNKNOWN
    assert ShownLatents(labels(features)).of(9) == UNKNOWN  # files of older programs
    texts = label_texts(labels([feature(**WEAK), feature(latent=6)]), table)
    assert texts[5].text is None
    assert texts[5].description.startswith("not labelled; ")
    assert texts[6].text == "token is a number"
    assert texts[9].description == said.of(9).text


def test_strongest_tokens_are_those_of_all_the_text() -> None:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(0, 30, (500,), generator=generator)
    indices = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(500)])
    acts = torch.rand(500, 4, generator=generator).clamp_min(0.2) - 0.2
    found = StrongestTokens(12)
    for rows in torch.arange(500).split(37):
        none = torch.zeros(len(rows), dtype=torch.long)
        found.add(
            ActivationBatch(none, none, token[rows], None, None),
            SparseLatents(acts[rows], indices[rows]),
        )
    for latent in range(12):
        best: dict[int, float] = {}
        for row, slot in (indices == latent).nonzero().tolist():
            act = float(acts[row, slot])
            if act > 0:
                best[int(token[row])] = max(act, best.get(int(token[row]), 0.0))
        expected = sorted(best, key=lambda t: (-best[t], t))[:KEPT]
        assert found.tokens()[latent] == expected


def test_a_description_of_nothing_says_so() -> None:
    assert described([], []) == "fires on none of the text that was read"
    assert described([], ["a"]) == 'raises "a"'
