"""Which SAE a folder holds: recognised by its files, its config put into sae_lens's words.

Four forms are read: sae_lens, Gemma Scope, sparsify, and Qwen Scope once it is safetensors. What a
form leaves to the names of folders (layer, hook point, model) is taken from those; what it leaves
out must be said in `train_sae.pretrained`. Nothing here imports torch or reads weights, so that a
misfit is known before any work; `rldecoder.sae.pretrained` reads them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_text import read_json_file
from rldecoder.sae.foreign import SCALE, Settings, renamed

_LENS_WEIGHTS, _SPARSIFY_WEIGHTS, _CONFIG = "sae_weights.safetensors", "sae.safetensors", "cfg.json"
_GEMMA_WEIGHTS = ("params.safetensors", "params.npz")
_LENS_SCALER = "activation_scaler.json"
_PICKLES = ("*.pt", "*.pth", "*.bin", "*.pkl", "*.ckpt")
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

_GEMMA_2 = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(\w+)")
_GEMMA_3 = re.compile(r"gemma-scope-2-(\d+[bm])-(pt|it)")
_GEMMA_SITES = {
    "res": "hook_resid_post", "resid_post": "hook_resid_post", "resid_post_all": "hook_resid_post",
    "mlp": "hook_mlp_out", "mlp_out": "hook_mlp_out", "mlp_out_all": "hook_mlp_out",
    "att": "attn.hook_z", "attn_out": "attn.hook_z", "attn_out_all": "attn.hook_z",
    "transcoder": "hook_mlp_in", "transcoders": "hook_mlp_in", "transcoder_all": "hook_mlp_in",
    "clt": "hook_mlp_in", "crosscoder": "a crosscoder's layers",
}  # fmt: skip
_QWEN = re.compile(r"SAE-Res-(.+)-W\d+K-L0_(\d+)")
_SPARSIFY_LAYER = re.compile(r"((?:\w+\.)*(?:layers|h))[._](\d+)((?:\..+)?)")
# Of sparsify's training, or told here in other words.
_SPARSIFY_KEYS = frozenset(
    {"activation", "signed", "expansion_factor", "normalize_decoder", "num_latents", "k", "d_in",
     "multi_topk", "skip_connection", "transcode", "init_b_dec_as_zeros"}
)  # fmt: skip


class SaeFolder(NamedTuple):
    """A folder that holds an SAE, as it lies there."""

    form: str
    """`sae_lens`, `gemma_scope`, `sparsify` or `qwen_scope`."""
    config: Settings
    """In sae_lens's words, with what the user said of it."""
    weights: Path
    """The file of its tensors."""
    names: Mapping[str, str]
    """Names of tensors in that file, by ours (`TENSORS`)."""
    transposed: frozenset[str]
    """Ours that lie there with their axes the other way round."""


