"""The cut model against the whole model of `transformers`, for five architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
)

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.precision import fast_dtype
from tests.tiny_models import ARCHITECTURES, TINY_RECORD, tiny_frozen

DEPTH = 3


@pytest.fixture(scope="module", params=ARCHITECTURES)
def lm(request: pytest.FixtureRequest, tiny_lm_dir: Path) -> FrozenLM:
    return tiny_frozen(request.param, tiny_lm_dir, DEPTH)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 512, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["whole", "left-padded"])
def mask(request: pytest.FixtureRequest, ids: Tensor) -> Tensor | None:
    if request.param == "whole":
        return None
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return mask


def whole(lm: FrozenLM, ids: Tensor, mask: Tensor | None) -> Any:
    """What `transformers` computes for the whole model; the oracle of this file."""
    positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return lm.model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)


def test_trunk_is_the_hidden_state(lm: FrozenLM, ids: Tensor, mask: Tensor | None) -> None:
    expected = whole(lm, ids, mask).hidden_states
    for layer in range(DEPTH):
        assert torch.equal(lm.trunk(ids, layer, attention_mask=mask).resid, expected[layer])
    last = lm.trunk(ids, DEPTH, attention_mask=mask).resid
    norm = lm._base.get_submodule(lm._norm_name)
    assert torch.equal(norm(last), expected[DEPTH])


def test_tail_completes_the_trunk(lm: FrozenLM, ids: Tensor, mask: Tensor | None) -> None:
    expected = whole(lm, ids, mask).hidden_states[-1]
    for layer in range(DEPTH + 1):
        resid = lm.trunk(ids, layer, attention_mask=mask).resid
        assert torch.equal(lm.tail(resid, layer, attention_mask=mask), expected)


def test_one_pass_gives_what_the_parts_give(lm: FrozenLM, ids: Tensor, mask: Tensor | None) -> None:
    final = whole(lm, ids, mask).hidden_states[-1]
    residuals, last = lm.residuals(ids, attention_mask=mask)
    assert len(residuals) == DEPTH + 1
    assert torch.equal(last, final)
    for layer in range(DEPTH + 1):
        resid, end = lm.resid_and_final(ids, layer, attention_mask=mask)
        assert torch.equal(resid, lm.trunk(ids, layer, attention_mask=mask).resid)
        assert torch.equal(resid, residuals[layer])
        assert torch.equal(end, final)


def test_splice_is_trunk_change_tail(lm: FrozenLM, ids: Tensor, mask: Tensor | None) -> None:
    final = whole(lm, ids, mask).hidden_states[-1]
    for layer in range(DEPTH + 1):
        same = lm.splice(ids, layer, lambda resid: resid, attention_mask=mask)
        assert torch.equal(same, final)
        resid = lm.trunk(ids, layer, attention_mask=mask).resid
        changed = lm.splice(ids, layer, lambda resid: resid * 0.5 + 1, attention_mask=mask)
        assert torch.equal(changed, lm.tail(resid * 0.5 + 1, layer, attention_mask=mask))
        assert not torch.allclose(changed, final)


def test_unembed_gives_the_models_logits(lm: FrozenLM, ids: Tensor) -> None:
    expected = whole(lm, ids, None).logits
    _, final = lm.resid_and_final(ids, 0)
    assert torch.allclose(lm.unembed(final), expected, atol=1e-5)


def test_left_padding_changes_nothing(lm: FrozenLM, ids: Tensor) -> None:
    alone = lm.tail(lm.trunk(ids[:1], 2).resid, 2)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids[:1]], 1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    resid = lm.trunk(padded, 2, attention_mask=mask).resid
    assert torch.allclose(lm.tail(resid, 2, attention_mask=mask)[:, 5:], alone, atol=1e-4)
    assert torch.allclose(
        lm.splice(padded, 2, lambda r: r, attention_mask=mask)[:, 5:], alone, atol=1e-4
    )


@pytest.mark.parametrize("layer", [1, DEPTH])
def test_trunk_with_cache_goes_on_where_it_stopped(
    lm: FrozenLM, ids: Tensor, mask: Tensor | None, layer: int
) -> None:
    expected = lm.trunk(ids, layer, attention_mask=mask).resid
    mask = torch.ones_like(ids) if mask is None else mask
    parts, cache = [], None
    for start, end in ((0, 6), (6, 7), (7, 11)):
        resid, cache = lm.trunk(
            ids[:, start:end],
            layer,
            attention_mask=mask[:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        parts.append(resid)
    real = mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("layer", range(DEPTH + 1))
def test_tail_with_cache_goes_on_where_it_stopped(
    lm: FrozenLM, ids: Tensor, mask: Tensor | None, layer: int
) -> None:
    expected = whole(lm, ids, mask).hidden_states[-1]
    resid = lm.trunk(ids, layer, attention_mask=mask).resid
    cache = lm.tail_cache(layer)
    parts = []
    for start, end in ((0, 6), (6, 7), (7, 11)):
        part = lm.tail(
            resid[:, start:end],
            layer,
            attention_mask=None if mask is None else mask[:, :end],
            past_key_values=cache,
        )
        parts.append(part)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[real], expected[real], atol=1e-4)


def test_trunk_runs_only_its_blocks_and_copies_no_weights(lm: FrozenLM, ids: Tensor) -> None:
    runs: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: runs.append(index))
        for index, block in enumerate(lm._blocks)
    ]
    lm.trunk(ids, 2)
    assert runs == [0, 1]
    lm.tail(torch.zeros(1, 3, lm.d_model), 2)
    assert runs == [0, 1, 2]
    for handle in handles:
        handle.remove()
    own = {parameter.data_ptr() for parameter in lm.model.parameters()}
    for cut in lm._cuts.values():
        assert {parameter.data_ptr() for parameter in cut.parameters()} <= own


def test_gradients_reach_the_residual_and_no_weight(lm: FrozenLM, ids: Tensor) -> None:
    resid = lm.trunk(ids, 1).resid.double()
    direction = torch.randn(resid.shape, generator=torch.Generator().manual_seed(2)).double()
    model = lm.model.double()
    try:
        leaf = resid.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(lm.tail(leaf, 1).square().sum(), leaf)
        step = 1e-3  # RMSNorm works in float32 whatever it is given
        ahead = lm.tail(resid + step * direction, 1).square().sum()
        behind = lm.tail(resid - step * direction, 1).square().sum()
        assert torch.allclose(
            (gradient * direction).sum(), (ahead - behind) / (2 * step), rtol=1e-2
        )

        leaf = resid.clone().requires_grad_()
        spliced = lm.splice(ids, 1, lambda _: leaf)
        (through_splice,) = torch.autograd.grad(spliced.square().sum(), leaf)
        assert torch.allclose(through_splice, gradient)
    finally:
        model.float()
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_a_failing_replacement_leaves_no_trace(lm: FrozenLM, ids: Tensor) -> None:
    def fail(resid: Tensor) -> Tensor:
        raise RuntimeError("the SAE broke")

    before = whole(lm, ids, None).logits
    with pytest.raises(RuntimeError, match="the SAE broke"):
        lm.splice(ids, 1, fail)
    assert torch.equal(whole(lm, ids, None).logits, before)


@pytest.mark.parametrize("layer", [-1, DEPTH + 1])
def test_layers_out_of_range_are_refused(lm: FrozenLM, ids: Tensor, layer: int) -> None:
    for call in (
        lambda: lm.trunk(ids, layer),
        lambda: lm.tail(torch.zeros(1, 2, lm.d_model), layer),
        lambda: lm.resid_and_final(ids, layer),
        lambda: lm.splice(ids, layer, lambda resid: resid),
    ):
        with pytest.raises(BadInputError, match=rf"from 0 \(embeddings\) to {DEPTH}"):
            call()


def test_layer_0_has_no_cache(lm: FrozenLM, ids: Tensor) -> None:
    with pytest.raises(BadInputError, match="Layer 0 has no cache"):
        lm.trunk(ids, 0, use_cache=True)


def test_bfloat16_logits_are_summed_exactly(tiny_llama_dir: Path, ids: Tensor) -> None:
    lm = FrozenLM.load(tiny_llama_dir, dtype=torch.bfloat16)
    setting = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    _, final = lm.resid_and_final(ids, 2)
    exact = final.double() @ lm.unembedding.double().T
    logits = lm.unembed(final)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits.double(), exact, atol=1e-5)
    assert not torch.allclose(lm.model.lm_head(final).double(), exact, atol=1e-5)
    # Float32 hidden states (a decoder's) are not rounded to bfloat16 on the way.
    fine = final.float() + 1e-3
    assert torch.allclose(
        lm.unembed(fine).double(), fine.double() @ lm.unembedding.double().T, atol=1e-5
    )
    assert torch.backends.mkldnn.matmul.fp32_precision == setting  # type: ignore[attr-defined]


def test_load_reads_constants_and_the_recorded_dtype(tiny_lm_dir: Path, tmp_path: Path) -> None:
    lm = FrozenLM.load(tiny_lm_dir)
    assert (lm.num_layers, lm.d_model, lm.vocab_size) == (4, 64, 512)
    assert (lm.eos_token_id, lm.pad_token_id) == (0, 0)
    assert lm.dtype == torch.float32
    assert lm.device.type == "cpu"
    assert lm.unembedding.shape == (512, 64)
    shutil.copytree(tiny_lm_dir, tmp_path / "model")
    model, record = tmp_path / "model", tmp_path / "record"
    TINY_RECORD.model_copy(update={"compute_dtype": "bfloat16"}).save(record)
    assert FrozenLM.load(model, record=record).dtype == fast_dtype("bfloat16", "cpu")
    assert FrozenLM.load(model, record=record, dtype=torch.float32).dtype == torch.float32
    assert FrozenLM.load(model, record=tmp_path / "none").dtype == torch.float32
    record.write_text("{}")
    with pytest.raises(DamagedFileError, match="is not what this version publishes"):
        FrozenLM.load(model, record=record)


def test_padding_falls_back_to_the_end_of_text(tiny_lm_dir: Path) -> None:
    lm = FrozenLM.load(tiny_lm_dir)
    lm.tokenizer.pad_token = None
    assert lm.pad_token_id == lm.eos_token_id
    lm.tokenizer.eos_token = None
    with pytest.raises(BadInputError, match="no end-of-text token"):
        _ = lm.eos_token_id


def damaged(source: Path, target: Path, damage: str) -> Path:
    shutil.copytree(source, target)
    weights = target / "model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "pickled weights":
        weights.rename(target / "pytorch_model.bin")
    elif damage == "broken config":
        (target / "config.json").write_text("{")
    elif damage == "unknown architecture":
        (target / "config.json").write_text('{"model_type": "made_up"}')
    elif damage == "code of its own":
        config = json.loads((target / "config.json").read_text())
        config |= {"model_type": "made_up", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        (target / "config.json").write_text(json.dumps(config))
        (target / "evil.py").write_text("raise SystemExit('this code was run')")
    elif damage == "broken tokenizer":
        (target / "tokenizer.json").write_text('{"model": 3}')
    elif damage == "no tokenizer":
        for path in target.glob("tokenizer*"):
            path.unlink()
    return target


@pytest.mark.parametrize(
    "damage",
    [
        "truncated weights", "no weights", "pickled weights", "broken config",
        "unknown architecture", "code of its own", "broken tokenizer", "no tokenizer",
    ],
)  # fmt: skip
def test_unusable_folders_are_refused_in_one_line(
    tiny_lm_dir: Path, tmp_path: Path, damage: str
) -> None:
    with pytest.raises(BadInputError, match="cannot be loaded") as caught:
        FrozenLM.load(damaged(tiny_lm_dir, tmp_path / "model", damage))
    assert len(str(caught.value)) < 800
    assert "\n" not in str(caught.value)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No model at"):
        FrozenLM.load(tmp_path / "nowhere")


def test_unsupported_architecture_is_refused(tiny_lm_dir: Path) -> None:
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, is_decoder=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_dir)
    with pytest.raises(BadInputError, match="'bert' are not supported"):
        FrozenLM(BertLMHeadModel(config), tokenizer, tiny_lm_dir)


def test_choice_directions_see_nothing_that_moves_all_logits_alike(tiny_llama_dir: Path) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    tokens = torch.tensor([[3, 5], [9, 3]])
    found = lm.choice_directions(tokens)
    assert found.shape == (2, 2, lm.d_model)
    hidden = torch.randn(lm.d_model)
    logits = lm.unembed(hidden)
    torch.testing.assert_close(found @ hidden, logits[tokens] - logits.mean())
    with torch.no_grad():  # every logit moves by hidden . step, and no probability does
        moved = FrozenLM.load(tiny_llama_dir)
        moved.unembedding.add_(torch.randn(lm.d_model))
    torch.testing.assert_close(moved.choice_directions(tokens), found, atol=1e-6, rtol=1e-4)
