"""Peak memory of the label stage on a long text: one pass for examples, labels from a sample.

    python -m benchmarks.bench_label_memory --tokens 10000000

The pass over the text, the sample that labels are fitted on, the search for predicates (counts of
all latents, then the search itself for some) and their scores, as the stage does them; without the
models, whose weights come on top, and without encoding: the activations are made up. Of the k
latents active on a token `--labelled-active` are labelled ones, decided by the token, so that
predicates exist. Peak memory does not depend on how busy the machine is. Results: docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Annotated, Any, cast

import numpy as np
import pyarrow as pa
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from rldecoder.config.interp import PredicateSettings
from rldecoder.data.activations import ActivationBatch
from rldecoder.interp.candidates import find_candidates
from rldecoder.interp.corpus import SplitFirings, read_firings, sample_sequences, with_documents
from rldecoder.interp.example_pass import ExamplePass
from rldecoder.interp.examples import ExampleSettings
from rldecoder.interp.labelers import PredicateLabeler
from rldecoder.interp.labelling import label_and_score
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.provenance import peak_memory_bytes
from rldecoder.sae.model import SparseLatents

app = typer.Typer(help=__doc__, add_completion=False)
console = Console(width=120)
VOCABULARY = 49_152


class MadeUp:
    """Stands for an activation cache and for the SAE that reads it."""

    def __init__(
        self, num_latents: int, k: int, labelled: int, labelled_active: int, context: int
    ) -> None:
        self.num_latents, self.context = num_latents, context
        self.meta = SimpleNamespace(context_length=context)
        self.W_enc = torch.zeros(1)
        self._first, self._others = labelled_active, k - labelled_active
        self._labelled = labelled
        self._rng = np.random.default_rng(0)
        frequency = 1 / np.arange(1, VOCABULARY + 1)
        self._cumulated = np.cumsum(frequency / frequency.sum())

    def ordered(
        self, batch_tokens: int, *, columns: tuple[str, ...], max_tokens: int
    ) -> Iterator[ActivationBatch]:
        """As `ActivationReader.ordered`; the residual is nothing but the token."""
        inner = self.context - 1
        for start in range(0, max_tokens, batch_tokens):
            row, pos = np.divmod(np.arange(start, min(start + batch_tokens, max_tokens)), inner)
            tokens = np.searchsorted(self._cumulated, self._rng.random(row.size))
            ids = torch.from_numpy(np.minimum(tokens, VOCABULARY - 1))
            seq, place = torch.from_numpy(row), torch.from_numpy(pos + 1)
            yield ActivationBatch(seq, place, ids, ids[:, None], None)

    def encode(self, resid: torch.Tensor) -> SparseLatents:
        """One latent of each of k blocks of latents, so that no latent occurs twice."""
        token = resid.long().numpy()
        width, rest = self._labelled // self._first, self.num_latents - self._labelled
        block = np.arange(self._first)
        named = block * width + (token * 7919 + block * 31) % width
        other = rest // self._others
        drawn = self._rng.integers(0, other, (len(token), self._others))
        unnamed = self._labelled + np.arange(self._others) * other + drawn
        acts = self._rng.random((len(token), self._first + self._others), np.float32) + 0.1
        return SparseLatents(
            torch.from_numpy(acts), torch.from_numpy(np.concatenate([named, unnamed], 1))
        )


def words(count: int) -> Vocabulary:
    """Made-up words, most of them with a space before."""
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlu"))
    texts = ["".join(rng.choice(letters, rng.integers(2, 9))) for _ in range(count)]
    return Vocabulary([" " + text if n % 3 else text for n, text in enumerate(texts)])


def read(
    source: MadeUp, split: str, latents: NDArray[np.int64], tokens: int, **more: Any
) -> SplitFirings:
    """As the stage reads a split."""
    made = cast("Any", source)
    grid, firings = read_firings(
        made, made, split=split, latents=latents, max_tokens=tokens, **more
    )
    # One document a sequence; no document is in both splits.
    ids = grid.seq_ids * 2 + (split == "test")
    every = np.maximum(grid.tokens, 0).astype(np.int32)
    table = pa.table(
        {
            "seq_id": grid.seq_ids,
            "input_ids": pa.FixedSizeListArray.from_arrays(every.reshape(-1), source.context),
            "doc_ids": [[int(one)] for one in ids],
            "doc_starts": [[0]] * len(ids),
        }
    )
    return SplitFirings(with_documents(grid, table), firings)


def peak(what: str) -> None:
    """Say how far memory has come."""
    gib = peak_memory_bytes(torch.device("cpu")) / (1 << 30)
    console.print(f"{gib:6.2f} GiB  {what}", highlight=False)


@app.command()
def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the pass.")] = 10_000_000,
    fit_tokens: Annotated[int, typer.Option(help="Tokens that labels are fitted on.")] = 1_000_000,
    score_tokens: int = 100_000,
    num_latents: int = 5760,
    k: int = 64,
    labelled: int = 1000,
    labelled_active: int = 22,
    searched: Annotated[int, typer.Option(help="Latents whose predicate is searched.")] = 4,
    context: int = 256,
    examples: Annotated[bool, typer.Option(help="With the pass for examples.")] = True,
) -> None:
    """Print the peak resident memory after each step."""
    torch.set_num_threads(1)
    source = MadeUp(num_latents, k, labelled, labelled_active, context)
    vocabulary = words(VOCABULARY)
    latents = np.arange(labelled)
    rng = np.random.default_rng(0)
    peak("imports and vocabulary")

    # One pass over all tokens, which keeps the firings and looks for examples meanwhile.
    found = ExamplePass(num_latents, ExampleSettings(16, 10, 10, 10), context, 0, latents)
    ids = pa.table({"seq_id": np.arange(-(-tokens // (context - 1)))})
    chosen = sample_sequences(ids, context - 1, of=tokens, size=fit_tokens, seed=0)
    whole = read(
        source, "label", latents, tokens, sequences=chosen,
        observe=found.add if examples else None,
    )  # fmt: skip
    peak(f"{tokens:,} tokens read, {whole.firings.matrix.nnz:,} firings kept")

    # Labels are fitted on a sample of them, and scored on other text.
    fit = whole if chosen is None else whole.only(chosen)
    scored = read(source, "test", latents, score_tokens)
    peak(f"sample of {fit.grid.cells.size:,} tokens taken, {score_tokens:,} more read for scores")
    settings = PredicateSettings()
    find_candidates(fit.grid, fit.firings, vocabulary, settings)
    peak(f"candidates of {labelled:,} latents counted")

    # Searching every latent would take hours and, one after the other, no more memory than a few.
    some = np.arange(searched)
    short_fit, short_scored = (
        split._replace(firings=split.firings.select(some)) for split in (fit, scored)
    )
    result = label_and_score(
        PredicateLabeler(settings), short_fit, short_scored, vocabulary, 16, rng
    )
    done = sum(draft.predicate is not None for draft in result.drafts)
    peak(f"{done} of {searched} predicates found and scored")

    # The examples are written at the end of the stage, while the firings are still there.
    if examples:
        table = found.finish(whole.grid).table
        peak(f"{table.num_rows:,} examples of {labelled:,} latents")


if __name__ == "__main__":
    app()
