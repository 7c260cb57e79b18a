"""Explaining prompts: claims are about active features and carry their measured verdicts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from rldecoder import open_run, precision
from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError
from rldecoder.explain.claims import claim_sentence, measured_text
from rldecoder.explain.explainer import Explainer
from rldecoder.explain.explanation import Explanation, render_explanation
from rldecoder.explain.inputs import LabelText
from rldecoder.explain.reading import PromptReader
from rldecoder.interp.shown import UNKNOWN
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SparseLatents
from rldecoder.schemas import read_json, write_json
from tests.conftest import ROOT

PROMPT = "The import statement finds a module and then"
HOSTILE = "</script><img src=x onerror=alert(1)>\u202e\u200b[bold]x[/bold]\x1b[2J"


@pytest.fixture(autouse=True)
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features of a random SAE are random directions: none would beat the noise floor."""
    monkeypatch.setattr(
        "rldecoder.explain.explainer.noise_floor",
        lambda candidates, _: torch.zeros_like(candidates.acts),
    )


def explain(
    lm: FrozenLM,
    sae: Sae,
    decoder: SaeDecoderForCausalLM,
    explainer: Explainer,
    prompt: str = PROMPT,
    text: str = "a label",
    accepted: bool = True,
) -> Explanation:
    explainer.heads.bias.data[1] = 50.0  # sure of everything
    labels = {latent: LabelText(f"{text} {latent}", 0.5, accepted) for latent in range(160)}
    return PromptReader(lm, sae, decoder, labels, explainer).explain(prompt)


