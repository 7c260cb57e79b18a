"""Held-out faithfulness of predicted final hidden states: KL, CE, accuracy, agreement, ECE.

Every predictor is compared with the frozen model on the same cached tokens, and the frozen
logits are computed once for all of them. Formulas: docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from rldecoder.config.decoder import MatmulPrecision
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.decoder.distill import (
    NO_LABEL,
    NextTokens,
    chunk_rows,
    matmul_precision,
    softmax_and_lse,
)
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.decoder.sequences import hidden_of_rows, whole_sequences
from rldecoder.errors import NumericalError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.schemas import JsonRecord, table_schema

Predictor = Callable[[ActivationBatch], Tensor]
"""From cached rows of whole sequences to predicted final hidden states [N, D] float32."""

BATCH_ROWS = 4096
"""Rows that are read at once, give or take a sequence."""
NUM_ECE_BINS = 15
_COLUMNS = ("kl", "ce", "frozen_ce", "correct", "frozen_correct", "agree", "confidence")


class Faithfulness(JsonRecord):
    """How well a predictor stands in for the frozen model on one split."""

    kl: float
    """Mean KL(frozen || predictor), nats per token."""
    kl_low: float
    """Of the interval that ends in `kl_high`."""
    kl_high: float
    """95 % bootstrap interval of `kl`, resampling whole sequences."""
    ce: float
    """Mean cross-entropy to the next token, nats per labelled token."""
    frozen_ce: float
    """The same of the frozen model."""
    accuracy: float
    """Share of labelled tokens whose next token is the predictor's first choice."""
    frozen_accuracy: float
    """The same of the frozen model."""
    agreement: float
    """Share of all tokens where predictor and frozen model have the same first choice."""
    ece: float
    """Expected calibration error of the first choice, 15 equal bins, labelled tokens."""
    num_tokens: int
    """Cached rows that were compared."""
    num_labels: int
    """How many of the tokens have a known next token."""
    num_sequences: int
    """How many sequences they lie in."""


class _Epoch(JsonRecord):
    epoch: int
    """Epochs that the decoder was trained; 0 before training."""
    split: str
    """Where it was measured."""


class EpochFaithfulness(Faithfulness, _Epoch):
    """The same of a decoder in training; epoch and split are the first columns of EPOCHS."""


_COUNTS = ("num_tokens", "num_labels", "num_sequences")
EPOCHS = table_schema(EpochFaithfulness, **dict.fromkeys(_COUNTS, pa.int64()))
"""An `EpochFaithfulness` a row."""


def evaluate_faithfulness(
    decoder: SaeDecoderForCausalLM,
    reader: ActivationReader,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: MatmulPrecision = "highest",
) -> Faithfulness:
    """Faithfulness of a decoder on the first `max_tokens` rows of a cached split."""
    found = evaluate_predictors(
        {"decoder": decoder_predictor(decoder)},
        reader,
        decoder.frozen.lm,
        max_tokens=max_tokens,
        seed=seed,
        precision=precision,
    )
    return found["decoder"]


def decoder_predictor(decoder: SaeDecoderForCausalLM) -> Predictor:
    """The decoder as a predictor: cached residual -> SAE latents -> hidden."""

    def predict(batch: ActivationBatch) -> Tensor:
        assert batch.resid is not None
        resid = batch.resid.to(decoder.device).float()
        return hidden_of_rows(decoder, decoder.frozen.sae.encode(resid), batch.seq_id, batch.pos)

    return predict


def lens_predictor(A: Float[Tensor, "d_model d_model"], c: Float[Tensor, " d_model"]) -> Predictor:
    """An affine lens on the raw residual, SAE left out: `resid @ A + c`."""

    def predict(batch: ActivationBatch) -> Tensor:
        assert batch.resid is not None
        return batch.resid.to(A.device).float() @ A + c

    return predict


