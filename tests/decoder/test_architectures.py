"""Decoders with blocks of many architectures, on text longer than their windows and chunks.

The oracle is the frozen model itself, run as a whole, and whole sequences beside single places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from rldecoder.decoder.blocks import BlockDecoder
from rldecoder.decoder.loading import load_decoder, save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.places import Places, past_of_rows
from rldecoder.decoder.reader import proven_masks
from rldecoder.errors import BadInputError
from rldecoder.lm.cut import config_with_blocks
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.selection import SparseLatents
from rldecoder.seeds import torch_generator
from tests.decoder.test_places import hidden_in

LENGTH, WINDOW, HOOK_LAYER = 30, 8, 2
COMMON: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
GATED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
SLIDING = GATED | {"sliding_window": WINDOW}
EXACT: dict[str, dict[str, Any]] = {
    "arcee": SLIDING,  # which has no windows, whatever its configuration names
    "cohere2": SLIDING,
    "diffllama": GATED,  # whose blocks count
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_oss": SLIDING | {"num_local_experts": 4},
    "granite_swa": SLIDING,
    "llama": GATED,
    "mistral": SLIDING,
    "olmo3": SLIDING,
    "phi3": SLIDING,
    "qwen2": SLIDING | {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3_moe": GATED | {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "mlp_only_layers": [2],
    },
    "smollm3": GATED | {"no_rope_layers": [1, 1, 1, 0]},
    "starcoder2": SLIDING,
}  # fmt: skip
# Their attention knows where it is by counting, not from the mask.
REFUSED: dict[str, dict[str, Any]] = {
    "falcon": {"alibi": True},
    "gpt_neo": {
        "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
    },
}  # fmt: skip


def frozen(name: str, sizes: dict[str, Any], tokenizer: Path) -> FrozenLM:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **COMMON | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return FrozenLM(model, AutoTokenizer.from_pretrained(tokenizer), tokenizer)


def decoder_of(lm: FrozenLM, blocks: list[int]) -> SaeDecoderForCausalLM:
    sae = Sae.random_init(SaeSpec(d_model=32, num_latents=80, k=6, hook_layer=HOOK_LAYER), seed=1)
    made = new_decoder(lm, sae, blocks)
    made.blocks.copy_from(lm.base)
    with torch.no_grad():
        made.W.copy_(sae.W_dec)
        made.blocks.sinks.normal_(generator=torch_generator(2))
    return made.requires_grad_(False)


@pytest.fixture(scope="module", params=sorted(EXACT))
def lm(request: pytest.FixtureRequest, tiny_lm_dir: Path) -> FrozenLM:
    return frozen(request.param, EXACT[request.param], tiny_lm_dir)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(5, 500, (2, LENGTH), generator=torch_generator(0))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_copied_block_computes_what_the_frozen_one_does(lm: FrozenLM, ids: Tensor) -> None:
    decoder = decoder_of(lm, [3])
    resid, final = lm.resid_and_final(ids[:1], 3)
    with torch.no_grad():
        decoder.blocks.sinks[0] = resid[0, 0]
        close(decoder.blocks(resid), final)


def test_places_equal_the_whole_sequence_beyond_the_window(lm: FrozenLM, ids: Tensor) -> None:
    places_equal_the_whole(decoder_of(lm, [2, 3]), ids[:1])


def places_equal_the_whole(decoder: SaeDecoderForCausalLM, ids: Tensor) -> None:
    acts, indices = decoder.features(ids).latents
    acts[:, 0] = 0
    whole = decoder.hidden(SparseLatents(acts, indices))[0]
    positions = torch.tensor([1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW, 21, LENGTH - 1])
    row = torch.zeros(LENGTH - 1, dtype=torch.long)
    past = past_of_rows(
        SparseLatents(acts[0, 1:], indices[0, 1:]), row, torch.arange(1, LENGTH),
        torch.zeros_like(positions), positions,
    )  # fmt: skip
    places = Places(SparseLatents(acts[0, positions], indices[0, positions]), past)
    close(hidden_in(decoder, places, size=4), whole[positions])


def test_caches_go_on_beyond_the_window(lm: FrozenLM, ids: Tensor) -> None:
    expected, final = lm.resid_and_final(ids, HOOK_LAYER)
    cache, tail_cache = None, lm.tail_cache(HOOK_LAYER)
    for start, end in ((0, 12), (12, 13), (13, LENGTH)):
        resid, cache = lm.trunk(
            ids[:, start:end], HOOK_LAYER, attention_mask=torch.ones(2, end, dtype=torch.long),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        close(resid, expected[:, start:end])
        close(
            lm.tail(expected[:, start:end], HOOK_LAYER, past_key_values=tail_cache),
            final[:, start:end],
        )


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_read_place_by_place_is_refused(
    name: str, ids: Tensor, tiny_lm_dir: Path
) -> None:
    decoder = decoder_of(frozen(name, REFUSED[name], tiny_lm_dir), [2, 3])
    with pytest.raises(BadInputError, match=r"train_decoder\.depth: 0"):
        places_equal_the_whole(decoder, ids[:1])


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.1), (torch.bfloat16, 2.0)])
def test_a_copy_that_differs_is_refused(
    dtype: torch.dtype, factor: float, tiny_lm_dir: Path
) -> None:
    lm = frozen("llama", EXACT["llama"], tiny_lm_dir)
    lm.model.to(dtype)
    decoder = decoder_of(lm, [2, 3])
    decoder.blocks.copy_from(lm.base)  # which is equal, but for rounding
    decoder.blocks.blocks[1].self_attn.scaling *= factor  # type: ignore[union-attr, operator]
    with pytest.raises(BadInputError, match="copy of block 3"):
        decoder.blocks.copy_from(lm.base)


def test_longer_texts_are_proven_anew(tiny_lm_dir: Path) -> None:
    decoder = decoder_of(frozen("mistral", EXACT["mistral"], tiny_lm_dir), [3])
    first = proven_masks(decoder.blocks, 10)
    assert proven_masks(decoder.blocks, 64) is first
    (longer,) = proven_masks(decoder.blocks, 100)
    assert longer.shape == (100, 100)
    rows, columns = torch.arange(100)[:, None], torch.arange(100)
    assert torch.equal(longer, (columns <= rows) & (columns > rows - WINDOW))


def test_saved_blocks_keep_their_numbers(ids: Tensor, tmp_path: Path, tiny_lm_dir: Path) -> None:
    for name in ("gpt2", "smollm3"):
        lm = frozen(name, EXACT[name], tiny_lm_dir)
        decoder = decoder_of(lm, [3])
        save_decoder(decoder, tmp_path / name)
        loaded = load_decoder(tmp_path / name, lm, decoder.frozen.sae)
        assert torch.equal(loaded(ids).logits, decoder(ids).logits)


def test_fresh_blocks_start_as_transformers_starts_them(tiny_lm_dir: Path) -> None:
    """Their weights, names and draws are those of a model that has only these blocks."""
    lm = frozen("llama", EXACT["llama"], tiny_lm_dir)
    config = decoder_of(lm, [1, 3]).config
    torch.manual_seed(5)
    found = BlockDecoder(config).body.state_dict()
    fewer = config_with_blocks(lm.model.config, [1, 3])
    fewer.vocab_size = 1
    torch.manual_seed(5)
    expected = AutoModel.from_config(fewer, dtype=torch.float32).state_dict()
    del expected["embed_tokens.weight"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_blocks_that_all_keep_states_do_not_go_on(ids: Tensor, tiny_lm_dir: Path) -> None:
    lm = frozen("olmo_hybrid", GATED, tiny_lm_dir)
    sae = Sae.random_init(SaeSpec(d_model=32, num_latents=80, k=6, hook_layer=HOOK_LAYER), seed=1)
    for act in (
        lambda: lm.trunk(ids, HOOK_LAYER, use_cache=True),
        lambda: new_decoder(lm, sae).generate(ids, max_new_tokens=2),
    ):
        with pytest.raises(BadInputError, match="cannot go on from where they stopped"):
            act()