def test_every_verdict_equals_a_real_intervention(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    explainer.spec = explainer.spec.model_copy(update={"min_effect": 0.05})
    found = explain(lm, sae, decoder, explainer)
    ids = torch.tensor([lm.tokenizer.encode(PROMPT)])
    resid, final = lm.resid_and_final(ids, 2)
    latents = sae.encode(resid.float())
    latents = SparseLatents(latents.acts[0, -1], latents.indices[0, -1])
    act_of = dict(zip(latents.indices.tolist(), latents.acts.tolist(), strict=True))
    before = lm.unembed(final[0, -1]).log_softmax(-1)
    on_decoder = decoder.logits(latents).log_softmax(-1)
    token = int(before.argmax())
    assert found.frozen.token_id == token
    assert 0 < len(found.claims) <= explainer.spec.max_claims
    for checked in found.claims:
        latent = checked.claim.latent
        assert act_of[latent] > 0
        changed = resid.clone()
        changed[0, -1] -= act_of[latent] * sae.W_dec[latent]
        after = lm.unembed(lm.tail(changed, 2)[0, -1]).log_softmax(-1)
        effect = float((before - after)[token])
        assert checked.effect == pytest.approx(effect, abs=1e-4)
        acts = latents.acts * (latents.indices != latent)
        decoded = decoder.logits(SparseLatents(acts, latents.indices)).log_softmax(-1)
        expected = float((on_decoder - decoded)[token])
        assert checked.decoder_effect == pytest.approx(expected, abs=1e-4)
        supports = checked.claim.direction == "supports"
        assert checked.claim.noise >= 0.05
        verdict = (
            "too small to tell"
            if abs(effect) <= checked.claim.noise
            else "supported" if supports == (effect > 0) else "contradicted"
        )  # fmt: skip
        assert checked.verdict == verdict
        assert 1 <= checked.claim.evidence_position < len(found.tokens)
    sanity = found.sanity
    assert sanity is not None
    removed = sum(act_of[c.claim.latent] * sae.W_dec[c.claim.latent] for c in found.claims)
    changed = resid.clone()
    changed[0, -1] -= removed
    after = lm.unembed(lm.tail(changed, 2)[0, -1]).log_softmax(-1)
    assert sanity.claimed_removed == pytest.approx(float((before - after)[token]), abs=1e-4)
    signed = [c.claim.strength * (1 if c.claim.direction == "supports" else -1)
              for c in found.claims]  # fmt: skip
    assert sanity.claimed_predicted == pytest.approx(sum(signed), abs=1e-4)


def test_a_label_below_the_bar_is_quoted_nowhere(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    found = explain(lm, sae, decoder, explainer, text="a guess", accepted=False)
    value = found.to_json()
    assert value["claims"]
    for checked in value["claims"]:
        assert checked["claim"]["label"] is None
        assert (checked["claim"]["quoted"], checked["claim"]["label_confidence"]) == (False, 0.5)
    for feature in value["ranked"]:
        assert feature["label"] is None
        assert (feature["quoted"], feature["confidence"]) == (False, 0.5)
        assert feature["unsure_label"] == f"a guess {feature['latent']}"
        del feature["unsure_label"]
    assert "a guess" not in json.dumps(value)
    assert value["method_a"].count(UNKNOWN.text) == len(value["ranked"])
    console = Console(width=4000)
    with console.capture() as capture:
        console.print(render_explanation(found))
    assert "a guess" not in capture.get()
    sure = explain(lm, sae, decoder, explainer, text="a guess").to_json()
    assert sure["claims"][0]["claim"]["quoted"] is True
    assert f"“a guess {sure['claims'][0]['claim']['latent']}”" in sure["method_b"]


def test_predictions_and_kl(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    found = explain(lm, sae, decoder, explainer)
    ids = torch.tensor([lm.tokenizer.encode(PROMPT)])
    frozen = lm.model(ids).logits[0, -1].float().log_softmax(-1)
    mine = decoder(ids).logits[0, -1].log_softmax(-1)
    assert found.frozen.token_id == int(frozen.argmax())
    assert found.frozen.probability == pytest.approx(float(frozen.max().exp()), abs=1e-4)
    assert found.kl == pytest.approx(float((frozen.exp() * (frozen - mine)).sum()), abs=1e-3)
    assert found.sanity is not None
    assert found.method_a.startswith("Active at this position")


def test_the_same_prompt_gives_the_same_bytes(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    texts = {json.dumps(explain(lm, sae, decoder, explainer).to_json()) for _ in range(2)}
    assert len(texts) == 1


def test_no_claim_when_nothing_beats_the_noise(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    explainer.spec = explainer.spec.model_copy(update={"min_effect": 1e9})
    found = explain(lm, sae, decoder, explainer)
    assert found.claims == ()
    assert found.sanity is None
    assert found.tested == ""
    assert "names no reason" in found.method_b


@pytest.mark.parametrize("prompt", [HOSTILE, "x", HOSTILE * 8])
def test_hostile_text_is_inert_in_the_terminal(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer, prompt: str
) -> None:
    found = explain(lm, sae, decoder, explainer, prompt, HOSTILE)
    console = Console(width=100, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(render_explanation(found))
    shown = capture.get()
    assert "\x1b[2J" not in shown
    assert "\u202e" not in shown
    assert "\u200b" not in shown
    if prompt == HOSTILE:
        assert "[bold]" in shown


def test_the_terminal_shows_what_was_measured(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    found = explain(lm, sae, decoder, explainer)
    console = Console(width=4000)
    with console.capture() as capture:
        console.print(render_explanation(found))
    shown = capture.get()
    assert found.claims
    assert len(found.reasons) == min(3, len(found.claims))
    for place, checked in enumerate(found.reasons, start=1):
        (line,) = [line for line in shown.splitlines() if f" B{place} " in line]
        assert claim_sentence(checked.claim) in line
        assert f"[{checked.verdict}: {measured_text(checked)}]" in line
    assert found.tested in shown
    # Method A is a table, a line a feature.
    assert len(found.ranked) == 5
    for feature in found.ranked:
        (line,) = [x for x in shown.splitlines() if f"“a label {feature.latent}”" in x
                   and " B" not in x]  # fmt: skip
        assert f"#{feature.latent} " in line
        assert f"{feature.normalised:.2f}" in line or "first seen" in line


def test_explanations_are_exact_whatever_the_stages_computed_in(
    debug_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    run = open_run(ROOT / "configs" / "debug.yaml", debug_store)
    published = run.artifact(ModelFolder)
    shutil.copytree(published.folder, tmp_path / "bfloat16")
    copy = replace(published, folder=tmp_path / "bfloat16")
    record = ModelFolder.record.path(copy.folder)
    write_json(record, read_json(record) | {"compute_dtype": "bfloat16"})
    monkeypatch.setitem(run._artifacts, ModelFolder.stage, copy)
    assert copy.load().dtype == torch.bfloat16
    assert run.reader().lm.dtype == torch.float32


def test_prompts_that_cannot_be_explained(
    lm: FrozenLM, sae: Sae, decoder: SaeDecoderForCausalLM, explainer: Explainer
) -> None:
    with pytest.raises(BadInputError, match="empty"):
        explain(lm, sae, decoder, explainer, "")
    with pytest.raises(BadInputError, match="at most 512"):
        explain(lm, sae, decoder, explainer, "word " * 2000)
