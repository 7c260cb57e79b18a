"""What the server says about an intervention is what a plain rerun of both models gives.

The oracle uses transformers' own forward pass with a hook and the stored weights: none of the
project's cuts, encoders or decoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rldecoder.errors import BadInputError
from rldecoder.serve.served import Served
from tests.serve.conftest import PROMPT


class Naive(NamedTuple):
    """Both models from their files."""

    lm: torch.nn.Module
    ids: Tensor
    layer: int
    k: int
    sae: dict[str, Tensor]
    decoder: dict[str, Tensor]

    def logprobs(self, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log probabilities [T, V] and residuals [T, D], with `add` added to the latter."""
        seen: list[Tensor] = []

        def hook(_module: object, _args: object, output: Tensor) -> Tensor:
            out = output if add is None else output + add
            seen.append(out[0])
            return out

        handle = self.lm.transformer.h[self.layer - 1].register_forward_hook(hook)
        try:
            with torch.no_grad():
                logits = self.lm(self.ids).logits[0]
        finally:
            handle.remove()
        return logits.log_softmax(-1), seen[0]

    def activations(self, resid: Tensor) -> Tensor:
        """Dense activations [T, L]."""
        pre = (resid - self.sae["b_dec"]) @ self.sae["W_enc"] + self.sae["b_enc"]
        kept = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, kept.indices, kept.values.relu())

    def decoded(self, acts: Tensor) -> Tensor:
        """The decoder's log probabilities from dense activations."""
        hidden = acts @ self.decoder["model.W"] + self.decoder["model.b"]
        return (hidden @ self.lm.lm_head.weight.T).log_softmax(-1)


@pytest.fixture
def naive(debug_store: Path, served: Served) -> Naive:
    def only(pattern: str) -> Path:
        (found,) = debug_store.glob(pattern)
        return found

    folder = only("sync_tokenizer/*/model")
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(PROMPT)])
    spec = served.workbench.reader.sae.spec
    assert spec.k is not None
    return Naive(
        lm.requires_grad_(False), ids, spec.hook_layer, spec.k,
        load_file(only("train_sae/*/sae/sae_weights.safetensors")),
        load_file(only("freeze_decoder/*/decoder/model.safetensors")),
    )  # fmt: skip


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("position", [3, -1])
def test_an_intervention_is_a_rerun(
    naive: Naive, served: Served, position: int, factor: float
) -> None:
    reading = served.workbench.read(PROMPT)
    ids = reading.ids
    assert list(ids) == naive.ids[0].tolist()
    position %= len(ids)
    before, resid = naive.logprobs()
    acts = naive.activations(resid)
    moved_most = 0.0
    for latent in acts[position].topk(3).indices.tolist():
        found = reading.amplify(latent, factor, position)
        act = acts[position, latent]
        assert found.act == pytest.approx(float(act), rel=1e-4)
        assert found.new_act == pytest.approx(factor * float(act), rel=1e-4)
        add = torch.zeros_like(resid)
        add[position] = (factor - 1) * act * naive.sae["W_dec"][latent]
        after, _ = naive.logprobs(add)
        kl = (before.exp() * (before - after)).sum(-1)[position:]
        assert found.frozen.moved == pytest.approx(kl.tolist(), abs=2e-5)
        edited = acts[position].clone()
        edited[latent] *= factor
        mine, changed = naive.decoded(acts[position]), naive.decoded(edited)
        for change, old, new in (
            (found.frozen, before[position], after[position]),
            (found.decoder, mine, changed),
        ):
            first = int(old.argmax())
            assert change.shifts[0].token_id == first
            assert change.effect == pytest.approx(float(old[first] - new[first]), abs=1e-4)
            shown = [shift.token_id for shift in change.shifts]
            assert set(new.topk(5).indices.tolist()) <= set(shown)
            assert [shift.before for shift in change.shifts] == pytest.approx(
                old.exp()[shown].tolist(), abs=1e-5
            )
            assert [shift.after for shift in change.shifts] == pytest.approx(
                new.exp()[shown].tolist(), abs=1e-5
            )
        moved_most = max(moved_most, found.frozen.moved[0], found.decoder.moved[0])
    assert moved_most > 1e-3  # otherwise equality would say nothing


def test_a_trace_is_what_both_models_predict(naive: Naive, served: Served) -> None:
    reading = served.workbench.read(PROMPT)
    ids = reading.ids
    trace = reading.predictions
    frozen, resid = naive.logprobs()
    acts = naive.activations(resid)
    decoder = naive.decoded(acts)
    kl = (frozen.exp() * (frozen - decoder)).sum(-1)
    assert [token.kl for token in trace] == pytest.approx(kl.tolist(), abs=1e-4)
    for t, token in enumerate(trace):
        for shown, logprobs in ((token.frozen, frozen[t]), (token.decoder, decoder[t])):
            assert [choice.probability for choice in shown] == pytest.approx(
                logprobs.exp().topk(5).values.tolist(), abs=1e-5
            )
        assert token.num_active == int((acts[t] > 0).sum())
        if t + 1 < len(ids):
            following = float(frozen[t, ids[t + 1]].exp()), float(decoder[t, ids[t + 1]].exp())
            assert token.actual == pytest.approx(following, abs=1e-5)
    assert trace[0].features == []
    assert trace[-1].actual is None


def test_effects_of_a_position_are_measured_removals(naive: Naive, served: Served) -> None:
    reading = served.workbench.read(PROMPT)
    detail = reading.features(4)
    acts = naive.activations(naive.logprobs()[1])[4]
    before = naive.decoded(acts)
    first = int(before.argmax())
    assert detail.token.token_id == first
    assert {one.latent for one in detail} == set(acts.nonzero()[:, 0].tolist())
    for one in detail:
        without = acts.clone()
        without[one.latent] = 0
        effect = float(before[first] - naive.decoded(without)[first])
        assert one.effect == pytest.approx(effect, abs=1e-4)


def test_a_factor_of_one_changes_nothing(served: Served) -> None:
    reading = served.workbench.read(PROMPT)
    found = reading.amplify(reading.features(2)[0].latent, 1.0, 2)
    assert found.decoder.effect == found.frozen.effect == 0
    assert set(found.decoder.moved + found.frozen.moved) == {0.0}


def test_an_explanation_is_of_the_text_up_to_the_token(served: Served) -> None:
    reading = served.workbench.read(PROMPT)
    ids = reading.ids
    reader = served.workbench.reader
    assert reading.explain().to_json() == reader.explain(PROMPT).to_json()
    assert reading.explain(len(ids) - 1).to_json() == reader.explain(PROMPT).to_json()
    early = reading.explain(3)
    assert len(early.tokens) == 4
    assert early.decoder.token_id == reading.predictions[3].decoder[0].token_id


def test_what_cannot_be_asked(served: Served) -> None:
    reading = served.workbench.read(PROMPT)
    ids = reading.ids
    active = {one.latent for one in reading.features(1)}
    quiet = next(latent for latent in range(256) if latent not in active)
    with pytest.raises(BadInputError, match=f"#{quiet} is not active at token 1"):
        reading.ablate(quiet, 1)
    for position in (0, len(ids)):
        with pytest.raises(BadInputError, match="attention sink"):
            reading.features(position)
    with pytest.raises(BadInputError, match="at most 64"):
        served.workbench.read("word " * 200)
    with pytest.raises(BadInputError, match="empty"):
        served.workbench.read("")
