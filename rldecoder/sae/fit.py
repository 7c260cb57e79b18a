"""Whether an SAE that was trained elsewhere fits a run; known before anything is computed.

A wrong layer, width or hook point is refused: its numbers would mean nothing. Training text of
another kind (BOS, longer contexts) can be gone on with on request, under a caveat.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from rldecoder.errors import BadInputError
from rldecoder.sae.folders import SaeFolder, headers
from rldecoder.sae.foreign import Description, describe

_RMS_NORM = ("gemma", "llama", "mistral", "mixtral", "qwen", "olmo2", "deepseek", "smollm")
"""Families of models without a mean to take out."""


class Surroundings(NamedTuple):
    """What a run reads an SAE with; None where that is not yet known."""

    hook_layer: int
    """`cache_activations.hook_layer`."""
    context_length: int
    """Tokens of a packed sequence."""
    bos: bool | None = None
    """Whether its text begins with the BOS token."""
    d_model: int | None = None
    """Width of the residual stream."""
    num_layers: int | None = None
    """Blocks of the model."""
    model_names: tuple[str, ...] = ()
    """What the model is called, here and at its source."""


def described(found: SaeFolder) -> Description:
    """What an SAE computes and where, without its weights.

    Raises:
        BadInputError: it computes or reads what this project does not, by name.
        DamagedFileError: its weights cannot be parsed.
    """
    where = f"It lies at {found.weights.parent}."
    try:
        description = describe(found.config)
    except BadInputError as error:
        raise BadInputError(f"{error.what} {where}", error.why, error.mend) from error
    if description.k is None and found.config.get("k") is not None:
        raise BadInputError(
            f"`train_sae.pretrained.k` is {found.config['k']!r}, and the SAE has no k. {where}",
            f"Its architecture is {description.architecture}, in which each latent decides alone.",
            "Leave `k` away.",
        )
    if _may_be_centred(found, description):
        raise BadInputError(
            f"The SAE of {description.model_name} does not say whether its model's weights were "
            f"centred. {where}",
            "SAEs from before sae_lens 6 were trained with TransformerLens, which centred them "
            "unless told otherwise, as for gpt2-small-res-jb: it reads other residuals than ours.",
            "If you know that they were not, set "
            "`train_sae.pretrained.center_writing_weights: false`.",
        )
    _check_shapes(found)
    return description


def check_fit(
    description: Description, width: int, around: Surroundings, accept: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Compare an SAE with a run; returns what a reader of its results must be told.

    Args:
        width: of the residuals that it reads.
        accept: differences to go on with: `bos`, `context_length`.

    Raises:
        BadInputError: it does not fit; the setting to change is named.
    """
    if around.d_model is not None and width != around.d_model:
        raise BadInputError(
            f"The SAE reads residuals of width {width}, and the model's have {around.d_model}.",
            f"It was trained on {description.model_name or 'another model'}.",
            "Set `sync_tokenizer.model` to the SAE's model, or take an SAE of this one.",
        )
    if around.num_layers is not None and description.hook_layer > around.num_layers:
        raise BadInputError(
            f"The SAE reads {description.hook_name}, and the model has {around.num_layers} blocks.",
            f"It was trained on {description.model_name or 'another model'}.",
            "Set `sync_tokenizer.model` to the SAE's model, or take an SAE of this one.",
        )
    if description.hook_layer != around.hook_layer:
        raise BadInputError(
            f"The SAE reads {description.hook_name}, which is layer {description.hook_layer} here, "
            f"and `cache_activations.hook_layer` is {around.hook_layer}.",
            "This project counts the blocks before the residual stream: the output of block 5, "
            "counted from 0, is layer 6.",
            f"Set `cache_activations.hook_layer: {description.hook_layer}`, and add it to "
            "`baselines.lens_layers`; or take the SAE of another layer.",
        )

    caveats = []
    for name, difference in (
        ("bos", _bos_differs(description, around)),
        ("context_length", _context_differs(description, around)),
    ):
        if difference is not None:
            what, mend = difference
            if name not in accept:
                raise BadInputError(
                    what,
                    "It would read residuals of a kind that it never saw.",
                    f"{mend}, or go on under a caveat: `train_sae.pretrained.accept: [{name}]`.",
                )
            caveats.append(what)
    if around.model_names and not _same_model(description.model_name, around.model_names):
        caveats.append(
            f"The SAE says that it was trained on {description.model_name or 'no model by name'}, "
            f"and the run's model is {around.model_names[0]}."
        )
    return tuple(caveats)


