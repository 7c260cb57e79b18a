"""What many decoders answer to the same questions: greedily, and in samples at temperature 1.

All decoders read the same frozen trunk and SAE, so that a prompt, and each beginning of an answer
that any of them takes, is read once for all. An answer that can no longer become right is not
written to its end. Decoders draw with the same random numbers, which makes their differences
smaller; the frozen model draws with numbers of its own, so that its luck on a question is not
theirs: how often it is right is what the experiment's slope is taken on.

Axes: B prompts of a batch, P shared prefix, S rest of the prompt, N beginnings of answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from rldecoder.decoder.blocks import plain_attention
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.generation import newline_token_ids, split_prefix
from rldecoder.evals.prompts import TaskPrompt, score
from rldecoder.lm.cut import choose_rows, repeat_rows
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import answer_texts, encode_prompts
from rldecoder.sae.model import SparseLatents
from rldecoder.sae.sparse_ops import decode_sparse
from rldecoder.seeds import derive_seed

Node = tuple[int, tuple[int, ...]]
"""A prompt's row, and the tokens of an answer to it so far."""

BATCH = 48
FROZEN = "frozen"
_ARTICLES = ("a", "an", "the")


class Answers(NamedTuple):
    """One system on all questions."""

    greedy: NDArray[np.float64]
    """[questions] 0 or 1."""
    samples: NDArray[np.float64]
    """[questions] share of samples that are right."""
    start_kl: NDArray[np.float64]
    """[questions] KL(supervised start || system) of the answer's first token, nats."""


class Asked(NamedTuple):
    """All systems on the same questions."""

    prompts: list[TaskPrompt]
    systems: dict[str, Answers]


class Reader(Protocol):
    """A system that predicts from what the trunk has read."""

    def prefix(self, latents: SparseLatents, resid: Tensor, rows: int) -> None:
        """Read the shared prefix [1, P] and keep it for so many rows."""

    def read(
        self, latents: SparseLatents, resid: Tensor, mask: Tensor, positions: Tensor
    ) -> Tensor:
        """Final hidden states [N, D] at the last of new positions."""
        ...

    def choose(self, rows: Tensor) -> None:
        """Go on with these rows of what was read, some of them several times."""


class _Linear:
    def __init__(self, decoder: SaeDecoderForCausalLM) -> None:
        self.decoder = decoder

    def prefix(self, latents: SparseLatents, resid: Tensor, rows: int) -> None:
        """Other positions move nothing."""

    def read(
        self, latents: SparseLatents, resid: Tensor, mask: Tensor, positions: Tensor
    ) -> Tensor:
        return self.decoder.hidden(SparseLatents(latents.acts[:, -1], latents.indices[:, -1]))

    def choose(self, rows: Tensor) -> None:
        """Nothing is kept."""


class _Blocks:
    def __init__(self, decoder: SaeDecoderForCausalLM) -> None:
        self.decoder, self.cache = decoder, DynamicCache()

    def prefix(self, latents: SparseLatents, resid: Tensor, rows: int) -> None:
        with plain_attention():
            self.decoder.blocks(self._resid(latents), past_key_values=self.cache)
        repeat_rows(self.cache, rows)

    def read(
        self, latents: SparseLatents, resid: Tensor, mask: Tensor, positions: Tensor
    ) -> Tensor:
        with plain_attention():
            hidden: Tensor = self.decoder.blocks(
                self._resid(latents),
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self.cache,
            )
        return hidden[:, -1]

    def choose(self, rows: Tensor) -> None:
        choose_rows(self.cache, rows)

    def _resid(self, latents: SparseLatents) -> Tensor:
        return decode_sparse(latents, self.decoder.W, self.decoder.b)


class _Frozen:
    def __init__(self, lm: FrozenLM, layer: int) -> None:
        self.lm, self.layer, self.cache = lm, layer, lm.tail_cache(layer)

    def prefix(self, latents: SparseLatents, resid: Tensor, rows: int) -> None:
        self.lm.tail(resid, self.layer, past_key_values=self.cache)
        repeat_rows(self.cache, rows)

    def read(
        self, latents: SparseLatents, resid: Tensor, mask: Tensor, positions: Tensor
    ) -> Tensor:
        return self.lm.tail(
            resid,
            self.layer,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
        )[:, -1]

    def choose(self, rows: Tensor) -> None:
        choose_rows(self.cache, rows)


def _reader(decoder: SaeDecoderForCausalLM) -> Reader:
    return _Blocks(decoder) if decoder.looks_back else _Linear(decoder)


def undecided(completion: str, answer: str) -> bool:
    """Whether the first word of what is written so far can still become the answer.

    `first_word` reads lower case, drops punctuation, and passes over articles.
    """
    words = "".join(c for c in completion.lower() if c.isalnum() or c.isspace()).split()
    while len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    if not words:
        return True
    return answer.startswith(words[0]) or any(word.startswith(words[0]) for word in _ARTICLES)


