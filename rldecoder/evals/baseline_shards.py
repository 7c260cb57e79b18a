"""The frozen model's baselines in shards that any worker computes.

There are four kinds, in one job, so that a worker loads the model once: sums over text that the
affine lens is fitted on, Jacobians, measurements of all lenses over text, and tasks. Measurements
need the lenses, which the stage writes for them when the first two kinds are there. Sums of a run
of text are one term of the whole; whatever else is added up comes back term by term, so that the
join adds in the order of one pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder import files
from rldecoder.config.data import BaselinesConfig
from rldecoder.data.shards import SplitSequences
from rldecoder.errors import BadInputError
from rldecoder.evals.generation import newline_token_ids, prefix_generate
from rldecoder.evals.prompts import TASKS, Task, TaskPrompt, make_prompts
from rldecoder.evals.suite import check_lengths
from rldecoder.evals.tasks import TaskRow, rows_from_json, rows_to_json, run_task
from rldecoder.executors.jobs import ShardFile, ShardSettings, TensorWorker, as_tensor, as_text
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.jacobian import (
    POSITIONS_AT_ONCE,
    JacobianMap,
    JacobianSums,
    draw_contexts,
    jacobian_sums,
    obstacle,
)
from rldecoder.lm.lens import (
    AffineMap,
    Moments,
    PredictionSums,
    compare_predictions,
    logit_lens,
)
from rldecoder.lm.sinks import SKIP_FIRST, is_sink
from rldecoder.provenance import await_device, peak_memory_bytes
from rldecoder.reporting import Advance, Note
from rldecoder.seeds import torch_generator

SHARD_TOKENS = 16_384
"""Tokens of text a shard, or one micro-batch of them. What fits one shard is added up as in one
pass; of more, each shard is a term."""
BATCH_PROMPTS = 16
"""Prompts that are answered together, which decides how they are padded."""
SHARD_PROMPTS = 2 * BATCH_PROMPTS
"""Prompts of a task that a shard answers."""

Kind = Literal["moments", "jacobian", "predictions", "task"]


@dataclass(frozen=True)
class Part:
    """A shard: a run of sequences of a split, of positions, or of a task's prompts."""

    kind: Kind
    name: str
    """Of the split or task."""
    first: int
    count: int
    size: int
    """For the progress bar: tokens, positions, or prompts."""


