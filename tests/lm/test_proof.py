"""Every architecture is exact or refused, never silently wrong."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rldecoder.decoder.blocks import BlockDecoder
from rldecoder.decoder.configuration_sae_decoder import SaeDecoderConfig
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.errors import BadInputError, NumericalError
from rldecoder.evals.generation import prefix_generate
from rldecoder.lm import unembedding
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.proof import prove
from rldecoder.sae.model import Sae
from rldecoder.sae.spec import SaeSpec
from tests.lm import model_table
from tests.lm.causal_architectures import (
    ARCHITECTURES,
    VARIANTS,
    largest_error,
    outcome,
    tiny_config,
)

SCALED = ("cohere", "granite", "hyperclovax", "minicpm3")

SAMPLE = {
    # One of each kind that must be exact: scales, caps, windows, experts, shared or latent keys,
    # positions in many ways, blocks whose index matters.
    **dict.fromkeys(
        (
            *SCALED, "bloom", "cohere2", "deepseek_v3", "gemma2", "gemma3_text", "gpt2, inverse",
            "dbrx", "gemma4, plain", "gpt_neo", "gptj", "granite 4, hybrid", "lfm2", "llama",
            "llama4_text", "mixtral", "olmo2", "opt", "phi3", "qwen2, windows", "qwen3_5_text",
            "smollm3",
            # The text part of a model of several media.
            "gemma3", "gemma4", "llama4", "mistral3", "qwen3_5",
        ),
        "exact",
    ),
    # One of each kind that must be refused: a norm used twice, something besides the residual
    # stream between blocks, states instead of keys, indexers, parts of other media, encoders.
    **dict.fromkeys(
        (
            "axk2", "bamba", "bart", "bert", "chameleon", "dots3_note_text", "falcon, alibi",
            "gemma3, capped", "gemma4_assistant", "gemma4_text", "gemma4, shared keys", "jamba",
            "mamba", "minimax_m3_vl_text", "musicgen", "nanochat", "paligemma", "qwen3_vl",
            "reformer", "zamba",
        ),
        "refused",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
def test_an_architecture_is_exact_or_refused(name: str, tiny_lm_dir: Path) -> None:
    found = outcome(name, tiny_lm_dir)
    assert (found.status, found.error < 1e-4) == (SAMPLE[name], True), found
    if name in ARCHITECTURES:  # variants are not in the page
        assert model_table.verdict(found) == model_table.verdicts()[name]
    if found.status == "refused":
        assert found.reason.startswith("Models of type ")  # refused by name, for a reason


def test_the_page_names_every_type() -> None:
    said = model_table.verdicts()
    assert set(said) == set(ARCHITECTURES), "run `python -m tests.lm.model_table`"
    results = Counter(one.split(":")[0].split(",")[0] for one in said.values())
    assert results["exact"] >= 150
    assert set(results) == {"exact", "refused"}
    page = model_table.PAGE.read_text(encoding="utf-8")
    assert "\n".join(model_table.lines(said)) in page, "edited by hand"


@pytest.mark.slow
@pytest.mark.skipif(
    "RLDECODER_EVERY_ARCHITECTURE" not in os.environ,
    reason="five minutes: set RLDECODER_EVERY_ARCHITECTURE=1 when transformers moves",
)
def test_every_architecture_is_exact_or_refused(tiny_lm_dir: Path) -> None:
    found = [outcome(name, tiny_lm_dir) for name in (*ARCHITECTURES, *VARIANTS)]
    assert [row for row in found if row.status == "wrong"] == []
    said = model_table.try_all(one for one in found if one.name in ARCHITECTURES)
    assert said == model_table.verdicts()


def tiny(name: str, folder: Path, **changes: Any) -> FrozenLM:
    torch.manual_seed(0)
    config = tiny_config(name)
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    return FrozenLM(model, AutoTokenizer.from_pretrained(folder), folder)


@pytest.mark.parametrize("name", SCALED)
def test_scaled_logits_have_scaled_directions_and_gradients(name: str, tiny_lm_dir: Path) -> None:
    lm = tiny(name, tiny_lm_dir)
    ids = torch.randint(1, 512, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own = lm.model(input_ids=ids, use_cache=False).logits
    _, final = lm.resid_and_final(ids, 1)
    torch.testing.assert_close(lm.unembed(final), own, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(final @ lm.unembedding.T, own, atol=1e-5, rtol=1e-5)
    chosen = torch.tensor([5, 7])
    relative = own[0, 0, chosen] - own[0, 0].mean()
    torch.testing.assert_close(lm.choice_directions(chosen) @ final[0, 0], relative)
    assert not torch.allclose(final @ lm.model.get_output_embeddings().weight.T, own, atol=1e-3)
    # The room that is given, and what is sent back, against autograd.
    rows = final[0].clone().requires_grad_()
    logits = lm.unembed(rows)
    assert torch.equal(lm.unembed(rows, out=torch.empty_like(logits)), logits.detach())
    some = torch.tensor([7, 0, 7, 3])
    torch.testing.assert_close(lm.unembed(rows, tokens=some), logits[:, some])
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad((logits * weights).sum(), rows)
    sent = lm.unembed_gradient(logits.detach(), weights.clone())
    torch.testing.assert_close(sent, expected, atol=1e-5, rtol=1e-5)


def test_a_scale_that_nobody_knows_of_is_refused(
    tiny_lm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unembedding, "_SCALE_SETTINGS", {})
    with pytest.raises(
        BadInputError, match=r"'granite' are not supported\. logits differ .* by 3 "
    ):
        prove(tiny("granite", tiny_lm_dir), brief=True)


@pytest.mark.parametrize("name", ["deepseek_v32", "dots3_note_text", "minimax_m3_vl_text"])
def test_a_choice_that_begins_beyond_the_proof_is_refused(name: str, tiny_lm_dir: Path) -> None:
    """As published models have it: a proof of few tokens sees full attention."""
    lm = tiny(name, tiny_lm_dir, index_topk=64, index_block_size=64)
    with pytest.raises(BadInputError, match=r"positions that an index chooses \(`layers\.\d.*`\)"):
        prove(lm, brief=True)


def test_a_model_is_exact_as_far_as_its_context_goes(tiny_lm_dir: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    lm = tiny("phi3", tiny_lm_dir, rope_parameters=rope, original_max_position_embeddings=8)
    assert lm.context_length == 8
    prove(lm)  # a batch of 9 tokens would be read in another way than its shorter row alone


def test_loading_proves(tiny_lm_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("nanochat"))
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_lm_dir).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInputError, match=r"'nanochat' are not supported.* norm is run 2 times"):
        FrozenLM.load(tmp_path / "model")


def test_every_part_is_compared(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    whole: dict[str, Any] = {name: getattr(FrozenLM, name) for name in ("trunk", "tail")}

    def off_by(name: str, when: str) -> None:
        def call(self: FrozenLM, *args: Any, **kwargs: Any) -> Any:
            found = whole[name](self, *args, **kwargs)
            if when == "always" or kwargs.get(when) is not None:
                first: Tensor = found[0] if name == "trunk" else found
                first[:, -1] += 0.01 * first[:, -1].norm()
            return found

        monkeypatch.setattr(FrozenLM, name, call)

    for name, when, said in (
        ("trunk", "always", "residuals at layer 0 differ"),
        ("tail", "always", "logits differ"),
        ("trunk", "attention_mask", "residuals at layer . of padded sequences differ"),
        ("tail", "attention_mask", "final hidden states of padded sequences from layer"),
        ("trunk", "past_key_values", "residuals at layer . with a cache differ"),
        ("tail", "past_key_values", "final hidden states from layer . with a cache differ"),
    ):
        off_by(name, when)
        with pytest.raises(BadInputError, match=said):
            prove(lm)
        monkeypatch.undo()
    prove(lm)


def test_the_hook_layer_in_use_is_proven(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    whole = FrozenLM.tail

    def off_at_three(self: FrozenLM, resid: Tensor, layer: int, **how: Any) -> Tensor:
        found = whole(self, resid, layer, **how)
        return 1.1 * found if layer == 3 and how.get("past_key_values") is not None else found

    monkeypatch.setattr(FrozenLM, "tail", off_at_three)
    prove(lm, brief=True)
    prove(lm, hook_layer=1)
    with pytest.raises(BadInputError, match="final hidden states from layer 3 with a cache differ"):
        prove(lm, hook_layer=3)


def hybrid(folder: Path) -> FrozenLM:
    """Linear attention and full attention in turns."""
    torch.manual_seed(0)
    config = tiny_config("qwen3_5_text")
    config.layer_types = ["linear_attention", "full_attention"] * 2
    model = AutoModelForCausalLM.from_config(config)
    return FrozenLM(model, AutoTokenizer.from_pretrained(folder), folder)


@torch.no_grad()
def test_states_of_linear_attention_are_kept_row_by_row(tiny_lm_dir: Path) -> None:
    lm = hybrid(tiny_lm_dir)
    prove(lm, hook_layer=2)
    common, ends = [7, 8, 9, 10, 11], ([3, 4], [5], [6, 2, 1])
    rows = [torch.tensor([[*common, *end]]) for end in ends]
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - row.shape[1]).long() for row in rows])
    said = prefix_generate(lm.model)(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, eos_token_id=[], pad_token_id=0
    )[:, longest:]
    for row, answer in zip(rows, said.tolist(), strict=True):
        for token in answer:  # the plain way: the whole text again for every token
            expected = int(lm.model(input_ids=row, use_cache=False).logits[0, -1].argmax())
            assert token == expected
            row = torch.cat([row, torch.tensor([[token]])], dim=1)


@torch.no_grad()
def test_a_decoder_writes_with_states_as_without(tiny_lm_dir: Path) -> None:
    lm = hybrid(tiny_lm_dir)
    spec = SaeSpec(d_model=lm.d_model, num_latents=64, k=6, hook_layer=2)
    decoder = new_decoder(lm, Sae.random_init(spec, seed=1))
    torch.nn.init.normal_(decoder.W)
    ids = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 2, 6, 5]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    written = [
        decoder.generate(
            ids, attention_mask=mask, max_new_tokens=5, use_cache=use_cache, do_sample=False
        ).tolist()
        for use_cache in (True, False)
    ]
    assert written[0] == written[1]


def test_blocks_that_all_keep_states_have_no_cache(tiny_lm_dir: Path) -> None:
    lm = hybrid(tiny_lm_dir)
    assert [lm.has_caches(layer) for layer in range(1, 5)] == [False, True, True, True]
    with pytest.raises(BadInputError, match="a `hook_layer` with a block of full attention before"):
        lm.trunk(torch.tensor([[1, 2]]), 1, use_cache=True)
    with pytest.raises(BadInputError, match="no attention over positions"):
        BlockDecoder.copy_from(block_decoder(lm, 2), lm.base)
    BlockDecoder.copy_from(block_decoder(lm, 3), lm.base)


def block_decoder(lm: FrozenLM, number: int) -> BlockDecoder:
    """A decoder with a copy of one block."""
    config = SaeDecoderConfig(
        kind="transformer", d_model=lm.d_model, vocab_size=lm.vocab_size, num_latents=64,
        hook_layer=2, blocks=[number], block_config=lm.model.config.to_dict(),
    )  # fmt: skip
    return BlockDecoder(config)


def test_numbers_that_do_not_fit_the_dtype_are_no_support_problem(tiny_llama_dir: Path) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    with torch.no_grad():
        lm.base.get_submodule(lm._norm_name).weight.fill_(1e38)
    with pytest.raises(NumericalError, match="NaN or infinity on ordinary tokens"):
        prove(lm)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference(tiny_lm_dir: Path, tiny_llama_dir: Path, dtype: Any) -> None:
    for folder in (tiny_lm_dir, tiny_llama_dir):
        assert FrozenLM.load(folder, dtype=dtype).dtype == dtype


def test_the_oracle_can_fail(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    assert largest_error(lm) < 1e-4
    right = lm.unembed
    monkeypatch.setattr(lm, "unembed", lambda final: 2 * right(final))
    assert largest_error(lm) == pytest.approx(1, rel=1e-3)
