"""The decoder as a transformers model: arithmetic, generation, saving, attachment."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rldecoder.decoder.configuration_sae_decoder import SaeDecoderConfig
from rldecoder.decoder.loading import AffineLens, decoder_from_lens, load_decoder, save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec, SparseLatents

LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(1, 500, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def latents(decoder: SaeDecoderForCausalLM, input_ids: torch.Tensor) -> SparseLatents:
    return decoder.features(input_ids).latents


def test_forward_equals_an_independent_computation(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, input_ids: torch.Tensor
) -> None:
    hidden_states = lm.model(input_ids, output_hidden_states=True).hidden_states
    dense = sae.encode_dense(hidden_states[2])
    expected = (dense @ decoder.W + decoder.b) @ lm.model.lm_head.weight.T
    found = decoder(input_ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_hidden_equals_the_dense_product(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, input_ids: torch.Tensor
) -> None:
    resid = lm.trunk(input_ids, 2).resid
    expected = sae.encode_dense(resid) @ decoder.W + decoder.b
    found = decoder.hidden(sae.encode(resid))
    assert found.shape == (3, 7, 64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_contributions_and_bias_sum_to_the_logit(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, latents: SparseLatents
) -> None:
    token_ids = torch.randint(500, (3, 7))
    contributions = decoder.contributions(latents, token_ids)
    bias_part = lm.unembedding[token_ids] @ decoder.b
    expected = decoder.logits(latents).gather(-1, token_ids[..., None])[..., 0]
    assert contributions.shape == latents.acts.shape
    torch.testing.assert_close(contributions.sum(-1) + bias_part, expected, atol=1e-5, rtol=1e-5)


def test_given_latents_neither_trunk_nor_sae_run(
    decoder: SaeDecoderForCausalLM,
    lm: FrozenLM,
    sae: Sae,
    input_ids: torch.Tensor,
    latents: SparseLatents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = decoder(input_ids).logits

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the frozen part ran")

    monkeypatch.setattr(lm, "trunk", forbidden)
    monkeypatch.setattr(sae, "encode", forbidden)
    assert torch.equal(decoder(latents=latents).logits, expected)


def test_logits_to_keep_picks_positions(
    decoder: SaeDecoderForCausalLM, input_ids: torch.Tensor
) -> None:
    full = decoder(input_ids).logits
    torch.testing.assert_close(decoder(input_ids, logits_to_keep=2).logits, full[:, -2:])
    picked = torch.tensor([0, 3])
    torch.testing.assert_close(decoder(input_ids, logits_to_keep=picked).logits, full[:, picked])


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_cached_generation_equals_uncached(
    model: str,
    sampled: bool,
    sae: Sae,
    lens: AffineLens,
    input_ids: torch.Tensor,
    request: pytest.FixtureRequest,
) -> None:
    frozen = request.getfixturevalue("lm" if model == "gpt2" else "llama")
    decoder = decoder_from_lens(frozen, sae, lens)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(
            decoder.generate(
                input_ids,
                attention_mask=LEFT_PADDED,
                max_new_tokens=12,
                do_sample=sampled,
                use_cache=use_cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for cached, uncached in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(cached, uncached, atol=1e-5, rtol=1e-5)


def test_generation_equals_teacher_forcing(
    decoder: SaeDecoderForCausalLM, input_ids: torch.Tensor
) -> None:
    out = decoder.generate(
        input_ids,
        attention_mask=LEFT_PADDED,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = len(out.logits)
    mask = torch.cat([LEFT_PADDED, torch.ones(3, steps, dtype=torch.long)], dim=1)
    forced = decoder(out.sequences, attention_mask=mask).logits[:, -steps - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_left_padding_changes_nothing(
    model: str,
    sae: Sae,
    lens: AffineLens,
    input_ids: torch.Tensor,
    request: pytest.FixtureRequest,
) -> None:
    frozen = request.getfixturevalue("lm" if model == "gpt2" else "llama")
    decoder = decoder_from_lens(frozen, sae, lens)
    padded = decoder(input_ids, attention_mask=LEFT_PADDED).logits
    for row, mask in enumerate(LEFT_PADDED):
        alone = decoder(input_ids[row : row + 1, mask.bool()]).logits[0]
        torch.testing.assert_close(padded[row, mask.bool()], alone, atol=1e-5, rtol=1e-5)


def test_cache_holds_the_trunk_only(
    decoder: SaeDecoderForCausalLM, input_ids: torch.Tensor
) -> None:
    cache = decoder.features(input_ids, use_cache=True).past_key_values
    assert cache is not None
    assert len(cache.layers) == decoder.config.hook_layer == decoder.config.num_hidden_layers
    assert cache.get_seq_length() == 7
    assert decoder.features(input_ids).past_key_values is None


def test_save_and_load_are_exact_and_leave_the_frozen_parts_out(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, input_ids: torch.Tensor, tmp_path: Path
) -> None:
    save_decoder(decoder, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"model.W", "model.b"}
    loaded = load_decoder(tmp_path, lm, sae)
    assert torch.equal(loaded(input_ids).logits, decoder(input_ids).logits)
    assert loaded.generation_config.eos_token_id == lm.eos_token_id


def test_auto_classes_know_the_decoder(decoder: SaeDecoderForCausalLM, tmp_path: Path) -> None:
    save_decoder(decoder, tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), SaeDecoderConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, SaeDecoderForCausalLM)
    assert torch.equal(loaded.W, decoder.W)


def test_training_touches_w_and_b_only(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, input_ids: torch.Tensor
) -> None:
    before = {
        name: tensor.clone()
        for name, tensor in (*lm.model.state_dict().items(), *sae.state_dict().items())
    }
    assert {name for name, _ in decoder.named_parameters()} == {"model.W", "model.b"}
    W = decoder.W.detach().clone()
    optimizer = torch.optim.AdamW(decoder.train().parameters(), lr=0.1)
    decoder(input_ids).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    assert not torch.equal(decoder.W, W)
    after = {**lm.model.state_dict(), **sae.state_dict()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not lm.model.training
    assert all(p.grad is None for p in (*lm.model.parameters(), *sae.parameters()))


def test_casts_and_copies_leave_the_frozen_parts_alone(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae
) -> None:
    twin = copy.deepcopy(decoder).to(torch.bfloat16)
    assert twin.W.dtype == torch.bfloat16
    assert decoder.W.dtype == lm.dtype == sae.W_enc.dtype == torch.float32
    assert twin.frozen.lm is lm
    assert twin.frozen.sae is sae


def test_moving_the_decoder_moves_the_frozen_parts(
    decoder: SaeDecoderForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.device] = []
    for part in (decoder.frozen.lm.model, decoder.frozen.sae):
        monkeypatch.setattr(part, "to", moved.append)
    decoder.to("cpu")
    assert moved == [torch.device("cpu")] * 2


def test_a_decoder_without_its_frozen_parts_says_so() -> None:
    decoder = SaeDecoderForCausalLM(SaeDecoderConfig())
    with pytest.raises(BadInputError, match="attach"):
        decoder(torch.ones(1, 3, dtype=torch.long))


def test_neither_tokens_nor_latents_is_an_error(decoder: SaeDecoderForCausalLM) -> None:
    with pytest.raises(BadInputError, match="neither"):
        decoder()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_latents": 90}, "num_latents"), ({"hook_layer": 3}, "hook_layer")],
)
def test_another_sae_is_refused(
    change: dict[str, int], message: str, decoder: SaeDecoderForCausalLM, lm: FrozenLM
) -> None:
    spec = SaeSpec(**{"d_model": 64, "num_latents": 96, "k": 8, "hook_layer": 2, **change})
    with pytest.raises(BadInputError, match=message):
        decoder.attach(lm, Sae(spec))


def test_relu_sae_with_ragged_activity(lm: FrozenLM, lens: AffineLens) -> None:
    spec = SaeSpec(architecture="relu", d_model=64, num_latents=96, hook_layer=2)
    sae = Sae.random_init(spec, seed=4)
    decoder = decoder_from_lens(lm, sae, lens)
    input_ids = torch.randint(500, (2, 5))
    dense = sae.encode_dense(lm.trunk(input_ids, 2).resid)
    expected = lm.unembed(dense @ decoder.W + decoder.b)
    torch.testing.assert_close(decoder(input_ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("field", ["d_model", "vocab_size", "num_latents", "hook_layer"])
def test_config_refuses_sizes_below_one(field: str) -> None:
    with pytest.raises(Exception, match=field):
        SaeDecoderConfig(**{field: 0})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "mystery"}, "kind"),
        ({"kind": "transformer"}, "blocks"),
        ({"blocks": [1]}, "blocks"),
        ({"kind": "transformer", "blocks": [2, 1], "block_config": {"a": 1}}, "rise"),
    ],
)
def test_config_refuses_what_does_not_fit(fields: dict[str, object], message: str) -> None:
    with pytest.raises(Exception, match=message):
        SaeDecoderConfig(**fields)
