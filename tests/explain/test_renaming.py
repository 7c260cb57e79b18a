"""Labels are words: with others in their place no claim, verdict or score changes by a bit."""

from __future__ import annotations

import pytest
import torch

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.reading import PromptReader
from rldecoder.explain.renaming import renamed_labels, without_words
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae

PROMPTS = ("The import statement finds a module and then", "for x in range(10):", "a")
LABELS = {
    latent: LabelText(
        None if latent % 5 == 0 else f"label {latent}",
        latent / 160,
        latent % 3 == 0,
        None if latent % 3 == 0 else f"raises {latent}",
    )
    for latent in range(150)
}


@pytest.fixture(autouse=True)
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of a random SAE are random directions: none would beat the noise floor."""
    monkeypatch.setattr(
        "rldecoder.explain.explainer.noise_floor",
        lambda candidates, _: torch.zeros_like(candidates.acts),
    )


def test_renaming_deals_out_every_label_and_changes_each() -> None:
    renamed = renamed_labels(LABELS, seed=0)
    assert set(renamed) == set(LABELS)
    assert sorted(label.confidence or 0 for label in renamed.values()) == sorted(
        label.confidence or 0 for label in LABELS.values()
    )
    assert sum(label.text is None for label in renamed.values()) == 30
    assert not {label.text for label in renamed.values()} & {
        label.text for label in LABELS.values() if label.text
    }
    assert renamed == renamed_labels(LABELS, seed=0)


@pytest.mark.parametrize("labels", [renamed_labels(LABELS, seed=1), {}])
def test_renamed_labels_change_words_and_nothing_causal(
    lm: FrozenLM,
    sae: Sae,
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    labels: dict[int, LabelText],
) -> None:
    explainer.heads.bias.data[1] = 50.0  # sure of everything
    explainer.scales.fill_(1.0)
    explainer.requires_grad_(False)
    total = 0
    for prompt in PROMPTS:
        before = PromptReader(lm, sae, decoder, LABELS, explainer).explain(prompt)
        after = PromptReader(lm, sae, decoder, labels, explainer).explain(prompt)
        assert without_words(after) == without_words(before)
        assert before.method_a != after.method_a
        total += len(before.claims)
        for mine, theirs in zip(before.claims, after.claims, strict=True):
            assert theirs.effect == mine.effect
            assert theirs.verdict == mine.verdict
            assert theirs.claim.label == labels.get(mine.claim.latent, LabelText(None, None)).quoted
    assert total >= 6
