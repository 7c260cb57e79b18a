"""The text model inside a model of several media: its configuration, its weights' names.

Such a model's config.json holds the text model's configuration as `text_config`, and its weights
those of the text model under a longer name. transformers has most of these text models as models
of their own; then nothing else is loaded.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rldecoder.errors import BadInputError
from rldecoder.lm.cut import number_of_blocks

# Types whose text model, loaded alone, gives what the whole gives on text: each is compared by
# `python -m tests.lm.model_table`. Not every one does: some look ahead (PaliGemma), some leave out
# a factor of the text model's (Granite Speech).
PROVEN = frozenset(
    {
        "aria", "aya_vision", "cohere2_vision", "cohere_compass", "deepseek_vl",
        "deepseek_vl_hybrid", "exaone4_5", "fun_asr_nano", "fuyu", "gemma3", "gemma4",
        "gemma4_unified", "glmasr", "got_ocr2", "hyperclovax_vision_v2", "idefics2", "idefics3",
        "internvl", "janus", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llama4", "llava", "llava_next",
        "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
        "mistral3", "moss_transcribe_diarize", "nemotron_h_omni", "ovis2", "pp_chart2table",
        "qwen2_audio", "qwen3_5", "qwen3_5_moe", "qwen3_asr", "smolvlm", "vibevoice_asr",
        "video_llama_3", "video_llava", "vipllava", "voxtral",
    }
)  # fmt: skip
_LEFT_OUT = {
    "aya_vision": ("logit_scale", 1.0),
    "cohere2_vision": ("logit_scale", 1.0),
    "gemma3": ("final_logit_softcapping", None),
}
"""Type -> a setting of the text model that the whole model's output layer does not read, and the
value with which this makes no difference."""

KEYS = {
    r"^(model\.)?(language_model|text_model)\.model\.": "model.",
    r"^(model\.)?(language_model|text_model)\.lm_head\.": "lm_head.",
    r"^model\.(language_model|text_model)\.": "model.",
    r"^(language_model|text_model)\.": "model.",
}
"""Names of the text model's weights in the whole -> in the text model alone, old forms too."""


class TextPart(NamedTuple):
    """What to load of a model folder."""

    config: PreTrainedConfig
    """Of the text model."""
    whole: str | None
    """The type of the model that it is a part of; None where it is all."""


def text_part(config: PreTrainedConfig) -> TextPart:
    """The configuration of the text model that a configuration is of, or holds.

    Raises:
        BadInputError: there is no such model, or it is one of several parts and not known to be
            the same alone.
    """
    kind = config.model_type
    inner = getattr(config, "text_config", None)
    if not isinstance(inner, PreTrainedConfig):
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise _refusal(kind, "`AutoModelForCausalLM` of transformers knows no such type.")
        number_of_blocks(config)
        return TextPart(config, None)

    if type(inner) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(
            kind,
            f"transformers has no causal language model for its text part alone "
            f"(`text_config`, of type {inner.model_type!r}).",
        )
    if kind not in PROVEN:
        raise _refusal(
            kind,
            f"Its text part ({inner.model_type!r}) is not proven to give alone "
            "what it gives as a part.",
        )
    setting, neutral = _LEFT_OUT.get(kind, ("", None))
    value = getattr(inner, setting, neutral) if setting else neutral
    if value != neutral:
        raise _refusal(
            kind, f"Its text part alone has `{setting}: {value}`, which the whole leaves out."
        )

    # One head, and the whole's configuration says whether it is tied.
    inner = copy.deepcopy(inner)
    inner.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return TextPart(inner, kind)


def of_other_parts(names: Iterable[str], model: nn.Module) -> set[str]:
    """Which of these weight names are of no module that the text model has.

    What is left over inside one of its modules (a block more than the configuration says) is no
    other part's.
    """
    own: set[str] = set()
    for name, module in model.named_children():
        inner = [f"{name}.{child}" for child, _ in module.named_children()]
        own |= set(inner or [name])
    return {name for name in names if not own & _beginnings(name)}


def _beginnings(name: str) -> set[str]:
    for pattern, new in KEYS.items():
        name = re.sub(pattern, new, name)
    first, *rest = name.split(".")
    return {first, ".".join([first, *rest[:1]])}


def _refusal(kind: str, why: str) -> BadInputError:
    return BadInputError(
        f"Models of type {kind!r} are not supported.",
        why,
        "docs/models.md lists the types that work; take a text-only model of that family.",
    )