@torch.no_grad()
def evaluate_predictors(
    predictors: Mapping[str, Predictor],
    reader: ActivationReader,
    lm: FrozenLM,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    precision: MatmulPrecision = "highest",
) -> dict[str, Faithfulness]:
    """Faithfulness of several predictors on the same rows of one split.

    Args:
        lm: the frozen model whose `unembed` makes all logits.
        max_tokens: only the first so many rows, in (seq_id, pos) order.
        seed: of the bootstrap.
        precision: of the products with the unembedding.

    Raises:
        NumericalError: a predictor gives NaN or infinity.
    """
    next_tokens = NextTokens(reader, end=max_tokens)
    batches = whole_sequences(
        reader, BATCH_ROWS, columns=("resid", "final_hidden"), max_tokens=max_tokens
    )
    return summarise(
        (score_batch(predictors, batch, next_tokens, lm, precision) for batch in batches), seed
    )


class TokenScores(NamedTuple):
    """What some predictors do at n tokens, on the CPU."""

    by_predictor: dict[str, Tensor]
    """[n, 7] float32 each."""
    has_label: Tensor
    """[n] bool, whether the next token is known."""
    sequence: Tensor
    """[n] int64, which sequence each lies in."""


@torch.no_grad()
def score_batch(
    predictors: Mapping[str, Predictor],
    batch: ActivationBatch,
    next_tokens: NextTokens,
    lm: FrozenLM,
    precision: MatmulPrecision,
) -> TokenScores:
    """Score every token of whole sequences; arguments as for `evaluate_predictors`."""
    assert batch.final_hidden is not None
    labels = next_tokens.labels(batch.seq_id, batch.pos)
    scores: dict[str, list[Tensor]] = {name: [] for name in predictors}
    predicted = {name: predict(batch) for name, predict in predictors.items()}

    # Logits of a whole batch would not fit: each chunk's are scored and dropped.
    rows = chunk_rows(lm.vocab_size)
    with matmul_precision(precision):
        for start in range(0, len(batch.pos), rows):
            part = slice(start, start + rows)
            frozen_logits = lm.unembed(batch.final_hidden[part].to(lm.device))
            label = labels[part].to(lm.device)
            for name, hidden in predicted.items():
                logits = lm.unembed(hidden[part])
                scores[name].append(_score_rows(logits, frozen_logits, label).cpu())
    joined = {name: torch.cat(parts) for name, parts in scores.items()}
    return TokenScores(joined, labels != NO_LABEL, batch.seq_id)


def summarise(parts: Iterable[TokenScores], seed: int) -> dict[str, Faithfulness]:
    """Means, and intervals by a bootstrap, over the tokens of all parts.

    Of a part that is done two sums a sequence are held, whatever its number of tokens.

    Raises:
        NumericalError: a predictor gives NaN or infinity.
    """
    tallies: dict[str, _Tally] = {}
    for part in parts:
        for name, scores in part.by_predictor.items():
            tally = tallies.setdefault(name, _Tally(name))
            tally.add(scores.double().numpy(), part.has_label.numpy(), part.sequence.numpy())
    return {name: tally.summary(seed) for name, tally in tallies.items()}


def _score_rows(logits: Tensor, frozen_logits: Tensor, labels: Tensor) -> Tensor:
    """One row of `_COLUMNS` for each of n tokens: [n, 7] float32."""
    safe_labels = labels.clamp_min(0)[:, None]
    probs, lse = softmax_and_lse(logits)
    frozen_probs, frozen_lse = softmax_and_lse(frozen_logits)
    confidence, choice = probs.max(-1)
    frozen_choice = frozen_probs.max(-1).indices
    kl = (frozen_logits - logits).mul_(frozen_probs).sum(-1) - frozen_lse + lse
    columns = {
        "kl": kl,
        "ce": lse - logits.gather(-1, safe_labels)[:, 0],
        "frozen_ce": frozen_lse - frozen_logits.gather(-1, safe_labels)[:, 0],
        "correct": (choice == labels).float(),
        "frozen_correct": (frozen_choice == labels).float(),
        "agree": (choice == frozen_choice).float(),
        "confidence": confidence,
    }
    return torch.stack([columns[name] for name in _COLUMNS], dim=-1)


