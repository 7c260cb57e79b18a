"""Sampling responses from the decoder, with everything that PPO reads again.

One response token costs one step of the frozen trunk (KV cache), an SAE encoding and the
decoder. The latents are kept, so that scoring and all inner epochs never run the trunk again, and
so that a bfloat16 trunk cannot pick other latents in a batched pass than it did in the sampling
one. The frozen model's own predictions go on from the same residual stream, once, after sampling.
Prompts of one task share a prefix that is computed for one row, and kept for later rollouts.

Axes: B rollout, P prefix, S rest of the prompt, T response token, K active latents, D model width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import NumericalError
from rldecoder.evals.generation import (
    PrefixedBatch,
    newline_token_ids,
    split_prefix,
)
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.task_text import solution
from rldecoder.lm.cut import keeps_states, repeat_rows
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import answer_texts, encode_prompts
from rldecoder.sae.model import SparseLatents


class Context(NamedTuple):
    """Prompts that share a prefix, as a decoder with blocks reads them again.

    P prefix, S rest of the prompt, padded on the left.
    """

    rows: Tensor
    """[b] their rollouts."""
    prefix: SparseLatents | None
    """[1, P, K]; None when nothing is shared."""
    suffix: SparseLatents
    """[b, S, K]"""
    mask: Tensor
    """[b, P + S] int64, 0 on the padding between prefix and suffix."""
    positions: Tensor
    """[b, S]"""


class Rollout(NamedTuple):
    """A batch of responses; rows in the order of the prompts."""

    prompts: list[TaskPrompt]
    token_ids: Tensor
    """[B, T] sampled tokens, the end token included; padding on the right."""
    mask: Tensor
    """[B, T] int64: 1 on sampled tokens."""
    latents: SparseLatents
    """[B, T, K] of the state in which each token was sampled; acts 0 on padding."""
    frozen_hidden: Tensor | None
    """[B, T, D] the frozen model's final hidden states in the same states."""
    finished: Tensor
    """[B] bool: ended by itself, not by the length limit."""
    completions: list[str]
    contexts: tuple[Context, ...] = ()
    """The prompts' latents; only for decoders with blocks."""


Answers = Literal["own", "gold", "teacher"]
"""Whose responses are taken: the decoder's samples, the right answers as the worked examples give
them (each with a line break), or the frozen model's samples."""

_PREFIXES = 8
"""How many prefixes are kept: a batch may chance to share some tokens beyond its task's own."""


class Sampler(Protocol):
    """Anything that turns prompts into rollouts."""

    def __call__(self, prompts: Sequence[TaskPrompt], generator: torch.Generator) -> Rollout:
        """Sample one response for each prompt."""
        ...