class LensMaps(NamedTuple):
    """What was fitted for one layer; the logit lens needs no fit."""

    affine: AffineMap
    jacobian: JacobianMap | None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The lenses that there are."""
        return ("logit", "affine") if self.jacobian is None else ("logit", "affine", "jacobian")

    def predict(self, kind: str, lm: FrozenLM, resid: Tensor) -> Tensor:
        """The final hidden state [B, T, D] that a lens reads from residuals [B, T, D]."""
        if kind == "jacobian" and self.jacobian is not None:
            return self.jacobian(lm, resid)
        return logit_lens(lm, resid) if kind == "logit" else self.affine(resid)


class BaselineSettings(ShardSettings):
    """Which model, over which text, and where the lenses will lie."""

    model: Path
    record: Path
    corpus: Path
    lenses: Path
    """Written by `save_lenses` before measurements are asked for."""
    config: BaselinesConfig
    seed: int
    fit_sequences: int
    """Of `train`, from which the Jacobian lens draws its positions."""
    parts: tuple[Part, ...]

    def shards(self) -> list[ShardFile]:
        """See `ShardSettings.shards`."""
        return [
            ShardFile(f"{part.kind}-{part.name}-{part.first:07d}.safetensors", part.size)
            for part in self.parts
        ]

    def batching(self) -> str:
        """See `ShardSettings.batching`."""
        config = self.config
        return f"{config.micro_batch_sequences} sequences, {config.chunk_tokens} tokens"

    def of_kind(self, kind: Kind, name: str | None = None) -> list[int]:
        """Numbers of the shards of a kind, or of one split or task of it."""
        return [
            number
            for number, part in enumerate(self.parts)
            if part.kind == kind and name in (None, part.name)
        ]


def plan_parts(
    config: BaselinesConfig, sequences: Mapping[str, int], held_out: Sequence[str], length: int
) -> list[Part]:
    """All shards.

    Args:
        sequences: how many of each split are read.
        held_out: splits that are measured; the others are fitted on.
        length: tokens of a sequence.
    """
    # Whole micro-batches, so that every product of matrices is that of one pass.
    micro = config.micro_batch_sequences
    size = micro * max(1, SHARD_TOKENS // (micro * length))
    parts = [
        Part("jacobian", "train", first, count, count)
        for first, count in _runs(config.jacobian_positions, POSITIONS_AT_ONCE)
    ]
    for split, total in sequences.items():
        kind: Kind = "predictions" if split in held_out else "moments"
        parts += [
            Part(kind, split, first, count, count * length) for first, count in _runs(total, size)
        ]
    return parts + [
        Part("task", task, first, count, count)
        for task in TASKS
        for first, count in _runs(config.num_task_prompts, SHARD_PROMPTS)
    ]


def _runs(total: int, size: int) -> Iterable[tuple[int, int]]:
    return ((first, min(size, total - first)) for first in range(0, total, size))


def resolve_layers(configured: tuple[int, ...] | str, num_layers: int) -> list[int]:
    """The layers of the lenses, in order.

    Raises:
        BadInputError: there are none, or one is not in the model.
    """
    if isinstance(configured, str):
        return list(range(num_layers))
    if not configured or max(configured) > num_layers:
        raise BadInputError(
            f"`baselines.lens_layers` is {list(configured)}.",
            f"The model has {num_layers} blocks; layers run from 0 (embeddings) to {num_layers}.",
            "Name layers in that range, among them the hook layer, or `all`.",
        )
    return sorted(set(configured))


Tensors = dict[str, Tensor]


class BaselineWorker(TensorWorker[BaselineSettings, Tensors]):
    """The frozen model, whole."""

    settings_type = BaselineSettings

    def __init__(self, settings: BaselineSettings, device: torch.device, note: Note) -> None:
        super().__init__(settings, device, note)
        self._lm = FrozenLM.load(settings.model, device=device, record=settings.record)
        self._layers = resolve_layers(settings.config.lens_layers, self._lm.num_layers)
        self._text_of = cache(partial(SplitSequences, settings.corpus))
        self._tokens, self._seconds = 0, 0.0

    def facts(self) -> Mapping[str, int]:
        """Blocks of the model."""
        return {"num_layers": self._lm.num_layers}

    @classmethod
    def pack(cls, result: Tensors) -> Mapping[str, Tensor]:
        """As they are; `read_moments` and the like know what is what."""
        return result

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> Tensors:
        """See `pack`."""
        return dict(tensors)

    def compute(self, number: int, advance: Advance) -> Tensors:
        """One term of what the stage adds up, by the kind of the shard."""
        part, self._tokens, self._seconds = self.settings.parts[number], 0, 0.0
        match part.kind:
            case "moments":
                found = self._moments(part, advance)
            case "jacobian":
                found = self._jacobian(part, advance)
            case "predictions":
                found = self._predictions(part, advance)
            case "task":
                found = self._task(part, advance)
        spent = [self._tokens, self._seconds, peak_memory_bytes(self.device)]
        return found | {"spent": torch.tensor(spent, dtype=torch.float64)}

    def _moments(self, part: Part, advance: Advance) -> Tensors:
        """The sums of a run of text, for a fit at every layer."""
        lm = self._lm
        moments = {layer: Moments(lm.d_model, lm.device) for layer in self._layers}
        for batch in self._over(part, advance):
            final = batch.final_hidden.flatten(0, 1)
            for layer, resid in batch.by_layer.items():
                flat = resid.flatten(0, 1)
                usual = ~is_sink(flat, batch.input_ids.flatten(), lm.front)
                moments[layer].add(flat[usual], final[usual])
        return {
            f"{layer}.{name}": tensor
            for layer, sums in moments.items()
            for name, tensor in sums.state().items()
        }

    def _jacobian(self, part: Part, advance: Advance) -> Tensors:
        """The sums of some positions' Jacobians; or why there are none."""
        why = obstacle(self._lm, min(self._layers))
        if why is not None:
            advance(part.size)
            return {"why": as_tensor(why)}
        rows = slice(part.first, part.first + part.count)
        sums = jacobian_sums(
            self._lm, self._layers, self._contexts[rows], lambda n: advance(n / self._lm.d_model)
        )
        found = {f"{layer}.total": one.total.cpu() for layer, one in sums.items()}
        return found | {f"{layer}.squares": one.squares.cpu() for layer, one in sums.items()}

    def _predictions(self, part: Part, advance: Advance) -> Tensors:
        """Metrics of the frozen model ("frozen") and of each lens ("logit.8", "affine.8", ...) on
        each chunk of a run of text.

        Left out are the last position of a sequence, which has no next token, and those around the
        beginning of a text within it: the token before it is asked for what no text says, and the
        one that begins it is a sink.
        """
        sums = {"frozen": PredictionSums()}
        for layer, lens in self._lenses.items():
            sums |= {f"{kind}.{layer}": PredictionSums() for kind in lens.kinds}
        front = torch.tensor(self._lm.front, device=self._lm.device)
        for batch in self._over(part, advance):
            read, targets = batch.input_ids[:, :-1].flatten(), batch.input_ids[:, 1:].flatten()
            text = ~(torch.isin(read, front) | torch.isin(targets, front))
            predicted = {
                f"{kind}.{layer}": lens.predict(
                    kind, self._lm, batch.by_layer[layer][:, :-1]
                ).flatten(0, 1)[text]
                for layer, lens in self._lenses.items()
                for kind in lens.kinds
            }
            compare_predictions(
                self._lm,
                batch.final_hidden[:, :-1].flatten(0, 1)[text],
                predicted,
                targets[text],
                sums,
                self.settings.config.chunk_tokens,
            )
        return {name: torch.tensor(one.terms, dtype=torch.float64) for name, one in sums.items()}

    def _task(self, part: Part, advance: Advance) -> Tensors:
        """The answers to some of a task's prompts."""
        asked = task_prompts(cast("Task", part.name), self.settings.config, self.settings.seed)
        prompts = asked[part.first : part.first + part.count]
        check_lengths(self._lm, prompts)
        result = run_task(
            prefix_generate(self._lm.model),
            prompts,
            self._lm.tokenizer,
            batch_size=BATCH_PROMPTS,
            device=self._lm.device,
            stop_ids=self._stops,
            end_ids=self._lm.end_token_ids,
        )
        advance(part.size)
        return {"rows": as_tensor(rows_to_json(result.rows))}

    def _over(self, part: Part, advance: Advance) -> Iterable[_Residuals]:
        """Residuals of the layers, micro-batch by micro-batch, timed."""
        whole = torch.from_numpy(self._text_of(part.name).read(part.first, part.count))
        for ids in whole.split(self.settings.config.micro_batch_sequences):
            started = time.perf_counter()
            here = ids.to(self._lm.device)
            seen, final = self._lm.residuals(here)
            await_device(self._lm.device)
            self._seconds += time.perf_counter() - started
            self._tokens += ids.numel()
            kept = {layer: seen[layer][:, SKIP_FIRST:] for layer in self._layers}
            yield _Residuals(kept, final[:, SKIP_FIRST:], here[:, SKIP_FIRST:])
            advance(ids.numel())

    @cached_property
    def _contexts(self) -> Tensor:
        settings = self.settings
        train = SplitSequences(settings.corpus, "train").read(0, settings.fit_sequences)
        generator = torch_generator(settings.seed, "jacobian")
        positions = settings.config.jacobian_positions
        return draw_contexts(torch.from_numpy(train), positions, generator, self._lm.front)

    @cached_property
    def _stops(self) -> list[int]:
        return newline_token_ids(self._lm.tokenizer)

    @cached_property
    def _lenses(self) -> dict[int, LensMaps]:
        on_disk = load_file(self.settings.lenses)
        tensors = {name: tensor.to(self.device) for name, tensor in on_disk.items()}
        lenses = {}
        for layer in self._layers:
            affine = AffineMap(tensors[f"A.{layer}"].T, tensors[f"c.{layer}"], 0.0)
            known = tensors.get(f"J.{layer}")
            jacobian = None if known is None else JacobianMap(known, 0, 0.0)
            lenses[layer] = LensMaps(affine, jacobian)
        return lenses


