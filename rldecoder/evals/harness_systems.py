"""The models that the harness asks: frozen, spliced, and the feature decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.generation import GenerateFunction, greedy, prefix_generate
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.sinks import is_sink
from rldecoder.sae.model import Sae


class System(NamedTuple):
    """A model, as the harness asks it."""

    hidden: Callable[[Tensor, Tensor], Tensor]
    """Final hidden states [B, T, D] of tokens [B, T] under a mask [B, T], padded on the right."""
    generate: GenerateFunction


def frozen_system(lm: FrozenLM) -> System:
    """The frozen model."""
    return System(
        lambda ids, mask: lm.splice(ids, 0, lambda resid: resid, attention_mask=mask),
        prefix_generate(lm.model),
    )


def spliced_system(lm: FrozenLM, sae: Sae, layer: int) -> System:
    """The frozen model with the SAE's reconstruction in place of the residual stream at `layer`.

    Position 0 and other sinks keep theirs, as in `sae.splice`.
    """

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        def replace(resid: Tensor) -> Tensor:
            rows = []
            for row, tokens, real in zip(resid, ids, mask.bool(), strict=True):
                # Padding is no text: it must not move the median that sinks are measured by.
                kept = is_sink(row[real], tokens[real], lm.front)
                kept[0] = True
                new = row.clone()
                read = sae.decode(sae.encode(row[real].float())).to(row.dtype)
                new[real] = torch.where(kept[:, None], row[real], read)
                rows.append(new)
            return torch.stack(rows)

        return lm.splice(ids, layer, replace, attention_mask=mask)

    return System(hidden, _regenerating(lm, hidden))


def decoder_system(lm: FrozenLM, decoder: SaeDecoderForCausalLM) -> System:
    """A feature decoder."""

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        latents = decoder.features(ids, mask).latents
        return decoder.hidden(latents, mask, (mask.cumsum(-1) - 1).clamp_min(0))

    return System(hidden, prefix_generate(decoder))


def _regenerating(lm: FrozenLM, hidden: Callable[[Tensor, Tensor], Tensor]) -> GenerateFunction:
    """Greedy generation without a cache, a row at a time: whatever replaces residuals reads the
    whole text again for every token."""

    def write(prompts: list[Tensor], most: int, ends: Sequence[int], pad: int) -> Tensor:
        rows = []
        for ids in prompts:
            text = ids[None]
            new: list[int] = []
            while len(new) < most and (not new or new[-1] not in ends):
                state = hidden(text, torch.ones_like(text))[:, -1]
                new.append(int(lm.unembed(state).argmax()))
                text = torch.cat([text, text.new_tensor([[new[-1]]])], dim=1)
            rows.append(new + [pad] * (most - len(new)))
        return prompts[0].new_tensor(rows)

    return greedy(write)
