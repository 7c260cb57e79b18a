"""How an SAE lies on disk: the layout of sae_lens 6.54, which loads what is written here.

A folder with `cfg.json` and `sae_weights.safetensors`; see `Sae` for what the tensors mean. SAEs
trained with `batchtopk` or `matryoshka` are kept as `jumprelu`, for that is how they are read.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.json_text import read_json_file
from rldecoder.sae.foreign import ARCHITECTURES, Description, Settings, describe
from rldecoder.sae.spec import SaeSpec

WEIGHTS_FILE = "sae_weights.safetensors"
CONFIG_FILE = "cfg.json"
_NONE = torch.ones(0)
LAYOUT_VERSION = "6.54.12"
"""The sae_lens whose layout this is."""
_LENS_ARCHITECTURE = {ours: lens for lens, ours in ARCHITECTURES.items()}


def tensor_shapes(spec: SaeSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an SAE's tensors."""
    d_model, num_latents = spec.d_model, spec.num_latents
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_model, num_latents),
        "b_enc": (num_latents,),
        "W_dec": (num_latents, d_model),
        "b_dec": (d_model,),
    }
    return shapes | ({"threshold": (num_latents,)} if spec.architecture == "jumprelu" else {})


def write_sae(
    folder: Path, spec: SaeSpec, tensors: dict[str, Tensor], *, rescaled: bool = False
) -> None:
    """Write both files.

    Args:
        rescaled: whether activations of the tensors are multiplied by their decoder rows' norms
            (`rescale_acts_by_decoder_norm` of sae_lens); `read_sae` folds that in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: tensors[name].detach().cpu().contiguous() for name in tensor_shapes(spec)}
    save_file(kept, folder / WEIGHTS_FILE)
    text = json.dumps(_lens_config(spec, rescaled), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def read_sae(folder: Path) -> tuple[SaeSpec, dict[str, Tensor]]:
    """Read a folder written by `write_sae` or by sae_lens, in this project's conventions.

    Raises:
        BadInputError: the folder or a file is missing, or uses what this project does not.
        DamagedFileError: a file cannot be parsed, a shape is wrong, a value is not finite.
    """
    config = _read_config(folder)
    try:
        found = describe(config)
    except BadInputError as error:
        raise BadInputError(f"{error.what} It lies at {folder}.", error.why, error.mend) from error
    spec = spec_of(found, config, folder / CONFIG_FILE)
    tensors = _read_tensors(folder, set(tensor_shapes(spec)))
    check_tensors(tensors, spec, folder / WEIGHTS_FILE)
    return spec, fold_rescaling(tensors) if found.acts_are_rescaled else tensors


def check_tensors(tensors: dict[str, Tensor], spec: SaeSpec, path: Path) -> None:
    """Compare tensors, read from `path`, with what the config says.

    Raises:
        DamagedFileError: a shape is wrong, a value is not finite.
    """
    for name, shape in tensor_shapes(spec).items():
        if tuple(tensors[name].shape) != shape:
            raise DamagedFileError(
                f"{name} in {path} has shape {tuple(tensors[name].shape)}.",
                f"Its config says {shape}.",
                "Build the SAE again, or copy both files from the same source.",
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise DamagedFileError(
                f"{name} in {path} holds NaN or infinity.",
                "The file was damaged, or training diverged.",
                "Copy it again, or build the SAE again with a lower `train_sae.lr`.",
            )


def _lens_config(spec: SaeSpec, rescaled: bool) -> Settings:
    config: Settings = {
        "architecture": _LENS_ARCHITECTURE[spec.architecture],
        "d_in": spec.d_model,
        "d_sae": spec.num_latents,
        "dtype": spec.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": spec.b_dec_is_subtracted,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            # Without it sae_lens takes the file for one of before 6.0 and drops the metadata.
            "sae_lens_version": LAYOUT_VERSION,
            "hook_name": spec.hook_name,
            "hook_layer": spec.hook_layer,
            "model_name": spec.model_name,
            "context_size": spec.context_length,
            "made_by": "rl-decoder",
        },
    }
    if spec.trained_as:
        config["metadata"]["training_architecture"] = spec.trained_as
    if spec.k is not None:
        config |= {"k": spec.k, "rescale_acts_by_decoder_norm": rescaled}
    return config


def _read_config(folder: Path) -> Settings:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise BadInputError(
            f"No SAE at {folder}: {CONFIG_FILE} is missing.",
            "An SAE is a folder with cfg.json and sae_weights.safetensors.",
            "Check the path.",
        )
    try:
        config = read_json_file(path)
    except (ValueError, OSError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.", f"{error}.", "Build the SAE again."
        ) from error
    needed = {"architecture", "d_in", "d_sae"}
    if not isinstance(config, dict) or not needed <= config.keys():
        raise DamagedFileError(
            f"{path} is not an SAE's config.",
            f"It needs the keys {sorted(needed)}.",
            "Build the SAE again, or save it with sae_lens 6.",
        )
    return config


def _read_tensors(folder: Path, names: set[str]) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise BadInputError(
            f"No SAE weights at {path}.", "The file is missing.", "Build the SAE again."
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.", f"{error}.", "Build the SAE again."
        ) from error
    # Some versions of sae_lens wrote a scale that was never trained.
    if "scaling_factor" not in names and bool((tensors.get("scaling_factor", _NONE) == 1).all()):
        tensors.pop("scaling_factor", None)
    if set(tensors) != names:
        raise DamagedFileError(
            f"{path} holds the tensors {sorted(tensors)}.",
            f"An SAE of this architecture holds exactly {sorted(names)}.",
            "Build the SAE again, or copy both files from the same source.",
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def spec_of(found: Description, config: Settings, path: Path) -> SaeSpec:
    """The shape of an SAE whose config, read from `path`, is described by `found`.

    Raises:
        DamagedFileError: sizes or k make no sense.
    """
    try:
        return SaeSpec(
            architecture=found.architecture,
            d_model=config["d_in"],
            num_latents=config["d_sae"],
            k=found.k,
            hook_layer=found.hook_layer,
            model_name=found.model_name,
            context_length=found.context_length,
            trained_as=found.trained_as,
            b_dec_is_subtracted=found.b_dec_is_subtracted,
        )
    except ValueError as error:
        raise DamagedFileError(
            f"{path} describes no valid SAE.", f"{error}", "Build the SAE again."
        ) from error


def fold_rescaling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Express sae_lens's `rescale_acts_by_decoder_norm` in what this project computes."""
    norm = tensors["W_dec"].norm(dim=1).clamp_min(1e-12)
    return tensors | {
        "W_enc": tensors["W_enc"] * norm,
        "b_enc": tensors["b_enc"] * norm,
        "W_dec": tensors["W_dec"] / norm[:, None],
    }