class Header(NamedTuple):
    """What a weight file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


def recognise(folder: Path, stated: Settings) -> SaeFolder:
    """The SAE in a folder.

    Args:
        folder: with one SAE's files in it.
        stated: what the user says of it (`PretrainedSae.stated`); it fills gaps, and may not
            contradict what the folder says.

    Raises:
        BadInputError: it holds none that can be read, or leaves open what nobody said.
        DamagedFileError: a file of it cannot be parsed.
    """
    folder = folder.expanduser().absolute()
    if (folder / _LENS_WEIGHTS).is_file():
        return _sae_lens(folder, stated)
    for name in _GEMMA_WEIGHTS:
        if (folder / name).is_file():
            return _gemma_scope(folder, folder / name, stated)
    if (folder / _SPARSIFY_WEIGHTS).is_file() and (folder / _CONFIG).is_file():
        return _sparsify(folder, stated)
    single = sorted(folder.glob("*.sae.safetensors")) or sorted(folder.glob(_SPARSIFY_WEIGHTS))
    if len(single) == 1:
        return _qwen_scope(single[0], stated)
    raise _none_here(folder, [path.name for path in single])


def _none_here(folder: Path, several: list[str]) -> BadInputError:
    """Why a folder cannot be used, with what is nearest to it."""
    what = f"There is no SAE in {folder}."
    if not folder.is_dir():
        return BadInputError(what, "There is no such folder.", "Correct the path.")
    if several:
        return BadInputError(
            what, f"There are several: {', '.join(several[:5])}.", "Put one of them into a folder."
        )

    # Other projects' files, which are not read, and folders that the user may have meant.
    pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
    if pickles:
        return BadInputError(
            what,
            f"{', '.join(pickles[:5])} is a pickle, which can run code when it is read.",
            'If you trust it, convert it once: python -c "import torch; from safetensors.torch '
            "import save_file; save_file({n: t.contiguous() for n, t in torch.load('FILE.pt', "
            "weights_only=True).items()}, 'FILE.safetensors')\", for Qwen Scope as "
            "layerN.sae.safetensors.",
        )

    known = (_LENS_WEIGHTS, _SPARSIFY_WEIGHTS, *_GEMMA_WEIGHTS)
    below = sorted(
        {str(path.parent.relative_to(folder)) for name in known for path in folder.rglob(name)}
    )
    if below:
        return BadInputError(
            what,
            "It holds folders that have one each.",
            f"Name one of them: {', '.join(below[:5])}{', ...' if len(below) > 5 else ''}.",
        )
    return BadInputError(
        what,
        f"It has neither {_LENS_WEIGHTS} (sae_lens), {' nor '.join(_GEMMA_WEIGHTS)} (Gemma "
        f"Scope), nor {_SPARSIFY_WEIGHTS} (sparsify).",
        "Check the path: it is the folder of one SAE. sae_lens reads more forms, by name: "
        "`train_sae.pretrained: {release: ..., id: ...}`.",
    )


def _sae_lens(folder: Path, stated: Settings) -> SaeFolder:
    config = renamed(_read(folder / _CONFIG, {"d_in", "d_sae"}))
    config.setdefault("architecture", "standard")  # the only one at first, and not written

    # A checkpoint from the middle of training: the factor lies beside it, not yet folded in.
    if (folder / _LENS_SCALER).is_file() and SCALE not in config:
        scale = _read(folder / _LENS_SCALER, set()).get("scaling_factor")
        config |= {} if scale is None else {SCALE: scale}
    metadata = config.get("metadata")
    places = [config, renamed(metadata) if isinstance(metadata, dict) else {}]
    known = {key: place[key] for place in places for key in stated if place.get(key) is not None}

    # How the config says k and centring when not by those names.
    kwargs = config.get("activation_fn_kwargs")
    if "k" in stated and isinstance(kwargs, dict) and kwargs.get("k") is not None:
        known["k"] = kwargs["k"]
    added = _agreed(known, stated, folder)
    jump = config.get("architecture") == "jumprelu"
    names = {name: name for name in (TENSORS if jump else TENSORS[:4])}
    return SaeFolder("sae_lens", _with(config, added), folder / _LENS_WEIGHTS, names, frozenset())


def _gemma_scope(folder: Path, weights: Path, stated: Settings) -> SaeFolder:
    """Gemma Scope 1 (`params.npz`) has no config; 2 has a `config.json` with the hook points."""
    parts = folder.parts
    known: Settings = {"prepend_bos": True, "context_size": 1024}  # of all Gemma Scope SAEs
    known |= _gemma_names("/".join(parts[-6:]))
    if (folder / "config.json").is_file():
        beside = _read(folder / "config.json", set())
        architecture = beside.get("architecture", "jump_relu")
        if architecture != "jump_relu":
            raise BadInputError(
                f"The SAE at {folder} has architecture {architecture!r}.",
                "Gemma Scope's are jump_relu.",
                "Check the folder.",
            )
        if isinstance(beside.get("hf_hook_point_in"), str):
            known["hook_name"] = beside["hf_hook_point_in"].removesuffix(".output")
        if beside.get("hf_hook_point_out") is not None:
            known["hook_name_out"] = beside["hf_hook_point_out"]
        if isinstance(beside.get("model_name"), str):
            known["model_name"] = beside["model_name"].rsplit("/", 1)[-1].replace("-v3", "-3")
    known |= _agreed(known, stated, folder)
    _require_hook(known, folder, "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")

    found = headers(weights)
    lower = {name.lower(): name for name in found}
    if "affine_skip_connection" in found:
        known["hook_name_out"] = known.get("hook_name_out") or "affine_skip_connection"
    _only(found, {lower.get(name.lower(), name) for name in TENSORS}, weights,
          ignored=frozenset({"scaling_factor", "affine_skip_connection"}))  # fmt: skip
    names = {name: lower[name.lower()] for name in TENSORS}
    shape = found[names["W_enc"]].shape
    config: Settings = {
        "architecture": "jumprelu",
        "d_in": shape[0],
        "d_sae": shape[-1],
        "apply_b_dec_to_input": False,
    }
    return SaeFolder("gemma_scope", _with(config, known), weights, names, frozenset())


def _gemma_names(path: str) -> Settings:
    """What the names of Gemma Scope's folders and repositories say."""
    known: Settings = {}
    site = None
    old, new, layer = _GEMMA_2.search(path), _GEMMA_3.search(path), re.search(r"layer_(\d+)", path)
    if old is not None:
        known["model_name"] = f"gemma-2-{old[1]}" + ("-it" if old[2] == "it" else "")
        site = _GEMMA_SITES.get(old[3], old[3])
    elif new is not None:
        known["model_name"] = f"gemma-3-{new[1]}-{new[2]}"
    for part in path.split("/"):
        site = _GEMMA_SITES.get(part, site)
    if "embedding" in path.split("/"):
        return known | {"hook_name": "hook_embed"}
    if site is not None and layer is not None:
        known["hook_name"] = f"blocks.{layer[1]}.{site}"
    return known


