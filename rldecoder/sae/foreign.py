"""What the config of a saved SAE says, and whether this project computes just that.

`cfg.json` of sae_lens 6 keeps where the SAE sits under `metadata`; before 6 all keys were in one
place, some under other names. Any key may change what the weights mean, so every setting that has
no counterpart here is refused by its name: a wrong number has none.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from rldecoder.errors import BadInputError

Settings = dict[str, Any]
"""What a JSON file of somebody else holds: keys and values of any kind."""

ARCHITECTURES = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu"}
"""Names of sae_lens, and ours."""
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_PLACE_KEYS = (
    "hook_name", "hook_layer", "hook_head_index", "hook_name_out", "hook_layer_out",
    "hook_head_index_out", "model_name", "model_from_pretrained_kwargs", "context_size",
    "center_writing_weights", "prepend_bos",
)  # fmt: skip
SCALE = "norm_scaling_factor"
"""Name of the factor by which inputs are scaled, as sae_lens's list of releases calls it."""
_OFF: tuple[Any, ...] = (None, False, "", "none", "None", 0, [], {})
# Settings that must be off, and what they do.
_MUST_BE_OFF = {
    "normalize_activations": "It scales inputs in a way that the weights do not hold. Only "
    "`expected_average_only_in` with a known `norm_scaling_factor` can be folded in.",
    "reshape_activations": "It reads attention heads, not the residual stream.",
    "hook_head_index": "It reads one attention head, not the residual stream.",
    "hook_head_index_out": "It predicts one attention head, not the residual stream.",
    "finetuning_scaling_factor": "It scales activations in a way that the weights do not hold.",
    "use_error_term": "It adds to the reconstruction what the SAE missed.",
    "center_writing_weights": "It reads a model with centred weights; this project runs models "
    "as they were published.",
}
# Settings of training in old configs whose names would look like mathematics.
_TRAINING_ONLY = re.compile(
    r"(b_dec_init|decoder_init|decoder_orthogonal|decoder_heuristic|init_encoder|jumprelu_|l0_|l1_"
    r"|lp_|lr_|adam_|mse_loss|noise|normalize_sae_decoder|scale_sparsity|dead_|feature_|aux|sparse_"
    r"|use_sparse|n_batches|train_batch|store_batch|act_store|training_|eval_|sparsity_|resample"
    r"|finetuning_(tokens|method)|topk_threshold_lr|autocast|compile|use_ghost|log_|wandb|dataset"
    r"|exclude_|neuronpedia|pre_act_loss|tanh_|ste_|matryoshka_widths)"
)
_MATHEMATICS = re.compile(
    r"norm|scal|cent(er|r)|whiten|mean|bias|activation|act_fn|nonlin|threshold|skip|relu|tanh"
    r"|error|gat(e|ing)|clamp|temperature|transcod|crosscod|cross_layer|layers|d_out|_out$"
    r"|subtract|shift|residual|sign|abs"
)
_KNOWN = frozenset(
    {"architecture", "d_in", "d_sae", "d_out", "k", "dtype", "device", "metadata", "activation_fn",
     "activation_fn_kwargs", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", SCALE,
     *_MUST_BE_OFF, *_PLACE_KEYS}
)  # fmt: skip
_BLOCK_OUTPUT = re.compile(r"(?:\w+\.)*(?:layers|h|blocks)\.(\d+)")
_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


class Description(NamedTuple):
    """A config in this project's words."""

    architecture: str
    k: Any
    hook_layer: int
    model_name: str
    context_length: Any
    trained_as: str
    b_dec_is_subtracted: bool
    acts_are_rescaled: bool
    prepend_bos: bool | None
    """Whether the training text began with BOS; None where the config does not say."""
    input_scale: float
    """By what inputs are multiplied before the weights see them: 1, or what is to be folded."""
    hook_name: str
    """As the config says it."""


def renamed(config: Settings) -> Settings:
    """A config whose keys have the names of sae_lens 6."""
    return {_OLD_NAMES.get(key, key): value for key, value in config.items()}


def describe(config: Settings) -> Description:
    """Read a config.

    Raises:
        BadInputError: the SAE computes what this project does not, or reads something else than
            the residual stream, or contradicts itself.
    """
    flat = renamed(config)
    place = _place(flat)

    # What would change the weights' meaning, and what nobody knows the meaning of.
    scale = _input_scale(flat)
    for key, why in _MUST_BE_OFF.items():
        for value in (flat.get(key), place.get(key)):
            folded = key == "normalize_activations" and scale is not None
            if not _is_off(value) and not folded:
                raise _refusal(f"{key}: {value!r}", why)
    for key, value in flat.items():
        odd = key not in _KNOWN and _MATHEMATICS.search(key) and not _TRAINING_ONLY.match(key)
        if odd and not _is_off(value):
            raise _refusal(f"{key}: {value!r}", "It is not known what that does to the weights.")
    _check_model(place)

    architecture, k = _activation(flat)
    rescaled = _switch(flat, "rescale_acts_by_decoder_norm", default=False)
    if rescaled and architecture != "topk":
        raise _refusal(
            "rescale_acts_by_decoder_norm: True", f"It means nothing for {architecture!r}."
        )

    metadata = flat.get("metadata") or {}
    return Description(
        architecture,
        k,
        _hook_layer(place, flat, ours=metadata.get("made_by") == "rl-decoder"),
        str(place.get("model_name") or ""),
        place.get("context_size"),
        str(metadata.get("training_architecture") or ""),
        _switch(flat, "apply_b_dec_to_input", default=True),
        rescaled,
        _bos(place),
        1.0 if scale is None else scale,
        str(place["hook_name"]),
    )


