"""Linear decoders and those with blocks behind one interface."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rldecoder.decoder.blocks import BlockDecoder
from rldecoder.decoder.loading import save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.decoder.upper import LinearDecoder
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae


@pytest.fixture
def with_blocks(lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
    return new_decoder(lm, sae, [3])


def test_each_kind_has_its_type(
    decoder: SaeDecoderForCausalLM, with_blocks: SaeDecoderForCausalLM
) -> None:
    assert isinstance(decoder.upper, LinearDecoder)
    assert isinstance(with_blocks.upper, BlockDecoder)
    assert with_blocks.blocks is with_blocks.upper
    assert (decoder.looks_back, with_blocks.looks_back) == (False, True)
    assert (decoder.upper.numbers, with_blocks.upper.numbers) == ((), (3,))


def test_a_linear_decoder_predicts_what_its_latents_add_up_to(
    decoder: SaeDecoderForCausalLM,
) -> None:
    resid, row = torch.randn(4, decoder.config.d_model), torch.arange(4)
    for found in (
        decoder.upper(resid), decoder.upper.direct(resid), decoder.upper.of_rows(resid, row, row)
    ):  # fmt: skip
        assert torch.equal(found, resid)


def test_blocks_of_a_linear_decoder_are_refused_by_name(decoder: SaeDecoderForCausalLM) -> None:
    with pytest.raises(BadInputError, match="linear decoder has no blocks"):
        _ = decoder.blocks


def test_saved_weights_keep_their_names(
    decoder: SaeDecoderForCausalLM, with_blocks: SaeDecoderForCausalLM, tmp_path: Path
) -> None:
    """Folders of earlier versions load; these names are theirs."""
    names = []
    for number, each in enumerate((decoder, with_blocks)):
        save_decoder(each, tmp_path / str(number))
        names.append(set(load_file(tmp_path / str(number) / "model.safetensors")))
    assert names[0] == {"model.W", "model.b"}
    assert {"model.W", "model.b", "model.blocks.sinks", "model.blocks.out.weight"} <= names[1]
    own = names[1] - names[0]
    assert all(name.startswith("model.blocks.") for name in own)