def _sparsify(folder: Path, stated: Settings) -> SaeFolder:
    own = _read(folder / _CONFIG, {"d_in", "k"})
    run = folder.parent / "config.json"
    training = _read(run, set()) if run.is_file() else {}
    for key, value in (
        ("transcode", own.get("transcode") or training.get("hook_mode") == "transcode"),
        ("skip_connection", own.get("skip_connection")),
        ("signed", own.get("signed")),
        ("activation", None if own.get("activation", "topk") == "topk" else own["activation"]),
    ):
        if value:
            raise BadInputError(
                f"The SAE at {folder} has {key}: {own.get(key, value)!r}.",
                "This project computes sparse autoencoders of one residual stream, with TopK.",
                "Use another SAE of that collection; or train one here.",
            )
    known: Settings = {
        "model_name": training.get("model"),
        "context_size": training.get("ctx_len"),
        "k": own["k"],
        "hook_name": _sparsify_hook(folder.name, training.get("hook_mode")),
    }
    known |= _agreed(known, stated, folder)
    _require_hook(known, folder, "layers.10")

    found = headers(folder / _SPARSIFY_WEIGHTS)
    names = {
        "W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec",
    }  # fmt: skip
    _only(found, set(names.values()), folder / _SPARSIFY_WEIGHTS)
    d_sae = own.get("num_latents") or own["d_in"] * own.get("expansion_factor", 0)
    config = {key: value for key, value in own.items() if key not in _SPARSIFY_KEYS}
    config |= {"architecture": "topk", "d_in": own["d_in"], "d_sae": d_sae}
    return SaeFolder(
        "sparsify", _with(config, known), folder / _SPARSIFY_WEIGHTS, names, frozenset({"W_enc"})
    )


def _sparsify_hook(name: str, mode: Any) -> str | None:
    """sparsify names a folder after the module whose output (or input) was read."""
    if name == "embed_tokens":
        return "hook_embed"
    found = _SPARSIFY_LAYER.fullmatch(name)
    if found is None:
        return None
    if mode == "input":
        return f"blocks.{found[2]}.hook_resid_pre" if not found[3] else f"{name} (its input)"
    return f"{found[1]}.{found[2]}{found[3]}"


