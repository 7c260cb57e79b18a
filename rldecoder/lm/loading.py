"""Reading a model folder, and making sure that all of the model was in it.

`transformers` fills weights that a folder lacks with random ones, anew at every load, and leaves
out weights that it has no place for. Both would be another model than the one that was meant.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rldecoder.errors import BadInputError, NumericalError, RlDecoderError
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.text_part import KEYS, of_other_parts, text_part

# Any one of these makes a tokenizer; without them transformers would make an empty one.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_NAMED = 3
"""How many tensors an error names."""


def read_model(
    folder: Path, dtype: torch.dtype | None, more: Mapping[str, Any] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a Hugging Face folder: safetensors only, no code from it is run.

    Args:
        folder: holds config.json, model.safetensors and the tokenizer's files.
        dtype: of the weights; None takes the stored one.
        more: of `placement.loading_arguments`.

    Raises:
        BadInputError: the folder is not a model that can be read, or not all of one.
        NumericalError: a weight is NaN or infinite.
    """
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"No model at {folder}.",
            "There is no config.json in this folder.",
            "Give the folder that `save_pretrained` wrote.",
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise BadInputError(
            f"The model at {folder} cannot be loaded.",
            f"It has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}.",
            "Add the tokenizer files that were published with the weights.",
        )

    try:
        with quiet_transformers():
            part = text_part(read_config(folder))
            # Typed as the model alone, whatever the last argument asks for.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=part.config,
                key_mapping=None if part.whole is None else KEYS,
                dtype=dtype if dtype is not None else "auto",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                # They are refused below, by name; transformers' own error names none.
                ignore_mismatched_sizes=True,
                **(more or {}),
            )
            model, found = loaded
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except (RlDecoderError, MemoryError, torch.OutOfMemoryError):
        raise
    # Damaged files raise whatever their parser raises: OSError, ValueError, KeyError,
    # SafetensorError, and plain Exception from the tokenizers library.
    except Exception as error:
        said = str(error).strip() or "no reason given"
        raise BadInputError(
            f"The model at {folder} cannot be loaded.",
            f"{type(error).__name__}: {said}".splitlines()[0][:400],
            "It must be a causal language model of `transformers` with safetensors weights.",
        ) from error

    model, found = loaded
    if part.whole is not None:
        unexpected = set(found["unexpected_keys"])
        found["unexpected_keys"] = unexpected - of_other_parts(unexpected, model)
    require_all_weights(found, str(folder))
    require_finite_weights(model, str(folder))
    return model, tokenizer


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a model folder, no code from it run."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    assert isinstance(config, PreTrainedConfig)
    return config


def require_all_weights(found: Mapping[str, Any], place: str) -> None:
    """Raise unless a checkpoint held every weight of the model, and nothing else.

    A head that is tied to the embeddings needs no weight of its own, and what an architecture
    itself declares to be left out (old buffers, heads for several tokens at once) may be there.

    Args:
        found: what `from_pretrained(..., output_loading_info=True)` tells.
        place: the model, for the message.

    Raises:
        BadInputError: weights are missing, without a place, or of another shape.
    """
    shapes = {name: (stored, wanted) for name, stored, wanted in found["mismatched_keys"]}
    problems = [
        _count(found["missing_keys"], "its architecture has and the files have not"),
        _count(found["unexpected_keys"], "the files have and its architecture has not"),
        _count(
            [
                f"{name} ({list(stored)} in the file, {list(wanted)} in the model)"
                for name, (stored, wanted) in shapes.items()
            ],
            "have another shape",
        ),
        *found.get("error_msgs", ()),
    ]
    problems = [problem for problem in problems if problem]
    if problems:
        raise BadInputError(
            f"The weights at {place} are not those of the model that its config.json describes.",
            f"{'; '.join(problems)}. Missing ones would be random numbers, others at every load.",
            "Take all weight files and the config.json that were published together; weights "
            "saved by a wrapper (torch.compile, DataParallel, PEFT) or without their head must be "
            "saved again from the plain causal language model.",
        )


def require_finite_weights(model: nn.Module, place: str) -> None:
    """Raise if a weight is NaN or infinite.

    Raises:
        NumericalError: the tensors, by name.
    """
    bad = [name for name, tensor in model.named_parameters() if not bool(_is_finite(tensor))]
    if bad:
        raise NumericalError(
            f"The weights at {place} hold NaN or infinity: {_list(bad)}.",
            "The files are damaged, training had diverged, or the numbers do not fit the dtype.",
            "Take the published weights again, or load them in float32 (`compute_dtype`).",
        )


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    # Both ends are finite only where everything between is, and NaN spreads to both: one pass
    # without a mask of the tensor's size. (8-bit floats have no infinity to speak of.)
    if (
        not tensor.is_floating_point()
        or tensor.itemsize < 2
        or not tensor.numel()
        or tensor.is_meta
    ):
        return torch.ones((), dtype=torch.bool)
    low, high = tensor.detach().aminmax()
    return low.isfinite() & high.isfinite()


def _count(names: Collection[str], what: str) -> str:
    return f"{len(names)} that {what}: {_list(sorted(names))}" if names else ""


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