class _Residuals(NamedTuple):
    """One micro-batch through the frozen model, first positions left out."""

    by_layer: dict[int, Tensor]
    """Layer to residual stream [B, T - 1, D]."""
    final_hidden: Tensor
    """[B, T - 1, D]"""
    input_ids: Tensor
    """[B, T - 1]"""


class Spent(NamedTuple):
    """What shards took."""

    tokens: float
    """Through all layers of the frozen model."""
    seconds: float
    """Of those passes."""
    peak_memory_bytes: float
    """Of the process that took most."""

    @classmethod
    def of(cls, shards: Iterable[Tensors]) -> Spent:
        """All in all."""
        spent = torch.stack([shard["spent"] for shard in shards])
        return cls(float(spent[:, 0].sum()), float(spent[:, 1].sum()), float(spent[:, 2].max()))


def task_prompts(task: Task, config: BaselinesConfig, seed: int) -> list[TaskPrompt]:
    """What a task asks."""
    return make_prompts(task, "test", config.num_task_prompts, seed)


def save_lenses(path: Path, lenses: Mapping[int, LensMaps]) -> None:
    """Write the lenses for workers, whole or not at all."""
    # The fit leaves A column by column, and a product may round otherwise row by row.
    tensors = {f"A.{layer}": lens.affine.A.T for layer, lens in lenses.items()}
    tensors |= {f"c.{layer}": lens.affine.c for layer, lens in lenses.items()}
    for layer, lens in lenses.items():
        if lens.jacobian is not None:
            tensors[f"J.{layer}"] = lens.jacobian.J
    with files.aside(path) as draft:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft)


