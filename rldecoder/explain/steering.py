"""Changed latents: exactly, at chosen positions, in the frozen model and in the decoder.

A change sets what a latent's activation is. The decoder reads the changed latents; the frozen
model's residual stream at the hook layer gets `(new - old) * W_dec[latent]` added, so that the
SAE's error stays in place and nothing but the latents differs.

Axes: B sequence, T position, K active latents, D model width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import BadInputError
from rldecoder.explain.prompts import encode_prompt
from rldecoder.lm.cut import WholeCache, replaced_input
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import answer_texts
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse

Which = Literal["frozen", "decoder"]
"""The frozen model, or the decoder that sees nothing but latents."""


class Changed(NamedTuple):
    """Latents before and after, in the same columns."""

    before: SparseLatents
    """[..., T, K + s]: s changes of the kinds `set` and `clamp` have columns, here without act."""
    after: SparseLatents
    """The same columns with the new acts."""

    def added(self, sae: Sae) -> Float[Tensor, "*places d_model"]:
        """What the change adds to the residual stream: [..., T, D]."""
        acts = self.after.acts - self.before.acts
        return decode_sparse(
            SparseLatents(acts, self.after.indices), sae.W_dec, sae.W_dec.new_zeros(sae.d_model)
        )


@dataclass(frozen=True)
class Changes:
    """What becomes of some latents' activations; all others stay as they are."""

    scale: Mapping[int, float] = field(default_factory=dict)
    """Factors: 0 takes a latent out, 1 changes nothing, 2 doubles it. An inactive one stays so."""
    set: Mapping[int, float] = field(default_factory=dict)
    """Activations, in the SAE's units, whatever they were."""
    clamp: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest activation; between the two it stays. The greatest may be infinite."""

    @property
    def latents(self) -> list[int]:
        """All that are named."""
        return [*self.scale, *self.set, *self.clamp]

    def check(self, num_latents: int) -> None:
        """Refuse what cannot be meant.

        Raises:
            BadInputError: no such latent, a value that is no number, or two changes of one latent.
        """
        for latent in self.latents:
            if not 0 <= latent < num_latents:
                raise BadInputError(
                    f"There is no latent {latent}.",
                    f"The dictionary has latents 0 to {num_latents - 1}.",
                    "Choose one of those.",
                )

        # NaN or infinity would make every later residual NaN, and so every token the same.
        lows = [(latent, low) for latent, (low, _) in self.clamp.items()]
        for latent, value in (*self.scale.items(), *self.set.items(), *lows):
            if not math.isfinite(value):
                raise BadInputError(
                    f"Latent {latent} cannot be changed by {value}.",
                    "A factor or an activation is a finite number.",
                    "Give another one.",
                )

        for latent, act in self.set.items():
            if act < 0:
                raise BadInputError(
                    f"Latent {latent} cannot have the activation {act}.",
                    "Activations of an SAE are never negative.",
                    "Set 0 or more; a negative factor (`scale`) turns an active latent around.",
                )

        for latent, (low, high) in self.clamp.items():
            if not 0 <= low <= high:  # NaN is none of them
                raise BadInputError(
                    f"Latent {latent} cannot be held between {low} and {high}.",
                    "Activations are never negative, and the least is not above the greatest.",
                    "Give 0 <= least <= greatest.",
                )

        if twice := sorted(one for one, times in Counter(self.latents).items() if times > 1):
            raise BadInputError(
                f"Latent {twice[0]} is to be changed in two ways.",
                "It can be scaled, set or clamped; one of the two would be lost.",
                "Name it once.",
            )

    def apply(self, latents: SparseLatents, where: Bool[Tensor, " length"]) -> Changed:
        """Latents [..., T, K] with the changes at the positions that are true in `where` [T]."""
        here = where[:, None]
        acts = latents.acts
        for latent, factor in self.scale.items():
            acts = torch.where(here & (latents.indices == latent), acts * factor, acts)
        own = [*self.set, *self.clamp]
        if not own:
            return Changed(latents, SparseLatents(acts, latents.indices))

        # A latent that is set or clamped loses its place among the active ones and gets a column
        # of its own: it may have been inactive.
        named = torch.tensor(own, device=acts.device)
        values = torch.stack([self._own(latent, latents) for latent in own], dim=-1)
        acts = acts.masked_fill(here & torch.isin(latents.indices, named), 0.0)
        shape = (*acts.shape[:-1], len(named))
        indices = torch.cat([latents.indices, named.expand(shape)], dim=-1)
        new = torch.cat([acts, values * here], dim=-1)
        return Changed(
            SparseLatents(F.pad(latents.acts, (0, len(named))), indices),
            SparseLatents(new, indices),
        )

    def _own(self, latent: int, latents: SparseLatents) -> Tensor:
        """[..., T]: what a latent that is set or clamped becomes."""
        act = (latents.acts * (latents.indices == latent)).sum(-1)
        if latent in self.set:
            return torch.full_like(act, self.set[latent])
        return act.clamp(*self.clamp[latent])


@contextmanager
def changed_frozen(lm: FrozenLM, sae: Sae, changes: Changes, start: int = 1) -> Iterator[None]:
    """While open, `lm.model` computes with changed latents from position `start` on.

    With a KV cache or without: where a call begins is read from its cache.
    """

    def change(resid: Tensor) -> Tensor:
        positions = first() + torch.arange(resid.shape[1], device=resid.device)
        changed = changes.apply(sae.encode(resid.float()), positions >= start)
        return (resid.float() + changed.added(sae)).to(resid.dtype)

    door = lm.part_after(sae.spec.hook_layer)
    with _told(lm.model, _first_position) as first, replaced_input(door, change):
        yield


@contextmanager
def changed_decoder(
    decoder: SaeDecoderForCausalLM, changes: Changes, start: int = 1
) -> Iterator[None]:
    """While open, the decoder reads changed latents from position `start` on."""

    def change(_model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        latents: SparseLatents = args[0]
        # A linear decoder is given the last positions only, those whose logits are wanted.
        num = latents.acts.shape[-2]
        positions = first() + length() - num + torch.arange(num, device=latents.acts.device)
        return (changes.apply(latents, positions >= start).after, *args[1:])

    with _told(decoder, _first_position) as first, _told(decoder, _length) as length:
        handle = decoder.model.register_forward_pre_hook(change)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Steering:
    """Both models with some latents changed at every position from `start` on."""

    lm: FrozenLM
    sae: Sae
    decoder: Callable[[], SaeDecoderForCausalLM]
    """Called when the decoder is asked for."""
    changes: Changes
    start: int = 1
    """First position that is changed; 0 is an attention sink that no SAE was trained on."""

    def __post_init__(self) -> None:
        self.changes.check(self.sae.num_latents)
        if self.start < 1:
            raise BadInputError(
                f"Steering cannot begin at position {self.start}.",
                "Position 0 is an attention sink, which no SAE was trained on.",
                "Give `start` as 1 or more.",
            )

    @torch.no_grad()
    def generate(
        self,
        prompt: str,
        *,
        model: Which = "frozen",
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """What the model writes after the prompt, as far as `max_new_tokens` or its end of text.

        Args:
            temperature: 0 takes the likeliest token each time; above, tokens are drawn.
            seed: of the draws.
            on_text: told the new text so far after each token; what it raises ends the writing.

        Raises:
            BadInputError: the prompt is empty, it and the new tokens are longer than the model's
                context, or there is no such model.
        """
        lm = self.lm
        ids = encode_prompt(lm, prompt)
        if len(ids) + max_new_tokens > lm.context_length:
            raise BadInputError(
                f"{len(ids):,} tokens and {max_new_tokens:,} new ones are too many.",
                f"The model reads at most {lm.context_length:,}.",
                "Shorten the prompt, or lower `max_new_tokens`.",
            )

        settings = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=lm.end_token_ids,
            pad_token_id=lm.pad_token_id,
            do_sample=temperature > 0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        )

        # Draws are the call's own: the caller's random numbers go on as if there were none.
        writer, cache, steered = self._of(model)
        with steered, torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else None):
            torch.manual_seed(seed)
            out = writer.generate(
                ids[None],
                attention_mask=torch.ones_like(ids[None]),
                generation_config=settings,
                streamer=None if on_text is None else _Teller(self._text, on_text),
                **cache,
            )
        return self._text(out[0, len(ids) :].tolist())

    def _text(self, new: list[int]) -> str:
        """New tokens as text, up to the end of the text."""
        return answer_texts(self.lm.tokenizer, [new], self.lm.end_token_ids)[0]

    def _of(self, model: Which) -> tuple[Any, dict[str, Cache], AbstractContextManager[None]]:
        """A model, its KV cache where it does not make the right one itself, and its steering."""
        if model == "frozen":
            cache: dict[str, Cache] = {"past_key_values": WholeCache(self.lm.model.config)}
            steered = changed_frozen(self.lm, self.sae, self.changes, self.start)
            return self.lm.model, cache, steered
        if model == "decoder":
            decoder = self.decoder()
            return decoder, {}, changed_decoder(decoder, self.changes, self.start)
        raise BadInputError(
            f"There is no model {model!r}.",
            "Text is written by `frozen` or `decoder`.",
            "Take one.",
        )


class _Teller(BaseStreamer):
    """Tells the text so far after each new token."""

    def __init__(self, text: Callable[[list[int]], str], tell: Callable[[str], None]) -> None:
        self._text, self._tell = text, tell
        self._new: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """First the prompt, then each new token."""
        if self._new is None:
            self._new = []
            return
        self._new += value.flatten().tolist()
        self._tell(self._text(self._new))

    def end(self) -> None:
        """Nothing is kept back."""


@contextmanager
def _told(
    model: nn.Module, read: Callable[[tuple[Any, ...], dict[str, Any]], int]
) -> Iterator[Callable[[], int]]:
    """While open, tells what `read` makes of the arguments of the model's present call."""
    found = 0

    def look(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal found
        found = read(args, kwargs)

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield lambda: found
    finally:
        handle.remove()


def _first_position(_args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Where the tokens of a call begin: its cache's length."""
    past = kwargs.get("past_key_values")
    return 0 if past is None else int(past.get_seq_length())


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many tokens a call has."""
    return int((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])
