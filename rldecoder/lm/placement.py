"""Models that are larger than a device: parts on the CPU or the disk, weights in 8 or 4 bits.

What a stage may do with such a model is the same, as far as it only reads; see `FrozenLM.tail`.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rldecoder.config.model import Loading
from rldecoder.errors import BadInputError, NoResourceError
from rldecoder.lm.user_cache import user_cache

_DEVICE_SHARE, _MEMORY_SHARE = 0.8, 0.7
"""Of what is free, for weights; the rest is for activations and for other programs."""


def loading_arguments(
    loading: Loading, device: torch.device, dtype: torch.dtype | None
) -> dict[str, Any]:
    """What `from_pretrained` is told besides.

    Raises:
        BadInputError: a package for it is missing.
    """
    arguments: dict[str, Any] = {}

    # Refused here: transformers would say so only after the weights are read.
    if loading.quantization != "none":
        if find_spec("bitsandbytes") is None:
            raise BadInputError(
                f"`sync_tokenizer.quantization: {loading.quantization}` cannot be used: there is "
                "no package bitsandbytes.",
                "It multiplies weights of 8 and 4 bits.",
                "`pip install 'rl-decoder[quantized]'`, or set `quantization: none`.",
            )
        # Else a line at every multiplication says that activations are rounded, too.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        arguments["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if loading.quantization == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        )

    if loading.device_map == "auto":
        arguments |= {"device_map": "auto", "max_memory": _most_memory(device)}
        if loading.offload:
            folder = user_cache() / "offload"
            folder.mkdir(parents=True, exist_ok=True)
            arguments["offload_folder"] = str(folder)
    elif loading.quantization != "none":
        arguments["device_map"] = {"": device}
    return arguments


def require_placed(model: PreTrainedModel, loading: Loading, folder: Path) -> None:
    """Raise if weights are where they cannot be used.

    Raises:
        NoResourceError: the model needs the disk, or its output layer is not in memory.
    """
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if "disk" in places and not loading.offload:
        raise NoResourceError(
            f"The model at {folder} is larger than the memory of the device and of the machine.",
            "Some of its blocks fit nowhere.",
            "Set `sync_tokenizer.offload: true` to keep those on the disk, or "
            "`quantization: 4bit`; or take a smaller model.",
        )
    for name, layer in (
        ("output layer", model.get_output_embeddings()),
        ("embeddings", model.get_input_embeddings()),
    ):
        if is_offloaded(layer):
            raise NoResourceError(
                f"The {name} of the model at {folder} is not in the device's memory.",
                "Logits are made of it, token by token.",
                "Use a device with more memory, or a smaller model.",
            )


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights are only there while their module runs."""
    return any(parameter.is_meta for parameter in module.parameters())


def count_parameters(model: PreTrainedModel) -> int:
    """Weights, tied ones once; of packed ones as many as they stand for."""
    if getattr(model, "is_quantized", False):
        with torch.device("meta"):
            model = type(model)(model.config)
    return sum(parameter.numel() for parameter in model.parameters())


def rounds_activations(model: PreTrainedModel) -> bool:
    """Whether blocks round what they read to 8 bits, as those with weights of 8 bits do.

    Some columns are kept whole, and they are chosen over all tokens of a batch: a token's numbers
    then hang, within that rounding, on the texts beside it (LLM.int8(), arXiv 2208.07339).
    """
    return bool(getattr(model, "is_loaded_in_8bit", False))


def require_whole_weights(model: PreTrainedModel, purpose: str) -> None:
    """Raise if weights are packed or offloaded.

    Args:
        purpose: what they are needed for, such as `A decoder with blocks copies them`.

    Raises:
        BadInputError: they are.
    """
    # Not `is_quantized`: that is said of the whole model, and blocks are taken from its body.
    packed = not all(parameter.is_floating_point() for parameter in model.parameters())
    if packed or is_offloaded(model):
        raise BadInputError(
            "The frozen model's weights are " + ("quantised." if packed else "offloaded."),
            f"{purpose}.",
            "Set `train_decoder.depth: 0` and `frontier.depths: []`, or load the model whole "
            "(`sync_tokenizer.quantization: none`, `device_map: one`).",
        )


def _most_memory(device: torch.device) -> dict[int | str, int]:
    """Bytes for weights on the device, then in the machine's memory."""
    memory: dict[int | str, int] = {"cpu": int(_MEMORY_SHARE * psutil.virtual_memory().available)}
    if device.type == "cuda":
        index = device.index or 0
        memory = {index: int(_DEVICE_SHARE * torch.cuda.mem_get_info(index)[0]), **memory}
    return memory