def read_moments(shards: Iterable[Tensors], layers: Sequence[int]) -> dict[int, Moments]:
    """The sums of all shards, by layer."""
    found: dict[int, Moments] = {}
    for shard in shards:
        for layer in layers:
            term = Moments.restored(_below(layer, shard))
            if layer in found:
                found[layer].merge(term)
            else:
                found[layer] = term
    return found


def read_jacobians(
    shards: Iterable[Tensors], layers: Sequence[int], positions: int
) -> dict[int, JacobianMap] | str:
    """The Jacobian lens by layer, or why there is none."""
    sums: dict[int, JacobianSums] = {}
    for shard in shards:
        if "why" in shard:
            return as_text(shard["why"])
        for layer in layers:
            term = JacobianSums(**_below(layer, shard))
            sums[layer] = sums[layer].plus(term) if layer in sums else term
    return {layer: one.mean(positions) for layer, one in sums.items()}


def read_predictions(shards: Iterable[Tensors]) -> dict[str, PredictionSums]:
    """The metrics of all shards, by predictor."""
    found: dict[str, PredictionSums] = {}
    for shard in shards:
        for name, terms in shard.items():
            if name != "spent":
                found.setdefault(name, PredictionSums()).terms += map(tuple, terms.tolist())
    return found


def read_answers(shards: Iterable[Tensors]) -> list[TaskRow]:
    """The answers of some shards, in order."""
    return [row for shard in shards for row in rows_from_json(as_text(shard["rows"]))]


def _below(layer: int, tensors: Tensors) -> Tensors:
    """A layer's tensors, by what follows its number."""
    prefix = f"{layer}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
