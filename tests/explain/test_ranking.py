"""Method A: deterministic, normalised, and never a claim about causes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rldecoder.explain.inputs import LabelText
from rldecoder.explain.ranking import (
    activation_scales,
    rank_active,
    ranking_rows,
    ranking_text,
)

CAUSAL_WORDS = ("because", "cause", "due to", "leads to", "so that", "therefore", "since")

acts_lists = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=12)


def test_scales_are_p99_or_the_maximum_of_few() -> None:
    generator = np.random.default_rng(0)
    many, few = generator.exponential(size=500), np.array([0.5, 3.0, 1.0])
    acts = torch.from_numpy(np.concatenate([many, few, [0.0]]).astype(np.float32))
    indices = torch.tensor([4] * 500 + [1] * 3 + [2])
    scales = activation_scales(indices, acts, 6)
    expected = np.quantile(many.astype(np.float32), 0.99, method="inverted_cdf")
    assert scales.tolist() == [0, 3.0, 0, 0, expected, 0]


@given(acts_lists, st.randoms(use_true_random=False))
def test_text_depends_on_the_set_alone(acts: list[float], random: object) -> None:
    latents = list(range(len(acts)))
    scales = torch.linspace(0, 2, len(acts))
    labels = {0: LabelText("digits", 0.8, True), 1: LabelText(None, 0.0)}

    def text(order: list[int]) -> str:
        ranked = rank_active(
            torch.tensor([acts[i] for i in order]), torch.tensor(order), scales, labels
        )
        return ranking_text(ranked)

    shuffled = list(latents)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert text(latents) == text(shuffled)


@given(acts_lists)
def test_text_never_says_why(acts: list[float]) -> None:
    ranked = rank_active(
        torch.tensor(acts), torch.arange(len(acts)), torch.ones(len(acts)), {}, top=12
    )
    text = ranking_text(ranked).lower()
    assert "active" in text
    assert not any(word in text for word in CAUSAL_WORDS)
    assert [f.normalised for f in ranked] == sorted((f.normalised for f in ranked), reverse=True)
    assert {f.latent for f in ranked} == {i for i, act in enumerate(acts) if act > 0}


def test_a_weak_activation_of_a_rare_feature_can_rank_first() -> None:
    ranked = rank_active(
        torch.tensor([5.0, 1.0]),
        torch.tensor([0, 1]),
        torch.tensor([10.0, 1.0]),
        {1: LabelText("closing\u202e quote", 0.91, True)},
    )
    assert [feature.latent for feature in ranked] == [1, 0]
    assert ranking_text(ranked).splitlines() == [
        "Active at this position, strongest first:",
        "feature  of its usual high",
        "#1       1.00               “closing⟨U+202E⟩ quote”",
        "#0       0.50               no label",
    ]


def test_a_label_below_the_bar_is_not_quoted() -> None:
    acts, indices, scales = torch.tensor([5.0, 1.0]), torch.tensor([0, 1]), torch.ones(2)
    ranked = rank_active(acts, indices, scales, {0: LabelText("a guess", 0.97)})
    assert (ranked[0].label, ranked[0].unsure_label, ranked[0].quoted) == (None, "a guess", False)
    text = ranking_text(ranked)
    assert "a guess" not in text
    assert [row[2] for row in ranking_rows(ranked)] == ["no accepted label", "no label"]


def test_a_description_stands_where_there_is_no_label_to_quote() -> None:
    labels = {
        0: LabelText("months", 0.9, True, "raises “a”"),
        1: LabelText(None, None, False, "raises “b”"),
    }
    ranked = rank_active(torch.tensor([5.0, 1.0]), torch.tensor([0, 1]), torch.ones(2), labels)
    assert [row[2] for row in ranking_rows(ranked)] == ["“months”", "raises “b”"]


def test_nothing_active() -> None:
    assert rank_active(torch.zeros(3), torch.arange(3), torch.ones(3), {}) == []
    assert ranking_text([]) == "No feature is active at this position."