def _qwen_scope(weights: Path, stated: Settings) -> SaeFolder:
    """`layer5.sae.pt` of Qwen Scope, converted: TopK, encoder and decoder transposed."""
    known: Settings = {}
    release = _QWEN.search("/".join(weights.parts[-6:]))
    layer = re.search(r"layer(\d+)", weights.name)
    if release is not None:
        known |= {"model_name": release[1], "k": int(release[2])}
        if layer is not None:
            known["hook_name"] = f"blocks.{layer[1]}.hook_resid_post"
    known |= _agreed(known, stated, weights.parent)
    _require_hook(known, weights.parent, "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")

    found = headers(weights)
    _only(found, set(TENSORS[:4]), weights)
    d_sae, d_in = found["W_enc"].shape[0], found["W_enc"].shape[-1]
    config: Settings = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": False,
    }
    names = {name: name for name in TENSORS[:4]}
    return SaeFolder(
        "qwen_scope", _with(config, known), weights, names, frozenset({"W_enc", "W_dec"})
    )


def _with(config: Settings, known: Settings) -> Settings:
    """A config with facts about where the SAE sits."""
    out = config | {key: value for key, value in known.items() if value is not None}
    # A second value elsewhere would only repeat it.
    return out | ({"dtype": "float32"} if "dtype" not in out else {})


def _agreed(known: Settings, stated: Settings, folder: Path) -> Settings:
    """What was said and is not known already.

    Raises:
        BadInputError: it is known to be otherwise.
    """
    for key, value in stated.items():
        if known.get(key) is not None and known[key] != value:
            raise BadInputError(
                f"`train_sae.pretrained.{key}` is {value!r}, and the SAE at {folder} says "
                f"{known[key]!r}.",
                "What an SAE says of itself is not overruled.",
                f"Leave `{key}` away, or correct the folder.",
            )
    return {key: value for key, value in stated.items() if known.get(key) is None}


def _require_hook(known: Settings, folder: Path, example: str) -> None:
    if known.get("hook_name") is None:
        raise BadInputError(
            f"Nothing says which residual stream the SAE at {folder} reads.",
            f"Its form has no such setting, and the folder has no name like {example}.",
            "Set `train_sae.pretrained.hook_name`, such as blocks.12.hook_resid_post for the "
            "output of block 12, counted from 0.",
        )


def _only(
    found: Mapping[str, Header], names: set[str], path: Path, ignored: frozenset[str] = frozenset()
) -> None:
    if not names <= found.keys() or found.keys() - names - ignored:
        raise DamagedFileError(
            f"{path} holds the tensors {sorted(found)}.",
            f"An SAE of this form holds exactly {sorted(names)}.",
            "Copy the file again; or it is another kind of dictionary, which is not read here.",
        )


def _read(path: Path, needed: set[str]) -> Settings:
    if not path.is_file():
        raise BadInputError(
            f"{path} is missing.", "It says what the weights beside it mean.", "Copy it, too."
        )
    try:
        config = read_json_file(path)
    except (ValueError, OSError) as error:
        raise DamagedFileError(f"{path} cannot be read.", f"{error}.", "Copy it again.") from error
    if not isinstance(config, dict) or not needed <= config.keys():
        raise DamagedFileError(
            f"{path} is not an SAE's config.", f"It needs {sorted(needed)}.", "Check the folder."
        )
    return config


def headers(path: Path) -> dict[str, Header]:
    """Shape and dtype of every tensor in a weight file, which is not read further.

    Raises:
        DamagedFileError: it cannot be parsed. BadInputError: it holds pickled objects.
    """
    try:
        if path.suffix == ".npz":
            return _npz_headers(path)
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Header(tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.", f"{error}.", "Copy the file again."
        ) from error


def _npz_headers(path: Path) -> dict[str, Header]:
    out = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
            if dtype.hasobject:
                raise BadInputError(
                    f"{member} in {path} holds pickled objects.",
                    "They can run code when they are read.",
                    "Save plain arrays: np.savez(path, W_enc=..., ...).",
                )
            out[member.removesuffix(".npy")] = Header(tuple(shape), str(dtype))
    return out