def _place(flat: Settings) -> Settings:
    """Where the SAE sits: from `metadata`, or in old configs from beside it."""
    metadata = flat.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise _refusal("metadata that is no mapping", "It says where the SAE sits.")
    named = renamed(metadata)
    place = {}
    for key in _PLACE_KEYS:
        inside, beside = named.get(key), flat.get(key)
        if inside is not None and beside is not None and inside != beside:
            raise _refusal(
                f"two values of {key}, {beside!r} and {inside!r}", "One of them must be wrong."
            )
        place[key] = beside if inside is None else inside
    return place


def _input_scale(flat: Settings) -> float | None:
    """The factor of sae_lens's `expected_average_only_in`, where it is known beside the config."""
    scale = flat.get(SCALE)
    kind = flat.get("normalize_activations")
    if kind not in ("expected_average_only_in", True):
        if scale not in (None, 1):
            raise _refusal(
                f"{SCALE}: {scale!r} with normalize_activations: {kind!r}",
                "It belongs to `expected_average_only_in`, and to nothing else.",
            )
        return None
    if scale is None:
        return None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise _refusal(f"{SCALE}: {scale!r}", "It is a number above 0.")
    return float(scale)


def _bos(place: Settings) -> bool | None:
    value = place.get("prepend_bos")
    if value is not None and not isinstance(value, bool):
        raise _refusal(f"prepend_bos: {value!r}", "It is true or false.")
    return value


def _check_model(place: Settings) -> None:
    """Refuse SAEs of a model that is not the published one."""
    kwargs = place.get("model_from_pretrained_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise _refusal(f"model_from_pretrained_kwargs: {kwargs!r}", "It says which model was read.")
    if not _is_off(kwargs.get("center_writing_weights")):
        raise _refusal(
            "model_from_pretrained_kwargs with center_writing_weights: True",
            _MUST_BE_OFF["center_writing_weights"],
        )
    for key in ("checkpoint_index", "checkpoint_value", "revision"):
        if kwargs.get(key) not in (None, "main"):
            raise _refusal(
                f"model_from_pretrained_kwargs with {key}: {kwargs[key]!r}",
                "It reads a model at another point of its training.",
            )


def _activation(flat: Settings) -> tuple[str, Any]:
    """Our architecture and k."""
    name = flat.get("architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise _refusal(f"architecture {name!r}", f"Supported are {sorted(ARCHITECTURES)}.")

    function = flat.get("activation_fn")
    kwargs = flat.get("activation_fn_kwargs") or {}
    if not isinstance(kwargs, dict) or not kwargs.keys() <= {"k", "use_sparse_activations"}:
        raise _refusal(f"activation_fn_kwargs: {kwargs!r}", "Only `k` is known.")
    if function == "topk" and architecture == "relu":
        architecture = "topk"  # how sae_lens wrote TopK before 6
    suits = ("relu", "topk") if architecture == "topk" else ("relu",)
    if function not in (None, *suits):
        raise _refusal(
            f"activation_fn: {function!r} with architecture {name!r}", f"Known are {list(suits)}."
        )

    ks = [k for k in (flat.get("k"), kwargs.get("k")) if k is not None]
    if architecture != "topk":
        if kwargs.get("k") is not None:
            raise _refusal(
                f"activation_fn_kwargs: {kwargs!r} with architecture {name!r}",
                "It keeps k latents a token, and the architecture does not.",
            )
        return architecture, None
    if len(set(ks)) > 1:
        raise _refusal(f"two values of k, {ks}", "One of them must be wrong.")
    return architecture, ks[0] if ks else None


def _hook_layer(place: Settings, flat: Settings, *, ours: bool) -> int:
    """The number of blocks before the hook point, which must be the residual stream."""
    if flat.get("d_out") not in (None, flat.get("d_in")):
        raise _refusal(f"d_out: {flat['d_out']!r}", "It predicts something else than its input.")
    for key in ("hook_name", "hook_layer"):
        target = place.get(f"{key}_out")
        if target is not None and target != place.get(key):
            raise _refusal(
                f"{key}_out: {target!r}", "It predicts something else than its input: a transcoder."
            )

    name = place.get("hook_name")
    if not isinstance(name, str) or not name:
        raise _refusal(
            f"hook_name: {name!r}", "Without it nobody knows which residual stream it reads."
        )
    residual, output = _RESIDUAL.fullmatch(name), _BLOCK_OUTPUT.fullmatch(name)
    found = residual or output
    if found is None:
        raise _refusal(
            f"hook_name: {name!r}",
            "It is not the residual stream between two blocks, as `blocks.5.hook_resid_post`, "
            "`blocks.5.hook_resid_pre` or `model.layers.5` is.",
        )

    # sae_lens says the block, in which its hook is; this project the blocks before the hook.
    block = int(found.group(1))
    before = residual is not None and residual.group(2) == "pre"
    layer = block + (0 if before else 1)
    stated = place.get("hook_layer")
    if stated is not None and stated != (layer if ours else block):
        raise _refusal(
            f"hook_layer: {stated!r} with hook_name: {name!r}", "One of them must be wrong."
        )
    return layer


def _switch(flat: Settings, key: str, *, default: bool) -> bool:
    value = flat.get(key, default)
    if not isinstance(value, bool):
        raise _refusal(f"{key}: {value!r}", "It is true or false.")
    return value


def _is_off(value: Any) -> bool:
    return any(type(value) is type(off) and value == off for off in _OFF)


def _refusal(what: str, why: str) -> BadInputError:
    return BadInputError(
        f"The SAE has {what[:300]}, which cannot be used.",
        why,
        "Use an SAE of the residual stream, of raw activations, whose weights say all that it "
        "computes; or train one here.",
    )
