"""Steered text is what exact interventions on the whole text give, each token without a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.errors import BadInputError
from rldecoder.explain.steering import Changes, Steering, changed_decoder, changed_frozen
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec, SparseLatents

PROMPT = "The import statement finds a module and then"
NEW = 10
START = 3
Kind = Callable[[FrozenLM, Sae], Changes]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def models(
    request: pytest.FixtureRequest, tiny_lm_dir: Path, tiny_llama_dir: Path
) -> tuple[FrozenLM, Sae]:
    lm = FrozenLM.load(tiny_lm_dir if request.param == "gpt2" else tiny_llama_dir)
    spec = SaeSpec(d_model=lm.d_model, num_latents=160, k=12, hook_layer=2)
    return lm, Sae.random_init(spec, seed=1)


@pytest.fixture(scope="module", params=[(), (2, 3)], ids=["linear", "blocks"])
def decoder(request: pytest.FixtureRequest, models: tuple[FrozenLM, Sae]) -> SaeDecoderForCausalLM:
    torch.manual_seed(0)
    made = new_decoder(*models, blocks=request.param)
    if made.looks_back:
        made.blocks.copy_from(models[0].base)
    return made.requires_grad_(False)


def busy(lm: FrozenLM, sae: Sae) -> list[int]:
    """Latents that are active at many positions of the prompt."""
    ids = torch.tensor([lm.encode_prompt(PROMPT)])
    latents = sae.encode(lm.trunk(ids, 2).resid.float())
    counts = torch.bincount(latents.indices[0, START:].flatten(), minlength=160)
    return counts.topk(3).indices.tolist()


def dense(sae: Sae, resid: Tensor) -> Tensor:
    return sae.encode_dense(resid.float())


def edited(acts: Tensor, changes: Changes) -> Tensor:
    """Dense activations [T, L] after the changes, from START on: the oracle."""
    out = acts.clone()
    for latent, factor in changes.scale.items():
        out[START:, latent] *= factor
    for latent, act in changes.set.items():
        out[START:, latent] = act
    for latent, (low, high) in changes.clamp.items():
        out[START:, latent] = out[START:, latent].clip(low, high)
    return out


def changes_of(lm: FrozenLM, sae: Sae) -> Changes:
    first, second, third = busy(lm, sae)
    return Changes({first: 6.0, second: 0.0}, {third: 9.0, 155: 20.0})


def clamps_of(lm: FrozenLM, sae: Sae) -> Changes:
    """One latent held down, one that is mostly quiet held up, one in a band, one scaled."""
    first, second, third = busy(lm, sae)
    return Changes({third: 3.0}, {}, {first: (0.0, 0.1), 155: (12.0, math.inf), second: (1.0, 1.5)})


def written(lm: FrozenLM, ids: Tensor, predict: object) -> list[int]:
    """NEW tokens, the likeliest each time, from logits of the whole text."""
    text = ids
    for _ in range(NEW):
        token = predict(text).argmax()  # type: ignore[operator]
        text = torch.cat([text, token[None]])
    return text[len(ids) :].tolist()


def generated(model: torch.nn.Module, ids: Tensor, **more: object) -> list[int]:
    out = model.generate(  # type: ignore[operator]
        ids[None], attention_mask=torch.ones_like(ids[None]), do_sample=False,
        max_new_tokens=NEW, min_new_tokens=NEW, **more,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.fixture(autouse=True)
def _no_end(monkeypatch: pytest.MonkeyPatch, models: tuple[FrozenLM, Sae]) -> None:
    """Nothing ends a text: the oracle knows no end either."""
    lm, _ = models
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", None)


@pytest.mark.parametrize("kind", [changes_of, clamps_of])
def test_the_frozen_model_writes_what_exact_interventions_give(
    models: tuple[FrozenLM, Sae], kind: Kind
) -> None:
    lm, sae = models
    ids, changes = torch.tensor(lm.encode_prompt(PROMPT)), kind(lm, sae)

    def predict(text: Tensor) -> Tensor:
        resid = lm.trunk(text[None], 2).resid[0]
        acts = dense(sae, resid)
        moved = resid + (edited(acts, changes) - acts) @ sae.W_dec
        return lm.unembed(lm.tail(moved[None], 2)[0, -1])

    with changed_frozen(lm, sae, changes, START):
        steered = generated(lm.model, ids)
        without_cache = generated(lm.model, ids, use_cache=False)
    assert steered == without_cache == written(lm, ids, predict)
    plain = generated(lm.model, ids)
    assert steered != plain  # otherwise equality would say nothing
    with changed_frozen(lm, sae, Changes(dict.fromkeys(busy(lm, sae), 1.0))):
        assert generated(lm.model, ids) == plain
    with changed_frozen(lm, sae, changes, len(ids) + NEW):
        assert generated(lm.model, ids) == plain


@pytest.mark.parametrize("kind", [changes_of, clamps_of])
def test_the_decoder_writes_what_changed_latents_give(
    models: tuple[FrozenLM, Sae], decoder: SaeDecoderForCausalLM, kind: Kind
) -> None:
    lm, sae = models
    ids, changes = torch.tensor(lm.encode_prompt(PROMPT)), kind(lm, sae)
    everything = torch.arange(sae.num_latents)

    def predict(text: Tensor) -> Tensor:
        acts = edited(dense(sae, lm.trunk(text[None], 2).resid[0]), changes)
        return decoder.logits(SparseLatents(acts[None], everything.expand(1, len(text), -1)))[0, -1]

    decoder.generation_config.eos_token_id = None
    with changed_decoder(decoder, changes, START):
        steered = generated(decoder, ids)
    assert steered == written(lm, ids, predict)
    plain = generated(decoder, ids)
    assert steered != plain
    with changed_decoder(decoder, Changes(dict.fromkeys(busy(lm, sae), 1.0))):
        assert generated(decoder, ids) == plain
    with changed_decoder(decoder, changes, len(ids) + NEW):
        assert generated(decoder, ids) == plain


def test_steering_writes_with_either_model_and_draws_by_seed(
    models: tuple[FrozenLM, Sae], decoder: SaeDecoderForCausalLM
) -> None:
    lm, sae = models
    asked: list[int] = []

    def open_decoder() -> SaeDecoderForCausalLM:
        asked.append(1)
        return decoder

    plain = Steering(lm, sae, open_decoder, Changes())
    steering = Steering(lm, sae, open_decoder, changes_of(lm, sae), START)
    text = steering.generate(PROMPT, max_new_tokens=NEW)
    assert not asked  # the decoder is opened when it is asked for
    assert text != plain.generate(PROMPT, max_new_tokens=NEW)
    assert steering.generate(PROMPT, model="decoder", max_new_tokens=NEW) != text
    assert asked
    drawn = [
        steering.generate(PROMPT, max_new_tokens=NEW, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("changes", "start", "message"),
    [
        (Changes({160: 2.0}), 1, "There is no latent 160"),
        (Changes(set={-1: 2.0}), 1, "There is no latent -1"),
        (Changes(clamp={160: (0.0, 1.0)}), 1, "There is no latent 160"),
        (Changes({3: math.nan}), 1, "cannot be changed by nan"),
        (Changes(set={3: -1.0}), 1, "never negative"),
        (Changes(clamp={3: (2.0, 1.0)}), 1, "cannot be held between 2.0 and 1.0"),
        (Changes(clamp={3: (-1.0, 1.0)}), 1, "cannot be held between -1.0 and 1.0"),
        (Changes(clamp={3: (0.0, math.nan)}), 1, "cannot be held between 0.0 and nan"),
        (Changes(clamp={3: (math.inf, math.inf)}), 1, "cannot be changed by inf"),
        (Changes({3: 1.0}, {3: 1.0}), 1, "two ways"),
        (Changes({}, {4: 1.0}, {4: (0.0, 1.0)}), 1, "two ways"),
        (Changes(), 0, "attention sink"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    models: tuple[FrozenLM, Sae], changes: Changes, start: int, message: str
) -> None:
    lm, sae = models
    with pytest.raises(BadInputError, match=message):
        Steering(lm, sae, lambda: pytest.fail("not asked for"), changes, start)


def test_the_text_so_far_is_told_and_the_listener_may_end_it(
    models: tuple[FrozenLM, Sae], decoder: SaeDecoderForCausalLM
) -> None:
    lm, sae = models
    steering = Steering(lm, sae, lambda: decoder, changes_of(lm, sae), START)
    told: list[str] = []
    text = steering.generate(PROMPT, max_new_tokens=NEW, on_text=told.append)
    assert len(told) == NEW
    assert told[-1] == text == steering.generate(PROMPT, max_new_tokens=NEW)
    assert told[2] == steering.generate(PROMPT, max_new_tokens=3)

    class EnoughError(Exception):
        pass

    def enough(_text: str) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        steering.generate(PROMPT, model="decoder", on_text=enough)
    # Nothing of the change is left behind in the models.
    plain = Steering(lm, sae, lambda: decoder, Changes())
    ids = torch.tensor([lm.encode_prompt(PROMPT)])
    assert plain.generate(PROMPT, max_new_tokens=1) == lm.tokenizer.decode(
        [int(lm.model(ids).logits[0, -1].argmax())]
    )


def test_too_long_a_text_and_an_unknown_model_are_refused(models: tuple[FrozenLM, Sae]) -> None:
    lm, sae = models
    steering = Steering(lm, sae, lambda: pytest.fail("not asked for"), Changes())
    with pytest.raises(BadInputError, match="are too many"):
        steering.generate(PROMPT, max_new_tokens=lm.context_length)
    with pytest.raises(BadInputError, match="no model 'both'"):
        steering.generate(PROMPT, model="both")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match="empty"):
        steering.generate("")