@torch.no_grad()
def ask_all(
    lm: FrozenLM,
    decoders: Mapping[str, SaeDecoderForCausalLM],
    prompts: Sequence[TaskPrompt],
    *,
    samples: int,
    teacher_samples: int,
    seed: int,
) -> Asked:
    """Every decoder, and the frozen model, on every question.

    Args:
        lm: the frozen model.
        decoders: on one SAE; the first is the start that `start_kl` is counted from.
        prompts: those of one task stand together.
        samples: of each decoder a question.
        teacher_samples: of the frozen model.
        seed: of the draws.
    """
    batches: dict[str, list[Answers]] = {name: [] for name in (*decoders, FROZEN)}
    stops = torch.tensor([*newline_token_ids(lm.tokenizer), *lm.end_token_ids])
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        mine = [prompt for prompt in prompts if prompt.task == task]
        for start in range(0, len(mine), BATCH):
            batch = _Batch(lm, decoders, mine[start : start + BATCH], stops)
            drawn = {FROZEN: teacher_samples}
            found = batch.ask(
                {name: drawn.get(name, samples) for name in batches},
                {
                    name: derive_seed(seed, "teacher" if name == FROZEN else "own", task, start)
                    for name in batches
                },
            )
            for name, answers in found.items():
                batches[name].append(answers)
    return Asked(
        list(prompts),
        {
            name: Answers(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
            for name, found in batches.items()
        },
    )


class _Batch:
    """Prompts of one task, and all that has been read of them and of the answers to them."""

    def __init__(
        self,
        lm: FrozenLM,
        decoders: Mapping[str, SaeDecoderForCausalLM],
        prompts: Sequence[TaskPrompt],
        stops: Tensor,
    ) -> None:
        first = next(iter(decoders.values()))
        self.lm, self.trunk, self.prompts, self.stops = lm, first, prompts, stops
        self.readers: dict[str, Reader] = {name: _reader(d) for name, d in decoders.items()}
        self.readers[FROZEN] = _Frozen(lm, first.config.hook_layer)
        self.start = next(iter(decoders))

    def ask(self, samples: Mapping[str, int], seeds: Mapping[str, int]) -> dict[str, Answers]:
        """Each system's answers; a system of so many samples draws with its own seed."""
        split = split_prefix(
            encode_prompts(self.lm.tokenizer, [p.prompt for p in self.prompts]),
            self.lm.pad_token_id,
        )
        seen = self.trunk.features(split.prefix, use_cache=True)
        past = seen.past_key_values
        assert past is not None
        for reader in self.readers.values():
            reader.prefix(seen.latents, seen.resid, len(self.prompts))
        repeat_rows(past, len(self.prompts))

        # What each system has written: the prompt, and the tokens so far. First choice first.
        turns = self.prompts[0].max_new_tokens
        written: dict[str, list[Node]] = {
            name: [(row, ()) for row in range(len(self.prompts)) for _ in range(1 + count)]
            for name, count in samples.items()
        }
        generators = {name: torch.Generator().manual_seed(s) for name, s in seeds.items()}
        nodes: list[Node] = [(i, ()) for i in range(len(self.prompts))]
        ids, mask, positions = split.suffix, split.mask, split.suffix_positions
        start_kl: dict[str, NDArray[np.float64]] = {}
        first: Tensor | None = None

        for turn in range(turns):
            seen = self.trunk.features(ids, mask, positions, past, use_cache=True)
            place = {node: i for i, node in enumerate(nodes)}
            for name, reader in self.readers.items():
                hidden = reader.read(seen.latents, seen.resid, mask, positions)
                here = sorted({place[node] for node in written[name] if node in place})
                logprobs = self.lm.unembed(hidden[here]).log_softmax(-1)
                if turn == 0:
                    first = logprobs if first is None else first
                    kl = (first.exp() * (first - logprobs)).sum(-1)
                    start_kl[name] = kl.double().numpy()
                rows = {node: i for i, node in enumerate(nodes[j] for j in here)}
                written[name] = self._go_on(
                    written[name], rows, logprobs, 1 + samples[name], generators[name]
                )
            if turn == turns - 1:
                break

            # Beginnings that some system has written and that may still become right.
            going = sorted({n for all_ in written.values() for n in all_ if self._open(n, turn)})
            if not going:
                break
            parents = torch.tensor([place[row, tokens[:-1]] for row, tokens in going])
            choose_rows(past, parents)
            for reader in self.readers.values():
                reader.choose(parents)
            mask = torch.cat([mask[parents], torch.ones(len(going), 1, dtype=mask.dtype)], 1)
            positions = positions[parents, -1:] + 1
            ids = torch.tensor([[tokens[-1]] for _, tokens in going])
            nodes = going

        return {
            name: self._scored(written[name], 1 + samples[name], start_kl[name])
            for name in self.readers
        }

    def _open(self, node: Node, turn: int) -> bool:
        row, tokens = node
        if len(tokens) != turn + 1 or tokens[-1] in self.stops:
            return False
        return undecided(self._text(tokens), self.prompts[row].answer)

    def _go_on(
        self,
        written: list[Node],
        rows: Mapping[Node, int],
        logprobs: Tensor,
        each: int,
        generator: torch.Generator,
    ) -> list[Node]:
        """A token more for what goes on; every answer's number is drawn, so that those of systems
        that ended elsewhere stay the same."""
        numbers = torch.rand(len(written), 1, generator=generator)
        bounds, best = logprobs.double().exp().cumsum(-1), logprobs.argmax(-1)
        out = list(written)
        for i, node in enumerate(written):
            if node in rows:
                at = rows[node]
                token = int(best[at])
                if i % each:
                    total = bounds[at, -1]
                    share = numbers[i].double() * total
                    token = int(torch.searchsorted(bounds[at], share, right=True))
                out[i] = (node[0], (*node[1], min(token, bounds.shape[1] - 1)))
        return out

    def _text(self, tokens: Sequence[int]) -> str:
        return answer_texts(self.lm.tokenizer, [list(tokens)], self.lm.end_token_ids)[0]

    def _scored(
        self,
        written: list[Node],
        each: int,
        start_kl: NDArray[np.float64],
    ) -> Answers:
        rights = [score(self.prompts[row], self._text(tokens)) for row, tokens in written]
        by_prompt = np.array(rights).reshape(len(self.prompts), each)
        return Answers(by_prompt[:, 0], by_prompt[:, 1:].mean(1), start_kl)
