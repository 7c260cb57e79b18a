"""The SAE as a module and as files: arithmetic against naive loops, the sae_lens layout, damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.sae.model import Sae, SaeSpec, SparseLatents, fold_input_scale

TOPK = SaeSpec(architecture="topk", d_model=12, num_latents=40, k=5, hook_layer=3, model_name="m")
RELU = SaeSpec(architecture="relu", d_model=12, num_latents=40, hook_layer=0)
JUMP = SaeSpec(architecture="jumprelu", d_model=12, num_latents=40, trained_as="batchtopk")


def random_sae(spec: SaeSpec, seed: int = 0) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    sae = Sae(spec)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return sae.requires_grad_(False)


def naive_recon(sae: Sae, x: Tensor) -> Tensor:
    """One token at a time, in float64, by the definition in the module docstring."""
    W_enc, b_enc = sae.W_enc.double(), sae.b_enc.double()
    rows = []
    for token in x.reshape(-1, sae.d_model).double():
        pre_acts = (token - sae.b_dec.double()) @ W_enc + b_enc
        order = pre_acts.argsort(descending=True)[: sae.spec.k or sae.num_latents]
        recon = sae.b_dec.double().clone()
        for latent in order.tolist():
            floor = float(sae.threshold[latent]) if sae.spec.architecture == "jumprelu" else 0.0
            act = float(pre_acts[latent])
            recon += (act if act > max(floor, 0.0) else 0.0) * sae.W_dec[latent].double()
        rows.append(recon)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("spec", [TOPK, RELU, JUMP])
def test_forward_is_the_definition(spec: SaeSpec) -> None:
    sae, x = random_sae(spec), torch.randn(2, 7, 12)
    out = sae(x)
    torch.testing.assert_close(out.recon.double(), naive_recon(sae, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [TOPK, RELU, JUMP])
def test_dense_and_sparse_agree(spec: SaeSpec) -> None:
    sae, x = random_sae(spec), torch.randn(3, 4, 12)
    latents, dense = sae.encode(x), sae.encode_dense(x)
    rebuilt = torch.zeros_like(dense).scatter_add(-1, latents.indices, latents.acts)
    torch.testing.assert_close(rebuilt, dense)
    torch.testing.assert_close(sae.decode(latents), dense @ sae.W_dec + sae.b_dec)


@given(st.integers(1, 40), st.integers(0, 10_000))
def test_topk_keeps_exactly_the_k_largest(k: int, seed: int) -> None:
    spec = SaeSpec(architecture="topk", d_model=12, num_latents=40, k=k)
    sae = random_sae(spec, seed)
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(seed))
    latents = sae.encode(x)
    assert latents.acts.shape == latents.indices.shape == (6, k)
    assert all(len(set(row)) == k for row in latents.indices.tolist())
    want = torch.relu(sae.pre_acts(x).sort(descending=True).values[:, :k])
    assert torch.equal(latents.acts.sort(descending=True).values, want)


def test_padding_adds_nothing() -> None:
    sae = random_sae(TOPK)
    one = SparseLatents(torch.tensor([[2.0]]), torch.tensor([[7]]))
    padded = SparseLatents(torch.tensor([[2.0, 0.0]]), torch.tensor([[7, 31]]))
    assert torch.equal(sae.decode(one), sae.decode(padded))


def test_bfloat16_input_is_computed_in_float32() -> None:
    sae, x = random_sae(TOPK), torch.randn(4, 12).bfloat16()
    out = sae(x)
    assert out.recon.dtype == torch.float32
    assert torch.equal(out.recon, sae(x.float()).recon)


@pytest.mark.parametrize("spec", [TOPK, RELU, JUMP])
def test_save_and_load_round_trip(spec: SaeSpec, tmp_path: Path) -> None:
    sae, x = random_sae(spec), torch.randn(5, 12)
    sae.save(tmp_path)
    loaded = Sae.load(tmp_path)
    assert loaded.spec == spec
    assert torch.equal(loaded(x).recon, sae(x).recon)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_files_are_what_sae_lens_reads(tmp_path: Path) -> None:
    """The keys that sae_lens 6.54 needs, with no tensor beyond its four."""
    random_sae(TOPK).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "topk"
    assert (config["d_in"], config["d_sae"], config["k"]) == (12, 40, 5)
    needed = {"dtype", "device", "apply_b_dec_to_input", "normalize_activations"}
    assert needed | {"reshape_activations", "rescale_acts_by_decoder_norm"} <= config.keys()
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (12, 40), "b_enc": (40,), "W_dec": (40, 12), "b_dec": (12,)}


def test_sae_lens_options_are_folded(tmp_path: Path) -> None:
    """`apply_b_dec_to_input: false` and decoder-norm rescaling, against sae_lens's formulas."""
    sae, x = random_sae(TOPK), torch.randn(6, 12)
    sae.save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    config |= {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    del config["metadata"]["hook_layer"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    norm = sae.W_dec.norm(dim=1)
    pre_acts = (x @ sae.W_enc + sae.b_enc) * norm
    kept = pre_acts.topk(5)
    acts = torch.zeros_like(pre_acts).scatter(1, kept.indices, kept.values.relu())
    want = acts / norm @ sae.W_dec + sae.b_dec
    loaded = Sae.load(tmp_path)
    torch.testing.assert_close(loaded(x).recon, want, rtol=1e-4, atol=1e-4)
    assert loaded.spec.hook_layer == 3


@given(st.floats(0.01, 100), st.sampled_from([TOPK, RELU, JUMP]))
def test_folding_the_scale_is_equivalent(scale: float, spec: SaeSpec) -> None:
    """recon_raw(x) * scale == recon_scaled(scale * x), and folding back restores the weights."""
    sae, x = random_sae(spec), torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    raw = fold_input_scale(sae, scale)
    scaled = sae(x * scale)
    # Where two pre-activations nearly tie, rounding may pick another one: compare the others.
    pre_acts = sae.pre_acts(x * scale).sort(descending=True).values
    gap = pre_acts[:, 4] - pre_acts[:, 5] if spec.k else torch.ones(8)
    clear = gap > 1e-3 * pre_acts.abs().amax(1)
    torch.testing.assert_close(
        (raw(x).recon * scale)[clear], scaled.recon[clear], rtol=1e-3, atol=1e-3 * max(scale, 1)
    )
    back = fold_input_scale(raw, 1 / scale)
    torch.testing.assert_close(back.b_enc, sae.b_enc, rtol=1e-6, atol=0)
    torch.testing.assert_close(back.b_dec, sae.b_dec, rtol=1e-6, atol=0)


def test_folding_a_power_of_two_is_exact() -> None:
    sae, x = random_sae(TOPK), torch.randn(8, 12)
    assert torch.equal(fold_input_scale(sae, 4.0)(x).recon * 4.0, sae(x * 4.0).recon)


def test_random_init_is_a_function_of_its_seed() -> None:
    first, again, other = (Sae.random_init(TOPK, seed) for seed in (1, 1, 2))
    assert torch.equal(first.W_dec, again.W_dec)
    assert not torch.equal(first.W_dec, other.W_dec)
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(first.W_enc, first.W_dec.T)


@pytest.mark.parametrize(
    "change", [{"k": 41}, {"k": 0}, {"k": None}, {"architecture": "relu"}, {"d_model": 0}]
)
def test_impossible_specs_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SaeSpec(**(TOPK.model_dump() | change))


def _damage_truncate(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-40])


def _damage_nan(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][3, 3] = float("nan")
    save_file(tensors, folder / "sae_weights.safetensors")


def _damage_shape(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"][:, 1:].contiguous()
    save_file(tensors, folder / "sae_weights.safetensors")


def _damage_extra(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"threshold": torch.ones(40)}, folder / "sae_weights.safetensors")


def _damage_config(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")


def _damage_keys(folder: Path) -> None:
    (folder / "cfg.json").write_text("{}")


def _damage_k(folder: Path) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"k": 400}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_damage_truncate, "cannot be read"),
        (_damage_nan, "NaN"),
        (_damage_shape, "shape"),
        (_damage_extra, "exactly"),
        (_damage_config, "cannot be read"),
        (_damage_keys, "not an SAE"),
        (_damage_k, "no valid SAE"),
    ],
)
def test_damage_is_named(damage: object, says: str, tmp_path: Path) -> None:
    random_sae(TOPK).save(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(DamagedFileError, match=says):
        Sae.load(tmp_path)


def test_missing_and_unsupported_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is missing"):
        Sae.load(tmp_path / "nothing")
    random_sae(TOPK).save(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for change in ({"architecture": "gated"}, {"normalize_activations": "layer_norm"}):
        (tmp_path / "cfg.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInputError, match="cannot be used"):
            Sae.load(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(BadInputError, match="missing"):
        Sae.load(tmp_path)
