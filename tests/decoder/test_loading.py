"""Loading decoders and affine lenses, good and bad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rldecoder.decoder.loading import (
    AffineLens,
    decoder_from_lens,
    load_decoder,
    read_affine_lens,
    save_decoder,
)
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae


def test_start_reads_the_reconstruction_through_the_lens(
    lm: FrozenLM, sae: Sae, lens: AffineLens
) -> None:
    decoder = decoder_from_lens(lm, sae, lens)
    resid = torch.randn(5, 64)
    output = sae(resid)
    torch.testing.assert_close(
        decoder.hidden(output.latents), output.recon @ lens.A + lens.c, atol=1e-5, rtol=1e-5
    )


def test_lens_round_trip_and_missing_layer(lens: AffineLens, tmp_path: Path) -> None:
    path = tmp_path / "affine_lens.safetensors"
    tensors = {"A.2": lens.A, "c.2": lens.c, "A.3": lens.A.clone(), "c.3": lens.c.clone()}
    save_file(tensors, path)
    found = read_affine_lens(path, 2)
    assert torch.equal(found.A, lens.A)
    assert torch.equal(found.c, lens.c)
    with pytest.raises(BadInputError, match=r"layer 1.*\[2, 3\].*lens_layers"):
        read_affine_lens(path, 1)


def test_damaged_lens_file(tmp_path: Path) -> None:
    path = tmp_path / "affine_lens.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(DamagedFileError):
        read_affine_lens(path, 2)
    with pytest.raises(DamagedFileError):
        read_affine_lens(tmp_path / "absent.safetensors", 2)


def test_no_decoder_in_the_folder(lm: FrozenLM, sae: Sae, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no decoder"):
        load_decoder(tmp_path, lm, sae)


def test_truncated_weights(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, tmp_path: Path
) -> None:
    save_decoder(decoder, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DamagedFileError):
        load_decoder(tmp_path, lm, sae)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_wrong_tensors(
    change: str, decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, tmp_path: Path
) -> None:
    save_decoder(decoder, tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    if change == "missing":
        del tensors["model.b"]
    elif change == "unknown":
        tensors["extra"] = torch.zeros(2)
    else:
        tensors["model.W"] = torch.zeros(5, 64)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DamagedFileError):
        load_decoder(tmp_path, lm, sae)
