"""Both ways with the real sae_lens: what one saves, the other reads and computes alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from torch import Tensor

from rldecoder.errors import BadInputError
from rldecoder.sae.model import Sae
from rldecoder.sae.spec import SaeSpec

D_MODEL, NUM_LATENTS, K = 24, 160, 7
SHAPE: dict[str, Any] = {
    "d_model": D_MODEL, "num_latents": NUM_LATENTS, "hook_layer": 3, "model_name": "tiny",
}  # fmt: skip
SPECS = [
    SaeSpec(architecture="topk", k=K, **SHAPE),
    SaeSpec(architecture="relu", **SHAPE),
    SaeSpec(architecture="jumprelu", trained_as="matryoshka", **SHAPE),
]
METADATA = sae_lens.saes.sae.SAEMetadata(
    hook_name="blocks.5.hook_resid_post", hook_layer=5, model_name="tiny"
)
INPUTS = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(3)) * 5 + 1


def randomise(named: dict[str, Tensor]) -> None:
    """Values of a trained SAE's kind; thresholds above 0."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in sorted(named.items()):
        values = 0.3 * torch.randn(tensor.shape, generator=generator)
        tensor.data.copy_(values.abs() + 0.5 if "threshold" in name else values)


def assert_same(ours: Sae, theirs: Any) -> None:
    """Activations and reconstructions agree, and are not trivially zero."""
    with torch.no_grad():
        acts = theirs.encode(INPUTS)
        acts = acts.to_dense() if acts.is_sparse else acts
        assert 0 < float((acts > 0).float().mean()) < 0.7
        torch.testing.assert_close(ours.encode_dense(INPUTS), acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(INPUTS).recon, theirs(INPUTS), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.architecture)
def test_sae_lens_loads_ours(spec: SaeSpec, tmp_path: Path) -> None:
    sae = Sae(spec)
    randomise(dict(sae.named_parameters()))
    sae.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(sae, theirs)
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert theirs.cfg.metadata.training_architecture == (spec.trained_as or None)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("TopKSAE", {"k": K}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("StandardSAE", {}),
        ("StandardSAE", {"apply_b_dec_to_input": False}),
        ("JumpReLUSAE", {}),
        ("JumpReLUSAE", {"apply_b_dec_to_input": False}),
    ],
)
def test_we_load_theirs(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(sae_lens, f"{kind}Config")(
        d_in=D_MODEL, d_sae=NUM_LATENTS, metadata=METADATA, **changes
    )
    theirs = getattr(sae_lens, kind)(config)
    randomise(dict(theirs.named_parameters()))
    theirs.save_model(tmp_path)
    assert_same(Sae.load(tmp_path), theirs)
    assert Sae.load(tmp_path).spec.hook_layer == 6


def test_their_batchtopk_training_arrives_as_thresholds(tmp_path: Path) -> None:
    """sae_lens itself saves such SAEs for inference as jumprelu."""
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=D_MODEL, d_sae=NUM_LATENTS, k=K, metadata=METADATA
    )
    trained = sae_lens.BatchTopKTrainingSAE(config)
    randomise(dict(trained.named_parameters()))
    trained.topk_threshold.fill_(1.5)
    trained.save_inference_model(tmp_path)
    assert Sae.load(tmp_path).spec.architecture == "jumprelu"
    assert_same(Sae.load(tmp_path), sae_lens.SAE.load_from_disk(tmp_path))


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    config = sae_lens.GatedSAEConfig(d_in=D_MODEL, d_sae=NUM_LATENTS, metadata=METADATA)
    sae_lens.GatedSAE(config).save_model(tmp_path)
    with pytest.raises(BadInputError, match="gated"):
        Sae.load(tmp_path)
