"""A `transformers` model on this machine behind the same interface as a server."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import GenerationConfig

from rldecoder.config.base import hash_json
from rldecoder.interp.llm import backends
from rldecoder.interp.llm.prompts import Message
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import tokens_in_front

_SLOT = "\u241fcontent {}\u241f"
"""Stands for a message while the chat template runs; no template prints such a text."""


class LocalChatModel:
    """A causal language model with or without a chat template; one request at a time.

    Args:
        weights: what identifies its content (hashes, or a commit); part of the cache's key.
    """

    max_failed_in_a_row = 1_000_000  # too long prompts are the only failures
    concurrency = 1
    prices = backends.Prices()

    def __init__(
        self,
        folder: Path,
        name: str,
        weights: dict[str, Any],
        temperature: float | None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._lm = FrozenLM.load(folder, dtype=dtype, device=device)
        self.name, self._weights = f"{name} (local)", weights
        self.temperature, self._dtype = temperature or 0.0, dtype
        self._lock = threading.Lock()

    def identity(self) -> dict[str, Any]:
        """See `ChatModel`."""
        return {
            "kind": "local",
            "weights": self._weights,
            "dtype": str(self._dtype),
            "temperature": self.temperature,
        }

    def ready(self) -> None:
        """It is loaded."""

    def count_tokens(self, messages: Sequence[Message]) -> backends.TokenCount:
        """Exact."""
        size = len(self.encode(messages))
        return backends.TokenCount(size, size)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat up to the model's turn.

        Messages are tokenized apart from the template, with control tokens spelled out: a text
        that holds `<|im_end|>` can end no turn.
        """
        text = self._render([Message(m.role, _SLOT.format(i)) for i, m in enumerate(messages)])
        # A template writes its own beginning of text.
        ids = [] if self._lm.tokenizer.chat_template else tokens_in_front(self._lm.tokenizer)
        for index, message in enumerate(messages):
            before, slot, text = text.partition(_SLOT.format(index))
            assert slot, "the chat template dropped a message"
            ids += self._tokens(before, control=True) + self._tokens(message.content, control=False)
        return ids + self._tokens(text, control=True)

    def send(self, request: backends.ChatRequest, attempts: backends.Attempts) -> backends.Reply:
        """See `ChatModel`; nothing here fails by chance.

        Raises:
            NoAnswerError: the prompt and the longest answer do not fit the model's context.
        """
        attempts.begin()
        ids = self.encode(request.messages)
        if len(ids) + request.max_tokens > self._lm.context_length:
            attempts.end("rejected", free=True)
            raise backends.NoAnswerError("rejected")
        with self._lock:
            out = self._generate(ids, request.max_tokens)
        finished = bool(out) and out[-1] in self._lm.end_token_ids
        text = str(self._lm.tokenizer.decode(out, skip_special_tokens=True))
        return backends.Reply(text, "stop" if finished else "length", len(ids), len(out))

    @torch.no_grad()
    def _generate(self, ids: list[int], max_tokens: int) -> list[int]:
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        ends = self._lm.end_token_ids  # a chat's end of turn and the end of text
        settings = GenerationConfig(
            max_new_tokens=max_tokens,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )
        prompt = torch.tensor([ids], device=self._lm.device)
        devices = [self._lm.device] if self._lm.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            # The same question gets the same answer, whatever was asked before.
            torch.manual_seed(int(hash_json(ids)[:15], 16))
            generate: Any = self._lm.model.generate
            found = generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
        return [int(token) for token in found[0, len(ids) :]]

    def _tokens(self, text: str, *, control: bool) -> list[int]:
        found = self._lm.tokenizer(
            text, add_special_tokens=False, split_special_tokens=not control, verbose=False
        )
        return list(found["input_ids"])

    def _render(self, messages: list[Message]) -> str:
        """The chat as the model was trained to read it; plain paragraphs without a template."""
        if not getattr(self._lm.tokenizer, "chat_template", None):
            parts = [f"{message.role}:\n{message.content}" for message in messages]
            return "\n\n".join(parts) + "\n\nassistant:\n"
        chat = [message._asdict() for message in messages]
        try:
            return self._template(chat)
        except jinja2.TemplateError:  # some templates know no system turn
            first = f"{messages[0].content}\n\n{messages[1].content}"
            return self._template([{"role": "user", "content": first}, *chat[2:]])

    def _template(self, chat: list[dict[str, str]]) -> str:
        return str(
            self._lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        )
