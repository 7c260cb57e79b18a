"""Sampling responses from the decoder, with everything that PPO reads again.

One response token costs one step of the frozen trunk (KV cache), an SAE encoding and the
decoder. The latents are kept, so that scoring and all inner epochs never run the trunk again, and
so that a bfloat16 trunk cannot pick other latents in a batched pass than it did in the sampling
one. Prompts of one task share a prefix that is computed for one row only.

Axes: B rollout, T response token, K active latents, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.generation import (
    PrefixedBatch,
    newline_token_ids,
    prefix_cache,
    split_prefix,
)
from rldecoder.evals.prompts import TaskPrompt
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


class Sampler(Protocol):
    """Anything that turns prompts into rollouts."""

    def __call__(self, prompts: Sequence[TaskPrompt], generator: torch.Generator) -> Rollout:
        """Sample one response for each prompt."""
        ...


class DecoderSampler:
    """Samples from the decoder at a temperature.

    Args:
        decoder: attached to its frozen model.
        temperature: divides the logits.
        frozen_states: also run the frozen model over the responses, once, for its final hidden
            states (the KL loss and the faithfulness reward need them).
    """

    def __init__(
        self,
        decoder: SaeDecoderForCausalLM,
        *,
        temperature: float = 1.0,
        frozen_states: bool = True,
    ) -> None:
        lm = decoder.frozen.lm
        self.decoder, self.temperature, self.frozen_states = decoder, temperature, frozen_states
        self.tokenizer, self.pad_token_id = lm.tokenizer, lm.pad_token_id
        ends = {*newline_token_ids(lm.tokenizer), lm.eos_token_id}
        self.stop_ids = torch.tensor(sorted(ends), device=lm.device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[TaskPrompt], generator: torch.Generator) -> Rollout:
        """Sample one response for each prompt; batches of one task at a time."""
        groups = []
        for task in dict.fromkeys(prompt.task for prompt in prompts):
            rows = [i for i, prompt in enumerate(prompts) if prompt.task == task]
            ids = [self.tokenizer(prompts[i].prompt)["input_ids"] for i in rows]
            length = prompts[rows[0]].max_new_tokens
            groups.append((rows, self._sample(rows, ids, length, generator)))
        return self._merge(prompts, groups)

    def _sample(
        self,
        rows: list[int],
        prompt_ids: list[list[int]],
        max_tokens: int,
        generator: torch.Generator,
    ) -> _Group:
        """Responses to prompts that share a prefix; `rows` are their places in the batch."""
        decoder = self.decoder
        batch = split_prefix(prompt_ids, self.pad_token_id, decoder.device)
        prefix, past = self._read_prefix(batch)
        ids, mask, positions = batch.suffix, batch.mask, batch.suffix_positions
        alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        tokens, keep, acts, indices = [], [], [], []
        context: Context | None = None
        for _ in range(max_tokens):
            seen = decoder.features(
                ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=past,
                use_cache=True,
            )
            past = seen.past_key_values
            last = SparseLatents(seen.latents.acts[:, -1], seen.latents.indices[:, -1])
            if decoder.blocks is None:
                hidden = decoder.hidden(last)
            else:
                hidden = decoder.hidden(seen.latents, mask, positions, past)[:, -1]
                if context is None:
                    places = torch.tensor(rows, device=ids.device)
                    context = Context(places, prefix, seen.latents, mask, positions)
            logits = decoder.frozen.lm.unembed(hidden) / self.temperature
            probs = logits.softmax(-1)
            # Drawn on the CPU, so that a seed means the same on every device.
            drawn = torch.multinomial(probs.cpu(), 1, generator=generator)[:, 0].to(ids.device)
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
        frozen = self._frozen_hidden(batch, token_ids) if self.frozen_states else None
        latents = SparseLatents(_stack_padded(acts), _stack_padded(indices))
        return _Group(token_ids, torch.stack(keep, 1).long(), latents, frozen, ~alive, context)

    def _read_prefix(self, batch: PrefixedBatch) -> tuple[SparseLatents | None, Cache | None]:
        """Latents of the shared prefix, and the KV cache of trunk and blocks for every row."""
        if batch.prefix.shape[1] == 0:
            return None, None
        seen = self.decoder.features(batch.prefix, use_cache=True)
        past = seen.past_key_values
        assert past is not None
        if self.decoder.blocks is not None:
            self.decoder.hidden(seen.latents, past_key_values=past)
        past.batch_repeat_interleave(len(batch.suffix))
        return seen.latents, past

    def _frozen_hidden(self, batch: PrefixedBatch, token_ids: Tensor) -> Tensor:
        """The frozen model's final hidden states [B, T, D] before each response token."""
        base = self.decoder.frozen.lm.model.base_model
        past = prefix_cache(base, batch)
        width, length = batch.suffix.shape[1], token_ids.shape[1]
        start = batch.suffix_positions
        steps = torch.arange(1, length, device=token_ids.device)
        out = base(
            input_ids=torch.cat([batch.suffix, token_ids[:, :-1]], dim=1),
            attention_mask=F.pad(batch.mask, (0, length - 1), value=1),
            position_ids=torch.cat([start, start[:, -1:] + steps], dim=1),
            past_key_values=past,
            use_cache=past is not None,
        )
        return out.last_hidden_state[:, width - 1 :]

    def _merge(
        self, prompts: Sequence[TaskPrompt], groups: list[tuple[list[int], _Group]]
    ) -> Rollout:
        """Groups of different lengths as one padded batch in the order of the prompts."""
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
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)


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