class _Tally:
    """Sums over a predictor's tokens, from which all that is reported follows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._labelled = dict.fromkeys(_COLUMNS, 0.0)
        self._agree, self._num_labels = 0.0, 0
        self._gaps = np.zeros(NUM_ECE_BINS)
        self._by_sequence: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []

    def add(
        self, scores: NDArray[np.float64], has_label: NDArray[np.bool_], sequence: NDArray[np.int64]
    ) -> None:
        """The tokens of a part, as in `TokenScores`."""
        if not np.isfinite(scores).all():
            raise NumericalError(
                f"The predictor `{self.name}` gives NaN or infinity on held-out text.",
                "Its weights diverged, or the cached activations are damaged.",
                "Lower `train_decoder.lr`, or rebuild the activation cache.",
            )
        column = dict(zip(_COLUMNS, scores.T, strict=True))
        self._agree += float(column["agree"].sum())

        # What a label is needed for.
        labelled = {key: values[has_label] for key, values in column.items()}
        self._num_labels += int(has_label.sum())
        self._gaps += calibration_gaps(labelled["confidence"], labelled["correct"])
        for key, values in labelled.items():
            self._labelled[key] += float(values.sum())

        # The bootstrap draws whole sequences: of each its number, its KL and how many tokens.
        numbers, where = np.unique(sequence, return_inverse=True)
        sums = np.stack([np.bincount(where, column["kl"]), np.bincount(where)]).astype(float)
        self._by_sequence.append((numbers, sums))

    def summary(self, seed: int) -> Faithfulness:
        """Means over the tokens, and the interval of the KL."""
        # A sequence may go on in the next part.
        numbers = np.concatenate([part for part, _ in self._by_sequence])
        _, where = np.unique(numbers, return_inverse=True)
        parts = np.concatenate([sums for _, sums in self._by_sequence], axis=1)
        kl_sums = np.bincount(where, weights=parts[0]).astype(float)
        counts = np.bincount(where, weights=parts[1]).astype(float)

        kl, num_tokens = float(kl_sums.sum() / counts.sum()), int(counts.sum())
        low, high = (kl, kl) if len(counts) == 1 else _sequence_bootstrap(kl_sums, counts, seed)
        mean = {key: total / max(1, self._num_labels) for key, total in self._labelled.items()}
        return Faithfulness(
            kl=kl,
            kl_low=low,
            kl_high=high,
            ce=mean["ce"],
            frozen_ce=mean["frozen_ce"],
            accuracy=mean["correct"],
            frozen_accuracy=mean["frozen_correct"],
            agreement=self._agree / num_tokens,
            ece=expected_calibration_error(self._gaps, self._num_labels),
            num_tokens=num_tokens,
            num_labels=self._num_labels,
            num_sequences=len(counts),
        )


def _sequence_bootstrap(
    sums: NDArray[np.float64], counts: NDArray[np.float64], seed: int
) -> tuple[float, float]:
    """95 % interval of the token mean, resampling sequences (tokens of one are not independent)."""
    found = stats.bootstrap(
        (sums, counts),
        lambda total, count, axis: total.sum(axis) / count.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=1000,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def calibration_gaps(
    confidence: Float[np.ndarray, " tokens"], correct: Float[np.ndarray, " tokens"]
) -> Float[np.ndarray, " bins"]:
    """Sum of correct - confidence over the tokens of each equal-width bin of confidence."""
    bins = np.minimum((confidence * NUM_ECE_BINS).astype(int), NUM_ECE_BINS - 1)
    # Without tokens numpy counts in integers.
    return np.bincount(bins, weights=correct - confidence, minlength=NUM_ECE_BINS).astype(float)


def expected_calibration_error(gaps: Float[np.ndarray, " bins"], num_tokens: int) -> float:
    """Mean |accuracy - confidence| over the bins, weighted by their size (1706.04599)."""
    return float(np.abs(gaps).sum() / max(1, num_tokens))
