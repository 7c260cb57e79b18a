"""The decoder with blocks, for every architecture, against the frozen model it is cut from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from rldecoder.decoder.blocks import evenly_spaced
from rldecoder.decoder.loading import load_decoder, save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.selection import SparseLatents
from tests.tiny_models import ARCHITECTURES, WIDTH, tiny_frozen, whole_decoder

DEPTH, HOOK_LAYER, LENGTH = 4, 2, 12
ABOVE = list(range(HOOK_LAYER, DEPTH))
BOS = 7
MASK = torch.tensor([[1] * LENGTH, [0] * 4 + [1] * (LENGTH - 4), [0] + [1] * (LENGTH - 1)])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest, tiny_lm_dir: Path) -> FrozenLM:
    return tiny_frozen(request.param, tiny_lm_dir, DEPTH)


@pytest.fixture(scope="module")
def sae() -> Sae:
    spec = SaeSpec(d_model=WIDTH, num_latents=96, k=8, hook_layer=HOOK_LAYER)
    return Sae.random_init(spec, seed=1)


@pytest.fixture
def ids() -> Tensor:
    """Every text begins with the same token, so that position 0 is the same residual in all."""
    ids = torch.randint(1, 512, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    for row, mask in enumerate(MASK):
        ids[row, : int((mask == 0).sum()) + 1] = BOS
    return ids


def shaken(lm: FrozenLM, sae: Sae, blocks: list[int]) -> SaeDecoderForCausalLM:
    """A decoder whose every weight matters."""
    torch.manual_seed(3)
    decoder = new_decoder(lm, sae, blocks)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return decoder


def test_all_blocks_give_the_spliced_model(lm: FrozenLM, sae: Sae, ids: Tensor) -> None:
    decoder = whole_decoder(lm, sae, BOS)

    def replace(resid: Tensor) -> Tensor:
        first = (MASK.cumsum(-1) == 1) & MASK.bool()
        return torch.where(first[..., None], resid, sae(resid).recon)

    expected = lm.unembed(lm.splice(ids, HOOK_LAYER, replace, attention_mask=MASK))
    found = decoder(ids, attention_mask=MASK).logits
    real = MASK.bool()
    torch.testing.assert_close(found[real], expected[real], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("blocks", [[3], [2, 3]])
@pytest.mark.parametrize("sampled", [False, True])
def test_cached_generation_equals_uncached(
    blocks: list[int], sampled: bool, lm: FrozenLM, sae: Sae, ids: Tensor
) -> None:
    decoder = shaken(lm, sae, blocks)
    runs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        runs.append(
            decoder.generate(
                ids, attention_mask=MASK, max_new_tokens=8, do_sample=sampled, use_cache=use_cache,
                eos_token_id=None, output_logits=True, return_dict_in_generate=True,
            )
        )  # fmt: skip
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for cached, uncached in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(cached, uncached, atol=2e-4, rtol=2e-4)


def test_left_padding_changes_nothing(lm: FrozenLM, sae: Sae, ids: Tensor) -> None:
    decoder = shaken(lm, sae, ABOVE)
    padded = decoder(ids, attention_mask=MASK).logits
    for row, mask in enumerate(MASK):
        alone = decoder(ids[row : row + 1, mask.bool()]).logits[0]
        torch.testing.assert_close(padded[row, mask.bool()], alone, atol=2e-4, rtol=2e-4)


def test_latents_can_be_given(lm: FrozenLM, sae: Sae, ids: Tensor) -> None:
    decoder = shaken(lm, sae, ABOVE)
    latents = decoder.features(ids, MASK).latents
    again = decoder(latents=latents, attention_mask=MASK).logits
    torch.testing.assert_close(again, decoder(ids, attention_mask=MASK).logits)
    one = decoder(latents=latents, attention_mask=MASK, logits_to_keep=1).logits
    torch.testing.assert_close(one, again[:, -1:])


def test_save_and_load_are_exact(lm: FrozenLM, sae: Sae, ids: Tensor, tmp_path: Path) -> None:
    decoder = shaken(lm, sae, [3])
    save_decoder(decoder, tmp_path)
    loaded = load_decoder(tmp_path, lm, sae)
    assert torch.equal(loaded(ids).logits, decoder(ids).logits)
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path).attach(lm, sae)
    assert torch.equal(by_name(ids).logits, decoder(ids).logits)
    bare = AutoModel.from_pretrained(tmp_path)
    latents = decoder.features(ids).latents
    assert torch.equal(bare(latents), decoder.hidden(latents))


def test_cache_has_room_for_both_parts(lm: FrozenLM, sae: Sae, ids: Tensor) -> None:
    decoder = shaken(lm, sae, [3])
    cache = decoder(ids, use_cache=True).past_key_values
    assert len(cache.layers) == decoder.config.num_hidden_layers == HOOK_LAYER + 1
    assert {cache.get_seq_length(layer) for layer in range(3)} == {LENGTH}
    bare = DynamicCache()
    first = decoder(ids[:, :-1], past_key_values=bare, use_cache=True)
    last = decoder(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last, decoder(ids).logits[:, -1:], atol=2e-4, rtol=2e-4)


def test_gradients_reach_every_weight_and_no_frozen_one(
    lm: FrozenLM, sae: Sae, ids: Tensor
) -> None:
    decoder = shaken(lm, sae, ABOVE).train()
    decoder(ids).logits.logsumexp(-1).sum().backward()
    missing = {name for name, p in decoder.named_parameters() if p.grad is None}
    assert not missing
    assert all(p.grad is None for p in (*lm.model.parameters(), *sae.parameters()))
    assert not any("embed" in name or "wte" in name for name, _ in decoder.named_parameters())


def test_attributions_are_exact_for_linear_and_first_order_with_blocks(
    lm: FrozenLM, sae: Sae, ids: Tensor
) -> None:
    tokens = torch.tensor([5, 9, 11])
    linear = shaken(lm, sae, [])
    latents = linear.features(ids).latents
    found = linear.attributions(latents, tokens)
    assert not found[:, :-1].any()
    if lm.model.config.model_type not in ("gemma2",):  # whose logits are capped
        last = SparseLatents(latents.acts[:, -1], latents.indices[:, -1])
        torch.testing.assert_close(found[:, -1], linear.contributions(last, tokens))

    decoder = shaken(lm, sae, ABOVE)
    found = decoder.attributions(latents, tokens)
    step = 1e-3
    place = (0, LENGTH - 1, 2)
    changed = latents.acts.double().clone()
    changed[place] *= 1 + step

    def logit(acts: Tensor) -> float:
        twin = copy.deepcopy(decoder).double()
        hidden = twin.hidden(SparseLatents(acts, latents.indices))[0, -1]
        return lm.unembed(hidden.float())[tokens[0]].item()

    change = (logit(changed) - logit(latents.acts.double())) / step
    assert change == pytest.approx(float(found[place]), rel=0.2, abs=5e-3)
    with pytest.raises(BadInputError, match="linear"):
        decoder.contributions(latents, tokens)


def test_evenly_spaced_ends_with_the_last_block() -> None:
    assert evenly_spaced(15, 30, 1) == [29]
    assert evenly_spaced(15, 30, 3) == [19, 24, 29]
    assert evenly_spaced(2, 6, 4) == [2, 3, 4, 5]
    for depth in range(1, 16):
        found = evenly_spaced(15, 30, depth)
        assert len(set(found)) == depth
        assert found == sorted(found)
        assert found[0] >= 15
        assert found[-1] == 29
