"""SAEs of others, form by form: the same bits, the same numbers, or a refusal by name."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from safetensors.torch import load_file, save_file

from rldecoder.config.sae import PretrainedSae
from rldecoder.errors import BadInputError, DamagedFileError, RlDecoderError
from rldecoder.sae.fit import Surroundings, check_fit, described
from rldecoder.sae.folders import SaeFolder, recognise
from rldecoder.sae.interop import write_sae
from rldecoder.sae.model import Sae, subtract_b_dec
from rldecoder.sae.pretrained import PretrainedWeights, read_weights
from rldecoder.sae.releases import find, release_folder
from tests.sae.foreign_folders import (
    BLOCK,
    FORMS,
    Foreign,
    changed_config,
    random_weights,
    write_config,
    write_foreign,
)
from tests.sae.test_interop import METADATA, assert_same, randomise

D_MODEL, NUM_LATENTS = 24, 96
INPUTS = torch.randn(200, D_MODEL, generator=torch.Generator().manual_seed(5)) * 2 + 0.3


def foreign(form: str, root: Path, dtype: torch.dtype = torch.float32) -> Foreign:
    """An SAE of `INPUTS`' width."""
    return write_foreign(form, root, random_weights(D_MODEL, NUM_LATENTS, dtype=dtype))


def weights_in(folder: Path, **stated: Any) -> PretrainedWeights:
    """What a folder is read as."""
    found = recognise(folder, stated)
    return read_weights(found, described(found), "random")


def loaded(weights: PretrainedWeights, folder: Path) -> Sae:
    """As the stage publishes it and everything after reads it."""
    write_sae(folder, weights.spec, weights.tensors, rescaled=weights.rescaled)
    return Sae.load(folder)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_and_the_same_numbers(form: str, tmp_path: Path) -> None:
    theirs = foreign(form, tmp_path)
    read = weights_in(theirs.folder)
    assert read.spec.hook_layer == BLOCK + 1
    assert read.changes == []
    ours = loaded(read, tmp_path / "published")
    held = load_file(tmp_path / "published" / "sae_weights.safetensors")
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + ["threshold"] * (theirs.k is None)
    assert set(held) == set(names)
    for name in names:
        assert torch.equal(held[name], getattr(theirs.weights, name)), name

    acts = theirs.acts(INPUTS)
    assert 0 < float((acts > 0).double().mean()) < 0.5
    torch.testing.assert_close(ours.encode_dense(INPUTS).double(), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours(INPUTS).recon.double(), theirs.recon(INPUTS), rtol=1e-5, atol=1e-5
    )