class DecoderSampler:
    """Samples responses at a temperature, from the decoder unless told otherwise.

    Args:
        decoder: attached to its frozen model.
        temperature: divides the logits.
        frozen_states: also run the rest of the frozen model over the responses, once, for its
            final hidden states (the KL loss and the faithfulness reward need them).
        answers: whose responses are taken; the latents are of the states in which they were.
    """

    def __init__(
        self,
        decoder: SaeDecoderForCausalLM,
        *,
        temperature: float = 1.0,
        frozen_states: bool = True,
        answers: Answers = "own",
    ) -> None:
        lm = decoder.frozen.lm
        self.answers = answers
        self.decoder, self.temperature, self.frozen_states = decoder, temperature, frozen_states
        self.tokenizer, self.pad_token_id = lm.tokenizer, lm.pad_token_id
        self.end_ids = lm.end_token_ids
        stops = {*newline_token_ids(lm.tokenizer), *self.end_ids}
        self.stop_ids = torch.tensor(sorted(stops), device=lm.device)
        self._kept_prefix = lru_cache(_PREFIXES)(self._read_prefix)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[TaskPrompt], generator: torch.Generator) -> Rollout:
        """Sample one response for each prompt; batches of one task at a time."""
        groups = []
        for task in dict.fromkeys(prompt.task for prompt in prompts):
            rows = [i for i, prompt in enumerate(prompts) if prompt.task == task]
            ids = encode_prompts(self.tokenizer, [prompts[i].prompt for i in rows])
            forced = self._gold([prompts[i] for i in rows]) if self.answers == "gold" else None
            length = prompts[rows[0]].max_new_tokens if forced is None else forced.shape[1]
            groups.append((rows, self._sample(rows, ids, length, generator, forced)))
        return self._merge(prompts, groups)

    def _sample(
        self,
        rows: list[int],
        prompt_ids: list[list[int]],
        max_tokens: int,
        generator: torch.Generator,
        forced: Tensor | None,
    ) -> _Group:
        """Responses to prompts that share a prefix; `rows` are their places in the batch. Where
        `forced` [B, T] is given, its tokens are taken instead of drawn ones."""
        decoder, lm = self.decoder, self.decoder.frozen.lm
        batch = split_prefix(
            prompt_ids, self.pad_token_id, decoder.device,
            share=not keeps_states(decoder.trunk_config),
        )  # fmt: skip
        # What one prompt alone "shares" is the prompt itself, which may never be asked again.
        keep_prefix = len(set(map(tuple, prompt_ids))) > 1
        prefix, past, tail_past = self._start(batch, keep_prefix)
        ids, mask, positions = batch.suffix, batch.mask, batch.suffix_positions
        alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        tokens, keep, acts, indices, resids, places = [], [], [], [], [], []
        teacher = self._teacher(tail_past) if self.answers == "teacher" else None
        context: Context | None = None

        for turn in range(max_tokens):
            # The first pass reads the prompts, every later one a token of each.
            seen = decoder.features(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past = seen.past_key_values
            resids.append(seen.resid)
            places.append(positions)

            last = SparseLatents(seen.latents.acts[:, -1], seen.latents.indices[:, -1])
            if not decoder.looks_back:
                hidden = decoder.hidden(last)
            else:
                hidden = decoder.hidden(seen.latents, mask, positions, past)[:, -1]
                if context is None:
                    numbers = torch.tensor(rows, device=ids.device)
                    context = Context(numbers, prefix, seen.latents, mask, positions)

            if teacher is not None:
                hidden = teacher(seen.resid, mask, positions)
            if forced is None:
                logits = lm.unembed(hidden) / self.temperature
                drawn = draw(logits.softmax(-1), generator)
            else:
                drawn = forced[:, turn]
            token = torch.where(alive, drawn, self.pad_token_id)
            tokens.append(token)
            keep.append(alive)
            acts.append(last.acts * alive[:, None])
            indices.append(last.indices)
            alive = alive & ~torch.isin(token, self.stop_ids)
            if not alive.any():
                break
            ids, positions = token[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)

        token_ids = torch.stack(tokens, dim=1)
        frozen = None
        if self.frozen_states and teacher is not None:
            frozen = torch.stack(teacher.seen, dim=1)
        elif self.frozen_states:  # nothing was read after the last token
            frozen = lm.tail(
                torch.cat(resids, dim=1),
                decoder.config.hook_layer,
                attention_mask=F.pad(batch.mask, (0, len(tokens) - 1), value=1),
                position_ids=torch.cat(places, dim=1),
                past_key_values=tail_past,
            )[:, batch.suffix.shape[1] - 1 :]
        latents = SparseLatents(_stack_padded(acts), _stack_padded(indices))
        return _Group(token_ids, torch.stack(keep, 1).long(), latents, frozen, ~alive, context)

    def _teacher(self, past: Cache | None) -> _Teacher:
        lm, layer = self.decoder.frozen.lm, self.decoder.config.hook_layer
        return _Teacher(lm, layer, lm.tail_cache(layer) if past is None else past)

    def _gold(self, prompts: Sequence[TaskPrompt]) -> Tensor:
        """Tokens [B, T] of the right answers, each ended by a line break and padded with more."""
        texts = [solution(prompt) + "\n" for prompt in prompts]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        length = max(map(len, ids))
        rows = [[*row, *row[-1:] * (length - len(row))] for row in ids]
        return torch.tensor(rows, device=self.decoder.device)

    def _start(
        self, batch: PrefixedBatch, keep: bool
    ) -> tuple[SparseLatents | None, Cache | None, Cache | None]:
        """The shared prefix: its latents, and the KV caches of every row.

        The first cache is that of trunk and decoder, the second that of the frozen blocks after.
        """
        if batch.prefix.shape[1] == 0:
            return None, None, None
        read = self._kept_prefix if keep else self._read_prefix
        latents, past, tail_past = copy.deepcopy(read(tuple(batch.prefix[0].tolist())))
        if self.decoder.looks_back:  # they are trained: what they saw changes
            self.decoder.hidden(latents, past_key_values=past)
        for cache in (past, tail_past):
            if cache is not None:
                repeat_rows(cache, len(batch.suffix))
        return latents, past, tail_past

    def _read_prefix(self, token_ids: tuple[int, ...]) -> tuple[SparseLatents, Cache, Cache | None]:
        """Latents [1, P, K] of the prefix, and its row in the caches of the frozen blocks."""
        ids = torch.tensor([token_ids], device=self.decoder.device)
        seen = self.decoder.features(ids, use_cache=True)
        assert seen.past_key_values is not None
        tail_past = None
        if self.frozen_states or self.answers == "teacher":
            lm, layer = self.decoder.frozen.lm, self.decoder.config.hook_layer
            tail_past = lm.tail_cache(layer)
            lm.tail(seen.resid, layer, past_key_values=tail_past)
        return seen.latents, seen.past_key_values, tail_past

    def _merge(
        self, prompts: Sequence[TaskPrompt], groups: list[tuple[list[int], _Group]]
    ) -> Rollout:
        """Groups of different lengths as one padded batch in the order of the prompts."""
        # Tasks allow answers of different lengths; a relu SAE has other numbers of active latents.
        length = max(group.token_ids.shape[1] for _, group in groups)
        active = max(group.latents.acts.shape[-1] for _, group in groups)

        def gather(parts: list[Tensor], value: int = 0, inner: int = 0) -> Tensor:
            padded = []
            for part in parts:
                short = length - part.shape[1]
                tail = (0, inner - part.shape[2]) if inner else (0, 0) * (part.dim() - 2)
                padded.append(F.pad(part, (*tail, 0, short), value=value))
            return torch.cat(padded)[order]

        rows = [row for group_rows, _ in groups for row in group_rows]
        order = torch.tensor(rows).argsort().to(groups[0][1].token_ids.device)
        parts = [group for _, group in groups]
        token_ids = gather([part.token_ids for part in parts], self.pad_token_id)
        mask = gather([part.mask for part in parts])
        hidden = [part.frozen_hidden for part in parts if part.frozen_hidden is not None]

        return Rollout(
            list(prompts),
            token_ids,
            mask,
            SparseLatents(
                gather([part.latents.acts for part in parts], inner=active),
                gather([part.latents.indices for part in parts], inner=active),
            ),
            gather(hidden) if hidden else None,
            torch.cat([part.finished for part in parts])[order],
            self._texts(token_ids, mask),
            tuple(group.context for _, group in groups if group.context is not None),
        )

    def _texts(self, token_ids: Tensor, mask: Tensor) -> list[str]:
        rows = [ids[keep.bool()].tolist() for ids, keep in zip(token_ids, mask, strict=True)]
        return answer_texts(self.tokenizer, rows, self.end_ids)


def draw(probs: Float[Tensor, "batch vocab"], generator: torch.Generator) -> Int[Tensor, " batch"]:
    """One token id [B] from each row of `probs` [B, V], by inversion (Devroye 1986, chapter III.2).

    One number a row comes from the CPU's `generator`, so that a seed means the same on every
    device. `torch.multinomial` draws one for every token of the vocabulary: 20 times slower.

    Raises:
        NumericalError: a row holds NaN or infinity.
    """
    bounds = probs.cumsum(-1)
    total = bounds[:, -1:]
    if not total.isfinite().all():
        raise NumericalError(
            "The decoder's probabilities for the next token are not finite.",
            "Its weights or the latents hold NaN or infinity: training has diverged.",
            "Lower `train_ppo.ppo.lr` or its weights of losses, and run the stage again.",
        )
    # Shares are below 1, so that the first bound above a share's part of the total exists.
    shares = torch.rand(len(probs), 1, generator=generator).to(probs.device)
    return torch.searchsorted(bounds, shares * total, right=True)[:, 0]


class _Teacher:
    """The rest of the frozen model, one token after the other, as sampling from it needs it."""

    def __init__(self, lm: FrozenLM, layer: int, past: Cache) -> None:
        self.lm, self.layer, self.past = lm, layer, past
        self.seen: list[Tensor] = []
        """[B, D] of each turn."""

    def __call__(self, resid: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Its final hidden state [B, D] at the last of the new positions [B, T, D]."""
        hidden = self.lm.tail(
            resid,
            self.layer,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.past,
        )[:, -1]
        self.seen.append(hidden)
        return hidden


class _Group(NamedTuple):
    """Responses to the prompts of one task; fields as in `Rollout`."""

    token_ids: Tensor
    mask: Tensor
    latents: SparseLatents
    frozen_hidden: Tensor | None
    finished: Tensor
    context: Context | None


def _stack_padded(steps: list[Tensor]) -> Tensor:
    """Stack [B, K_t] along a new T axis, padding K with zeros (a relu SAE's K varies)."""
    width = max(step.shape[-1] for step in steps)
    return torch.stack([F.pad(step, (0, width - step.shape[-1])) for step in steps], dim=1)