def _bos_differs(description: Description, around: Surroundings) -> tuple[str, str] | None:
    if description.prepend_bos is None or around.bos in (None, description.prepend_bos):
        return None
    if description.prepend_bos:
        return (
            "The SAE was trained on text that begins with the BOS token, and this run's text does "
            "not.",
            "Set `ingest.bos: always`",
        )
    return (
        "The SAE was trained on text without a BOS token in front, and this run's text begins with "
        "one.",
        "Set `ingest.bos: never`",
    )


def _context_differs(description: Description, around: Surroundings) -> tuple[str, str] | None:
    longest = description.context_length
    if not isinstance(longest, int) or around.context_length <= longest:
        return None
    return (
        f"The SAE was trained on sequences of {longest} tokens, and this run's have "
        f"{around.context_length}.",
        f"Set `ingest.context_length: {longest}`",
    )


def _may_be_centred(found: SaeFolder, description: Description) -> bool:
    """Before sae_lens 6 a config may leave it open, and the default was to centre.

    Models with RMSNorm cannot be centred; TransformerLens leaves them as they are.
    """
    metadata = found.config.get("metadata")
    places = [found.config, metadata if isinstance(metadata, dict) else {}]
    for place in places:
        kwargs = place.get("model_from_pretrained_kwargs")
        if isinstance(kwargs, dict) and kwargs.get("center_writing_weights") is not None:
            return False
        if place.get("center_writing_weights") is not None:
            return False
    versions = [str(place.get("sae_lens_version")) for place in places]
    new = any(re.match(r"([6-9]|\d\d)\.", version) for version in versions)
    rms = any(family in _plain(description.model_name) for family in _RMS_NORM)
    return found.form == "sae_lens" and not new and not rms


def _check_shapes(found: SaeFolder) -> None:
    """Before the weights are read: their headers against the config."""
    d_in, d_sae = found.config["d_in"], found.config["d_sae"]
    shapes = {
        "W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in),
        "b_enc": (d_sae,), "b_dec": (d_in,), "threshold": (d_sae,),
    }  # fmt: skip
    there = headers(found.weights)
    for name, inside in found.names.items():
        shape = shapes[name][::-1] if name in found.transposed else shapes[name]
        if inside not in there or there[inside].shape != shape:
            held = there[inside].shape if inside in there else "nothing of that name"
            raise BadInputError(
                f"{inside} in {found.weights} is to have the shape {shape}, and there is {held}.",
                f"Its config says d_in {d_in} and d_sae {d_sae}.",
                "Copy the folder again; or it is an SAE of another kind than its files say.",
            )
        if not re.match(r"float|bfloat|[<>=]?f|F|BF", there[inside].dtype):
            raise BadInputError(
                f"{inside} in {found.weights} is of type {there[inside].dtype}.",
                "Weights are floating-point numbers; quantised ones are not read.",
                "Take the SAE as it was before.",
            )


def _same_model(claimed: str, names: tuple[str, ...]) -> bool:
    return _plain(claimed) in {_plain(name) for name in names}


def _plain(name: str) -> str:
    """A model's name without owner, case, signs and GPT-2's `small`."""
    last = Path(name).name.lower().split("@")[0]
    return re.sub(r"[^a-z0-9]", "", last.removesuffix("-small").removesuffix("-hf"))