def test_sae_lens_reads_what_we_publish_of_others(tmp_path: Path) -> None:
    """Gemma Scope's b_dec is not subtracted, and the published config says so."""
    ours = loaded(weights_in(foreign("gemma_npz", tmp_path).folder), tmp_path / "published")
    assert not ours.spec.b_dec_is_subtracted
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "published")
    with torch.no_grad():
        torch.testing.assert_close(ours(INPUTS).recon, theirs(INPUTS), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            subtract_b_dec(ours)(INPUTS).recon, theirs(INPUTS), rtol=1e-4, atol=1e-4
        )
    random = Sae.random_init(ours.spec, 0, INPUTS.mean(0))
    assert random.spec.b_dec_is_subtracted, "the control is as good as one can be"


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("TopKSAE", {"k": 7}),
        ("TopKSAE", {"k": 7, "rescale_acts_by_decoder_norm": True}),
        ("StandardSAE", {"apply_b_dec_to_input": False}),
        ("JumpReLUSAE", {}),
    ],
)
def test_a_folder_saved_by_the_real_sae_lens(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = getattr(sae_lens, f"{kind}Config")(d_in=24, d_sae=160, metadata=METADATA, **changes)
    theirs = getattr(sae_lens, kind)(config)
    randomise(dict(theirs.named_parameters()))
    theirs.save_model(tmp_path / "theirs")
    ours = loaded(weights_in(tmp_path / "theirs"), tmp_path / "published")
    assert_same(ours, theirs)
    before = load_file(tmp_path / "theirs" / "sae_weights.safetensors")
    after = load_file(tmp_path / "published" / "sae_weights.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_widened_without_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = foreign("sae_lens", tmp_path, dtype)
    read = weights_in(theirs.folder)
    assert read.dtypes == [str(dtype).removeprefix("torch.")]
    for name, tensor in read.tensors.items():
        assert torch.equal(tensor.to(dtype), getattr(theirs.weights, name))


def test_what_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights = random_weights(D_MODEL, NUM_LATENTS, dtype=torch.float64)
    fine = weights._replace(b_dec=weights.b_dec + 1e-12)
    with pytest.raises(BadInputError, match="float64 numbers that float32 does not"):
        weights_in(write_foreign("sae_lens", tmp_path, fine).folder)


@pytest.mark.parametrize("where", ["stated", "config", "scaler"])
def test_input_normalisation_is_folded(where: str, tmp_path: Path) -> None:
    """Their training scales residuals by a factor that their weights do not hold."""
    theirs, scale = foreign("sae_lens", tmp_path), 0.37
    changed_config(theirs.folder, normalize_activations="expected_average_only_in")
    with pytest.raises(BadInputError, match="normalize_activations"):
        described(recognise(theirs.folder, {}))
    stated = {"norm_scaling_factor": scale} if where == "stated" else {}
    if where == "config":
        changed_config(theirs.folder, norm_scaling_factor=scale)
    if where == "scaler":
        write_config(theirs.folder, {"scaling_factor": scale}, "activation_scaler.json")
    read = weights_in(theirs.folder, **stated)
    assert "0.37" in read.changes[0]
    ours = loaded(read, tmp_path / "published")
    x = INPUTS / scale
    torch.testing.assert_close(
        ours.encode_dense(x).double(), theirs.acts(INPUTS), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ours(x).recon.double() * scale, theirs.recon(INPUTS), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale", "covariance_whitening"])
def test_other_normalisation_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    theirs = foreign("sae_lens", tmp_path)
    changed_config(theirs.folder, normalize_activations=kind)
    with pytest.raises(BadInputError, match=kind):
        described(recognise(theirs.folder, {"norm_scaling_factor": 0.5}))


def renamed(folder: Path, *names: str) -> Path:
    """The same files under the last folders' other names."""
    target = folder.parents[len(names) - 1].joinpath(*names)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder, target)
    return target


@pytest.mark.parametrize(
    ("form", "names", "said"),
    [
        ("gemma_npz", ("gemma-scope-2b-pt-mlp", "layer_2", "width_16k", "l0"), "hook_mlp_out"),
        ("gemma_npz", ("gemma-scope-2b-pt-att", "layer_2", "width_16k", "l0"), "hook_z"),
        ("gemma_npz", ("gemma-scope-2b-pt-transcoders", "layer_2", "width", "l0"), "hook_mlp_in"),
        ("gemma_npz", ("gemma-scope-2b-pt-res", "embedding", "width_4k", "l0"), "hook_embed"),
        ("sparsify", ("tiny", "layers.2.mlp"), "layers.2.mlp"),
        ("sparsify", ("tiny", "layers.2.self_attn"), "layers.2.self_attn"),
        ("sparsify", ("tiny", "embed_tokens"), "hook_embed"),
    ],
)
def test_what_is_no_residual_stream_is_refused_by_name(
    form: str, names: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    folder = renamed(foreign(form, tmp_path / "a").folder, *names)
    with pytest.raises(BadInputError, match=said):
        described(recognise(folder, {}))


@pytest.mark.parametrize(
    ("form", "file", "changes", "said"),
    [
        ("gemma_safetensors", "config.json", {"hf_hook_point_out": "model.layers.2.x"}, "transc"),
        ("gemma_safetensors", "config.json", {"hf_hook_point_in": "model.layers.2.mlp"}, "mlp"),
        ("gemma_safetensors", "config.json", {"architecture": "topk"}, "'topk'"),
        ("sparsify", "cfg.json", {"transcode": True}, "transcode"),
        ("sparsify", "cfg.json", {"skip_connection": True}, "skip_connection"),
        ("sparsify", "cfg.json", {"activation": "groupmax"}, "groupmax"),
        ("sparsify", "cfg.json", {"signed": True}, "signed"),
        ("sparsify", "cfg.json", {"act_fn": "gelu"}, "act_fn"),
        ("sparsify", "cfg.json", {"k": 97}, "no valid SAE"),
        ("sparsify", "cfg.json", {"num_latents": 48}, "shape"),
        ("sae_lens", "cfg.json", {"d_sae": 95}, "shape"),
        ("sae_lens", "cfg.json", {"d_in": 23}, "shape"),
        ("sae_lens", "cfg.json", {"architecture": "gated"}, "gated"),
        ("sae_lens", "cfg.json", {"architecture": "batchtopk"}, "batchtopk"),
        ("sae_lens", "cfg.json", {"architecture": "jumprelu_transcoder"}, "transcoder"),
        ("sae_lens", "cfg.json", {"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, "mlp_out"),
        ("sae_lens", "cfg.json", {"metadata": {"hook_name": "blocks.2.attn.hook_z"}}, "hook_z"),
        ("sae_lens", "cfg.json", {"metadata": {"hook_name": "blocks.2.hook_resid_mid"}}, "_mid"),
        ("sae_lens", "cfg.json", {"metadata": {"prepend_bos": "yes"}}, "prepend_bos"),
        (
            "sae_lens", "cfg.json",
            {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
            "center_writing_weights",
        ),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused_by_name(
    form: str, file: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = foreign(form, tmp_path).folder
    weights_in(folder)
    changed_config(folder, file, **changes)
    with pytest.raises(RlDecoderError, match=said):
        weights_in(folder)


def test_a_transcoder_with_a_skip_is_refused_whatever_its_config_says(tmp_path: Path) -> None:
    folder = foreign("gemma_safetensors", tmp_path).folder
    tensors = load_file(folder / "params.safetensors")
    skip = torch.zeros(D_MODEL, D_MODEL)
    save_file(tensors | {"affine_skip_connection": skip}, folder / "params.safetensors")
    with pytest.raises(BadInputError, match="affine_skip_connection"):
        described(recognise(folder, {}))


def test_what_no_name_says_must_be_said(tmp_path: Path) -> None:
    folder = renamed(foreign("gemma_npz", tmp_path / "a").folder, "my", "downloads", "sae", "x")
    with pytest.raises(BadInputError, match=r"train_sae\.pretrained\.hook_name"):
        recognise(folder, {})
    found = recognise(folder, {"hook_name": "model.layers.2", "model_name": "gemma-2-2b"})
    assert described(found).hook_layer == 3
    with pytest.raises(BadInputError, match="hook_mlp_out"):
        described(recognise(folder, {"hook_name": "blocks.2.hook_mlp_out"}))


@pytest.mark.parametrize("form", FORMS)
def test_what_a_folder_says_is_not_overruled(form: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="not overruled"):
        recognise(foreign(form, tmp_path).folder, {"hook_name": "blocks.9.hook_resid_post"})


def test_a_stated_k_must_mean_something(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="has no k"):
        described(recognise(foreign("sae_lens", tmp_path).folder, {"k": 5}))


@pytest.mark.parametrize("model", ["gpt2-small", "pythia-70m", "tiny-stories-1L-21M"])
def test_old_saes_must_say_that_nothing_was_centred(model: str, tmp_path: Path) -> None:
    """gpt2-small-res-jb reads a centred residual stream, and its folder does not say so."""
    folder = foreign("sae_lens", tmp_path).folder
    old = {"model_name": model, "sae_lens_version": "3.9.0"}
    changed_config(folder, metadata=old | {"model_from_pretrained_kwargs": {"n_devices": 1}})
    with pytest.raises(BadInputError, match="center_writing_weights: false"):
        described(recognise(folder, {}))
    assert described(recognise(folder, {"center_writing_weights": False})).hook_layer == 3
    with pytest.raises(BadInputError, match="center_writing_weights"):
        described(recognise(folder, {"center_writing_weights": True}))

    # Said in the config, or of a model that has no mean: fine.
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    changed_config(folder, metadata=old | kwargs)
    assert described(recognise(folder, {})).hook_layer == 3
    changed_config(
        folder, metadata=old | {"model_name": "gemma-2b", "model_from_pretrained_kwargs": {}}
    )
    assert described(recognise(folder, {})).hook_layer == 3


def test_the_first_configs_of_sae_lens(tmp_path: Path) -> None:
    """Without an architecture, and with the names of old, beside what the user says."""
    folder = foreign("sae_lens", tmp_path).folder
    tensors = load_file(folder / "sae_weights.safetensors")
    del tensors["threshold"]
    save_file(tensors, folder / "sae_weights.safetensors")
    write_config(folder, {
        "d_in": D_MODEL, "d_sae": NUM_LATENTS, "model_name": "gpt2-small", "context_size": 128,
        "hook_point": "blocks.2.hook_resid_pre", "hook_point_layer": 2, "prepend_bos": True,
    })  # fmt: skip
    stated = {"center_writing_weights": False}
    found = described(recognise(folder, stated))
    assert (found.architecture, found.hook_layer, found.prepend_bos) == ("relu", 2, True)
    with pytest.raises(BadInputError, match="not overruled"):
        recognise(folder, stated | {"hook_name": "blocks.3.hook_resid_pre"})


def test_pickles_are_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"W_enc": torch.zeros(2)}, tmp_path / "layer3.sae.pt")
    with pytest.raises(BadInputError, match=r"layer3\.sae\.pt is a pickle.*weights_only=True"):
        recognise(tmp_path, {})
    np.savez(tmp_path / "params.npz", W_enc=np.array([{}], dtype=object))
    with pytest.raises(BadInputError, match="pickled objects"):
        recognise(tmp_path, {"hook_name": "blocks.2.hook_resid_post"})


def test_folders_without_an_sae_say_where_one_is(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such folder"):
        recognise(tmp_path / "nowhere", {})
    with pytest.raises(BadInputError, match="sae_lens"):
        recognise(tmp_path, {})
    folder = foreign("sparsify", tmp_path).folder
    with pytest.raises(BadInputError, match=f"sae-tiny/{folder.name}"):
        recognise(tmp_path, {})


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_said_to_be(form: str, tmp_path: Path) -> None:
    folder = foreign(form, tmp_path).folder
    path = recognise(folder, {}).weights
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DamagedFileError, match="cannot be read"):
        weights_in(folder)


def fit(found: SaeFolder, *accept: str, **changes: Any) -> tuple[str, ...]:
    """Whether an SAE of layer 3, width 24 fits a run that differs by `changes`."""
    around = Surroundings(3, 64, False, D_MODEL, 4, ("random",))._replace(**changes)
    return check_fit(described(found), found.config["d_in"], around, accept)


def test_whether_it_fits_the_run(tmp_path: Path) -> None:
    found = recognise(foreign("sae_lens", tmp_path).folder, {})
    assert fit(found) == ()
    assert fit(found, bos=None, d_model=None, num_layers=None, model_names=()) == ()
    with pytest.raises(BadInputError, match=r"hook_layer: 3.*baselines\.lens_layers"):
        fit(found, hook_layer=2)
    with pytest.raises(BadInputError, match="width 24"):
        fit(found, d_model=32)
    with pytest.raises(BadInputError, match="has 2 blocks"):
        fit(found, num_layers=2)
    with pytest.raises(BadInputError, match=r"BOS.*accept: \[bos\]"):
        fit(found, bos=True)
    with pytest.raises(BadInputError, match=r"ingest\.context_length: 64.*\[context_length\]"):
        fit(found, context_length=65)
    both = fit(found, "bos", "context_length", bos=True, context_length=65)
    assert len(both) == 2
    assert "run's model is other" in fit(found, model_names=("other",))[0]
    changed_config(found.weights.parent, metadata={"prepend_bos": True})
    with pytest.raises(BadInputError, match="begins with the BOS token"):
        fit(recognise(found.weights.parent, {}))


@pytest.mark.parametrize(
    ("claimed", "name"),
    [("gpt2-small", "openai-community/gpt2"), ("gemma-2-2b", "gemma2_2b"),
     ("EleutherAI/pythia-160m", "pythia-160m"), ("google/gemma-2-2b", "google/gemma-2-2b@0a1b")],
)  # fmt: skip
def test_one_model_under_its_names(claimed: str, name: str, tmp_path: Path) -> None:
    folder = foreign("sae_lens", tmp_path).folder
    changed_config(folder, metadata={"model_name": claimed})
    assert fit(recognise(folder, {}), model_names=(name,)) == ()


def test_a_release_is_brought_by_sae_lens_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real package, with a hub of one folder."""
    theirs = foreign("sae_lens", tmp_path / "hub")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id: str, filename: str, **more: Any) -> str:
        path = tmp_path / "hub" / filename
        if not path.is_file():
            raise loaders.EntryNotFoundError.__new__(loaders.EntryNotFoundError)
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))
    config = PretrainedSae(release="someone/tiny-saes", id="mine")
    read = read_weights(found := find(config), described(found), "random")
    assert all(torch.equal(read.tensors[n], t) for n, t in theirs.weights._asdict().items())

    # From the cache: neither the package nor the hub is needed any more.
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    shutil.rmtree(tmp_path / "hub")
    assert find(config).weights == found.weights
    with pytest.raises(BadInputError, match=r"pip install .*\[pretrained\]"):
        release_folder("someone/tiny-saes", "another")


def test_a_release_that_is_not_there_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path))
    with pytest.raises(BadInputError, match=r"layer_99 of gemma-scope-2b-pt-res-canonical.*ID"):
        release_folder("gemma-scope-2b-pt-res-canonical", "layer_99")
    assert not list((tmp_path / "saes").iterdir())


def test_what_is_said_of_an_sae_is_in_its_own_words() -> None:
    config = PretrainedSae(folder=Path("x"), k=4, accept=("bos",))
    assert config.stated == {"k": 4}
    assert config.digest_fields().keys() & {"folder", "release", "id", "k"} == {"k"}
