"""What the server asks of prompts: readings of bounded length, the last ones kept."""

from __future__ import annotations

from functools import lru_cache

from rldecoder.errors import BadInputError
from rldecoder.explain.prompts import tokenize_prompt
from rldecoder.explain.reading import PromptReader, Reading

KEPT_PROMPTS = 4
"""Prompts whose residuals stay in memory, so that a click need not run the model again."""


class Workbench:
    """Loaded models and the prompts that the page asks about. Not for several threads at once.

    Args:
        reader: as `explain` uses it.
        max_tokens: longest prompt; the work and the memory grow with it.
    """

    def __init__(self, reader: PromptReader, *, max_tokens: int) -> None:
        self.reader = reader
        self.max_tokens = min(max_tokens, reader.lm.context_length)
        self._read = lru_cache(maxsize=KEPT_PROMPTS)(lambda ids: Reading(reader, ids))

    def read(self, prompt: str) -> Reading:
        """The prompt, read now or a moment ago.

        Raises:
            BadInputError: it is empty or too long.
        """
        ids = tokenize_prompt(self.reader.lm, prompt)
        if len(ids) > self.max_tokens:
            raise BadInputError(
                f"The prompt has {len(ids):,} tokens.",
                f"This server takes at most {self.max_tokens:,}.",
                "Shorten it, or start `rldecoder serve` with a larger --max-tokens.",
            )
        return self._read(tuple(ids.tolist()))
