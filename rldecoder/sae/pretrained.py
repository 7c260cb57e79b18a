"""The weights of an SAE that was trained elsewhere, as they are.

Tensors are read bit for bit: renamed, turned where a form keeps them the other way round, widened
to float32. The one thing that is ever computed is a scale of the inputs, where the config says that
the weights do not hold it yet.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.sae.folders import SaeFolder
from rldecoder.sae.foreign import Description
from rldecoder.sae.interop import check_tensors, spec_of
from rldecoder.sae.spec import SaeSpec
from rldecoder.schemas import JsonRecord


class SaeSource(JsonRecord):
    """Where an SAE comes from that was not trained in this run, and what was done to it."""

    form: str
    """`sae_lens`, `gemma_scope`, `sparsify` or `qwen_scope`."""
    weights_sha256: str
    """Of the file of its weights."""
    model_name: str
    """The model that it says it was trained on; empty where it does not say."""
    hook_name: str
    """The residual stream that it reads, in its own words."""
    hook_layer: int
    """The same in this project's: blocks before it."""
    architecture: str
    """As it is computed here."""
    context_length: int | None
    """Tokens per sequence of its training text."""
    prepend_bos: bool | None
    """Whether that text began with the BOS token."""
    dtypes: list[str]
    """Of its weights on disk; here they are float32, which holds each of them exactly."""
    changes: list[str]
    """What is not bit for bit as it was in its folder; most often nothing."""


class PretrainedWeights(NamedTuple):
    """What a folder holds, ready to be written or run."""

    spec: SaeSpec
    tensors: dict[str, Tensor]
    """Contiguous float32, by our names; activations may still be rescaled (`rescaled`)."""
    rescaled: bool
    """Whether activations are multiplied by the norms of their decoder rows."""
    dtypes: list[str]
    """On disk, sorted."""
    changes: list[str]
    """See `SaeSource.changes`."""


def read_weights(found: SaeFolder, description: Description, model_name: str) -> PretrainedWeights:
    """Read a folder's tensors.

    Args:
        model_name: the run's model, under which the SAE is published.

    Raises:
        DamagedFileError: a file cannot be parsed, a shape is wrong, a value is not finite.
        BadInputError: float32 does not hold a value exactly, or a scale is not in the weights.
    """
    held = _held(found)
    scale = held.pop("scaling_factor", None)
    if scale is not None and not bool((scale == 1).all()):
        raise BadInputError(
            f"{found.weights} holds a scaling_factor.",
            "It scales activations in a way that the weights do not hold.",
            "Fold it into the weights with sae_lens, and save the SAE again.",
        )
    tensors = {
        name: _widened(held[inside].T if name in found.transposed else held[inside], inside, found)
        for name, inside in found.names.items()
    }
    spec = spec_of(description, found.config, found.weights)
    spec = spec.model_copy(update={"model_name": model_name})
    check_tensors(tensors, spec, found.weights)
    if spec.architecture == "jumprelu" and bool((tensors["threshold"] < 0).any()):
        raise BadInputError(
            f"A threshold in {found.weights} is below 0.",
            "Latents would fire with negative activations.",
            "Check the file.",
        )

    changes = []
    if description.input_scale != 1:
        # scale * x into the encoder and the reconstruction back; activations stay theirs.
        tensors["W_enc"] = tensors["W_enc"] * description.input_scale
        for name in ("W_dec", "b_dec"):
            tensors[name] = tensors[name] / description.input_scale
        changes.append(
            f"inputs were scaled by {description.input_scale:g}: W_enc is multiplied by it, W_dec "
            "and b_dec are divided"
        )
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in held.values()})
    return PretrainedWeights(spec, tensors, description.acts_are_rescaled, dtypes, changes)


def _held(found: SaeFolder) -> dict[str, Tensor]:
    """All tensors of the file, as they are."""
    path = found.weights
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
        return load_file(path)
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise DamagedFileError(
            f"{path} cannot be read.", f"{error}.", "Copy the file again."
        ) from error


def _widened(tensor: Tensor, name: str, found: SaeFolder) -> Tensor:
    """The same numbers as float32."""
    wide = tensor.float()
    if tensor.dtype == torch.float64 and not torch.equal(wide.double(), tensor):
        raise BadInputError(
            f"{name} in {found.weights} holds float64 numbers that float32 does not.",
            "This project computes SAEs in float32, and does not round weights silently.",
            "Save the SAE in float32.",
        )
    return wide.contiguous()
