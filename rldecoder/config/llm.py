"""Settings of the language model that labels latents, and of the one that judges its labels."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rldecoder.config.base import Config, HubRepo, Revision, free, name_on_hub

FROZEN = "frozen"
"""The `model` that is the run's own frozen model."""


class LocalModel(Config):
    """A `transformers` model on this machine. Small ones answer badly: see the judge's gate."""

    kind: Literal["local"] = "local"
    """Says that it runs here."""
    model: str = "smollm2-135m-instruct"
    """A name from `rldecoder models` or the path of a spec; a name on the hub with a slash (the
    same as `hub` with `repo`); `folder` (takes `path`), `hub` (takes `repo`), or `frozen`, the
    model that the run decodes."""
    path: str | None = free(None)
    """A local Hugging Face folder. Its content, not its place, identifies the result."""
    repo: HubRepo | None = None
    """`organisation/name` on the Hugging Face hub, for `model: hub`."""
    revision: Revision = "main"
    """Commit or branch of `repo`."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    """Dtype in which it runs."""

    @model_validator(mode="before")
    @classmethod
    def _hub_name(cls, values: Any) -> Any:
        return name_on_hub(values)

    @model_validator(mode="after")
    def _needs_its_source(self) -> LocalModel:
        if self.model == "folder" and self.path is None:
            raise ValueError("model: folder needs `path`, the folder with the model's files")
        if self.model == "hub" and self.repo is None:
            raise ValueError("model: hub needs `repo`, such as organisation/name")
        return self


class Endpoint(Config):
    """A server that speaks OpenAI's chat completions: OpenAI, vLLM, llama.cpp, Ollama, ..."""

    kind: Literal["endpoint"] = "endpoint"
    """Says that it is a server's."""
    base_url: str
    """Up to and without /chat/completions, such as https://api.openai.com/v1. Plain http is
    accepted for this machine only (localhost, 127.0.0.1, ::1): prompts and key are readable."""
    model: str = Field(min_length=1)
    """The name that the server knows the model by."""
    api_key_env: str | None = free(None)
    """Name of the environment variable that holds the key; null for a server without keys. The
    key itself is in no config, artifact, log or error text."""
    structured: bool = True
    """Ask for an answer of a JSON schema (`response_format`); a server that refuses is asked
    without."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the server calls the longest answer; OpenAI's reasoning models want the second."""
    seed: int | None = None
    """`seed` of the request, where the server knows it."""
    price_input: float = free(0.0, ge=0)
    """US dollars a million prompt tokens; 0 for a server of your own."""
    price_output: float = free(0.0, ge=0)
    """US dollars a million answer tokens."""
    timeout_seconds: float = free(60.0, gt=0)
    """How long one attempt may take."""
    max_attempts: int = free(5, ge=1, le=20)
    """Attempts at one request: rate limits, server errors and timeouts are tried again, after the
    server's Retry-After (one of more than two minutes: not at all), else 0.5, 1, 2, ... seconds."""
    concurrency: int = free(4, ge=1, le=256)
    """Requests on their way at once."""
    max_failed_in_a_row: int = free(8, ge=1)
    """So many requests in a row without any answer (all attempts used): the stage stops."""

    @field_validator("base_url")
    @classmethod
    def _safe(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("base_url must start with https:// (or http:// on this machine)")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url must hold no user, password, query or fragment")
        if parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError("plain http is accepted for localhost only; use https")
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        # A key pasted here by mistake would go into every manifest; and the error must not show it.
        if value is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", value):
            raise ValueError("api_key_env is the NAME of an environment variable (capitals)")
        return value


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine, without asking a name server."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # another name


Chat = Annotated[LocalModel | Endpoint, Field(discriminator="kind")]


def simulation_tokens(window_tokens: int) -> int:
    """Tokens of the longest sound answer to a simulation question, by any common tokenizer: at
    most two digits, a comma and a space a number, and the JSON around them."""
    return 4 * window_tokens + 16


class Budget(Config):
    """What all requests of the stage may use together, earlier interrupted runs included.

    Every attempt is counted before it is sent, at the most it can use; one that might go over is
    not sent. The stage then stops with an error, publishes nothing and keeps all answers: with a
    larger budget the same command goes on. So the budget never changes a result.
    """

    max_requests: int | None = free(None, ge=0)
    """Attempts sent, repeated ones included; null: no limit."""
    max_tokens: int | None = free(None, ge=0)
    """Prompt and answer tokens together; null: no limit."""
    max_cost: float | None = free(None, ge=0)
    """US dollars, by the configured prices; null: no limit."""


class LlmConfig(Config):
    """Labels by a language model, and how they are judged."""

    labeler: Chat = LocalModel()
    """The model that writes labels."""
    judge: Chat | None = None
    """The model that scores them; null: the same."""
    budget: Budget = free(Budget())
    """Limits of what is spent."""
    max_features: int | None = Field(default=None, ge=1)
    """Only so many of the most important latents are labelled by it; null: all K."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """0: the most likely answer; null: not sent, for servers that accept none."""
    label_tokens: int = Field(default=200, ge=8)
    """Longest answer of the labeler, in its tokens."""
    judge_tokens: int = Field(default=120, ge=8)
    """Longest answer of the judge, in its tokens."""
    num_top: int = Field(default=8, ge=1)
    """Strongest examples shown to the labeler."""
    num_quantile: int = Field(default=6, ge=0)
    """Weaker examples shown, over the rest of the latent's range."""
    num_negative: int = Field(default=6, ge=0)
    """Windows shown in which the latent does not fire."""
    judge_windows: int = Field(default=5, ge=1, le=50)
    """Windows of each kind that the judge sees: active and silent ones for detection, rightly and
    wrongly marked ones for fuzzing."""
    intruder_questions: int = Field(default=0, ge=0, le=50)
    """Times that the judge is shown five windows and the label, and names the one in which the
    latent is silent; 0: no intruder score."""
    simulation_windows: int = Field(default=0, ge=0, le=50)
    """Windows of each kind, active and silent, of which the judge guesses every token's activation
    from the label, in one question a window; 0: no simulation score."""
    confidence: bool = True
    """Ask the judge once more about each label, on windows of the text that labels come from:
    p(accept) is predicted from that. Without, labels in words have no confidence."""
    control_features: int = Field(default=50, ge=0)
    """Labels that are judged against another latent too, as a control."""
    control_latents: int = Field(default=0, ge=0)
    """So many latents of the random SAE, and as many of the trained one that are drawn alike, are
    labelled and judged in the same way, as a control; 0: none."""
    planted_features: int = Field(default=40, ge=1)
    """Planted features of the judge's gate, each judged with its right and with a wrong label."""
    min_planted: int = Field(default=12, ge=2)
    """With fewer that the text allows, the judge is not trusted."""
    judge_bar: float = Field(default=0.8, ge=0, le=1)
    """Mean detection and mean fuzzing on right labels that a trusted judge reaches."""
    control_tolerance: float = Field(default=0.1, ge=0, le=0.5)
    """How far from 0.5 its means on wrong labels may lie."""
    cache: Path | None = free(None)
    """The file that keeps answers and counts attempts (SQLite); null: `llm_answers.sqlite` in the
    user's cache."""
