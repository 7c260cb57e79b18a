"""The labeler that asks a language model; it looks at examples only, as a person would."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np

from rldecoder.config.llm import LlmConfig
from rldecoder.interp.example_pass import examples_of
from rldecoder.interp.examples import ExampleSettings
from rldecoder.interp.labelers import Evidence, LabelDraft
from rldecoder.interp.llm.backends import ChatRequest
from rldecoder.interp.llm.client import ChatClient, Question
from rldecoder.interp.llm.parsing import LABEL_SCHEMA, parse_label
from rldecoder.interp.llm.prompts import Marked, label_prompt, marked_text

STAND_IN = "tokens that belong to a kind of word, in some context or other, such as {}"
"""Stands for a label in a dry run: of usual length, and another one for each latent."""
LEVELS = 10
"""Strengths are shown as 1 to LEVELS, LEVELS being the strongest example."""


class LlmLabeler:
    """Labels in words, without a predicate; `judge` scores them.

    A refusal, an answer that cannot be read, an abstention and a latent without examples are
    failures with their reason. The same evidence gives the same prompts.

    Args:
        window_tokens: width of an example.
        min_firings: a latent that fires on fewer cells is not labelled (and not asked about).
        purpose: stands before `label` in the ledger.
        on_answer: called after each answer, for progress.
    """

    name = "llm-1"

    def __init__(
        self,
        client: ChatClient,
        config: LlmConfig,
        window_tokens: int,
        min_firings: int,
        on_answer: Callable[[], None] = lambda: None,
        purpose: str = "",
    ) -> None:
        self._client, self._config, self._min_firings = client, config, min_firings
        self._sizes = ExampleSettings(
            window_tokens, config.num_top, config.num_quantile, config.num_negative
        )
        self._on_answer, self._purpose = on_answer, f"{purpose}label"

    def label(self, evidence: Evidence) -> list[LabelDraft]:
        """Label all latents of the evidence; see `Labeler`."""
        questions = self.questions(evidence)
        found = self._client.ask_all(list(questions.values()), self._on_answer)
        answers = dict(zip(questions, found, strict=True))
        counts = _counts(evidence)
        drafts = []
        for row, latent in enumerate(map(int, evidence.firings.latents)):
            text: str | None = None
            failure: str | None = f"fires on {counts[row]} tokens, fewer than {self._min_firings}"
            if latent in answers:
                text, failure = answers[latent]
                if text is None and failure is None:
                    failure = "the model found nothing in common"
            # A model gives no score of its own that could be believed.
            drafts.append(LabelDraft(latent, text, None, failure, 0.0, int(counts[row])))
        return drafts

    def questions(self, evidence: Evidence) -> dict[int, Question[str | None]]:
        """What would be asked, by latent; nothing is sent."""
        grid, firings, vocabulary = evidence
        inside = firings.within(grid.valid.reshape(-1))
        # Examples must not depend on what was drawn before: the cache knows prompts by content.
        examples = examples_of(grid, inside, self._sizes, seed=0)
        shown: dict[int, tuple[list[Any], list[Any]]] = {}
        for row in examples.to_pylist():
            active, silent = shown.setdefault(row["latent"], ([], []))
            tokens = [vocabulary.texts[t] if t >= 0 else "" for t in row["tokens"]]
            if row["kind"] in ("negative", "near_miss"):
                silent.append({"text": marked_text(Marked(tokens, frozenset()))})
            else:
                active.append((tokens, row["acts"]))
        counts = dict(zip(map(int, firings.latents), _counts(evidence), strict=True))
        return {
            latent: Question(
                self._request(latent, _active(active), silent), parse_label, STAND_IN.format(latent)
            )
            for latent, (active, silent) in shown.items()
            if active and counts[latent] >= self._min_firings
        }

    def _request(self, latent: int, active: list[Any], silent: list[Any]) -> ChatRequest:
        messages = label_prompt(active, silent)
        return ChatRequest(self._purpose, latent, messages, self._config.label_tokens, LABEL_SCHEMA)


def _counts(evidence: Evidence) -> np.ndarray[Any, Any]:
    return evidence.firings.within(evidence.grid.valid.reshape(-1)).counts


class _ActiveWindow(TypedDict):
    """A window where the latent fires, as a prompt shows it."""

    text: str
    """With marks."""
    strengths: list[list[str | int]]
    """[token, strength] of each mark."""


def _active(examples: list[tuple[list[str], list[float]]]) -> list[_ActiveWindow]:
    """Windows with marks and strengths relative to the strongest activation shown."""
    largest = max((max(acts) for _, acts in examples), default=0.0)
    out: list[_ActiveWindow] = []
    for tokens, acts in examples:
        marks = [i for i, act in enumerate(acts) if act > 0]
        strengths: list[list[str | int]] = [
            [tokens[i], max(1, math.ceil(LEVELS * acts[i] / largest))] for i in marks
        ]
        out.append({"text": marked_text(Marked(tokens, frozenset(marks))), "strengths": strengths})
    return out
