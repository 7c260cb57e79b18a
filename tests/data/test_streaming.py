"""Training on a stream of activations ends with the weights that training on their cache gives."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rldecoder.artifacts.catalogue import ActivationCache, TrainedSae
from rldecoder.config.data import CacheActivationsConfig
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.data import forward
from rldecoder.errors import DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Bar, SilentReporter
from rldecoder.sae.parallel import Group
from rldecoder.sae.training import SaeTrainer, StepResult
from rldecoder.stages import cache_activations, train_sae
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import SaeInputs
from tests.executors.elsewhere import Elsewhere
from tests.stages.published import published
from tests.stages.token_inputs import token_inputs

pytestmark = pytest.mark.usefixtures("no_proof")
MakeContext = Callable[..., StageContext]
LENGTH, SEQUENCES = 16, 40
CACHE = CacheActivationsConfig(hook_layer=2, shard_tokens=6 * LENGTH, micro_batch_sequences=4)
CONFIG = TrainSaeConfig(
    expansion=2, k=4, batch_tokens=50, budget_tokens=50 * 30, init_tokens=150, eval_tokens=40,
    warmup_steps=3, eval_every_steps=10, checkpoint_every_steps=4, log_every_steps=5,
    window_bytes=200 * (10 + 2 * 64),
)  # fmt: skip
STREAM = CONFIG.model_copy(update={"source": "stream"})


def few_are_sinks(resid: Tensor, *_: object) -> Tensor:
    """About one row in 50, so that shards differ in length."""
    first = resid[:, 0].float()
    return first > first.quantile(0.98)


@pytest.fixture
def inputs(
    tiny_lm_dir: Path, tmp_path: Path, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> SaeInputs:
    monkeypatch.setattr(forward, "is_sink", few_are_sinks)
    text = token_inputs(
        tmp_path / "ingest", tiny_lm_dir, LENGTH, {"train": SEQUENCES, "validation": 6}
    )
    ctx = context("cache")
    output = cache_activations.run(text, CACHE, ctx)
    assert output.metrics["sink_tokens"]
    cache = published(ActivationCache, ctx.out, output, CACHE.model_dump(mode="json"))
    return SaeInputs(text.model, text.corpus, cache)


class Tracking(SilentReporter):
    """Adds up what bars were told."""

    def __init__(self) -> None:
        super().__init__()
        self.total: Counter[str] = Counter()
        self.done: Counter[str] = Counter()

    @contextmanager
    def track(
        self, description: str, total: float | None, unit: str = "it", done: float = 0
    ) -> Iterator[Bar]:
        """Remember the bar's total."""
        self.total[description] += int(total or 0)
        yield Told(self, description)


class Told:
    """One bar of `Tracking`."""

    def __init__(self, report: Tracking, description: str) -> None:
        self._report, self._description = report, description

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Add up."""
        self._report.done[self._description] += int(amount)


def weights(folder: Path) -> dict[str, bytes]:
    files = [*sorted(TrainedSae.sae.path(folder).iterdir()), TrainedSae.curves.path(folder)]
    return {path.name: path.read_bytes() for path in files}


def count_tokens(monkeypatch: pytest.MonkeyPatch, stop_after: float = float("inf")) -> list[int]:
    """Tokens of every pass through the trunk; Ctrl-C after so many passes."""
    seen: list[int] = []
    original = FrozenLM.trunk

    def counted(self: FrozenLM, ids: Tensor, layer: int, **named: object) -> object:
        if len(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.append(ids.numel())
        return original(self, ids, layer, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenLM, "trunk", counted)
    return seen


def test_stream_and_cache_give_the_same_weights(inputs: SaeInputs, context: MakeContext) -> None:
    """Over two epochs and a half, each of several windows, some rows left out as sinks."""
    cached, streamed = context("cached"), context("streamed")
    train_sae.run(inputs, CONFIG, cached)
    for path in inputs.cache.folder.glob("train-*"):
        path.unlink()  # the stream must not need them
    train_sae.run(inputs, STREAM, streamed)
    assert weights(streamed.out) == weights(cached.out)


@pytest.mark.parametrize("stops_at", [None, 12])
def test_a_stream_from_elsewhere_gives_the_same_weights(
    inputs: SaeInputs,
    context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
    stops_at: int | None,
) -> None:
    """And leaves no file behind; killed and run again it ends the same."""
    here, there = context("here"), replace(context("there"), executor=Elsewhere())
    train_sae.run(inputs, STREAM, here)
    if stops_at is not None:
        step = SaeTrainer.step

        def stopping(self: SaeTrainer, batch: Tensor) -> StepResult:
            if self.step_index == stops_at:
                raise KeyboardInterrupt
            return step(self, batch)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SaeTrainer, "step", stopping)
            train_sae.run(inputs, STREAM, there)
    train_sae.run(inputs, STREAM, there)
    assert weights(there.out) == weights(here.out)
    # What was computed ahead of the last step is not read; it goes with the progress folder.
    kept = [path for path in (there.progress / "stream").iterdir() if path.suffix != ".seal"]
    assert len(kept) <= 2


def test_a_killed_stream_goes_on_without_computing_what_it_skips(
    inputs: SaeInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = context("whole"), context("killed")
    passes = len(count_all(inputs, whole, monkeypatch))
    count_tokens(monkeypatch, stop_after=2 * passes // 3)
    with pytest.raises(KeyboardInterrupt):
        train_sae.run(inputs, STREAM, killed)
    monkeypatch.undo()
    monkeypatch.setattr(forward, "is_sink", few_are_sinks)
    again = count_tokens(monkeypatch)
    train_sae.run(inputs, STREAM, killed)
    assert weights(killed.out) == weights(whole.out)
    assert isinstance(killed.report, SilentReporter)
    assert any("goes on from step" in note for note in killed.report.notes)
    assert len(again) < 2 * passes // 3


def count_all(inputs: SaeInputs, ctx: StageContext, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The passes of an undisturbed run."""
    seen = count_tokens(monkeypatch)
    train_sae.run(inputs, STREAM, ctx)
    monkeypatch.undo()
    monkeypatch.setattr(forward, "is_sink", few_are_sinks)
    return seen


def test_a_stream_runs_no_block_above_the_hook_and_only_the_tokens_asked_for(
    inputs: SaeInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError("the whole model was run")

    monkeypatch.setattr(FrozenLM, "resid_and_final", refuse)
    seen = count_tokens(monkeypatch)
    config = STREAM.model_copy(update={"stream_tokens": 13 * LENGTH, "budget_tokens": 150})
    report = Tracking()
    train_sae.run(inputs, config, replace(context(), report=report))
    assert sum(seen) == 13 * LENGTH
    # The passes show a bar, and it ends full.
    assert report.done["frozen model"] == report.total["frozen model"] == 13 * LENGTH
    assert torch.is_grad_enabled()


class InThreads(Group):
    """Peers of one process, who wait for each other in threads."""

    barrier = threading.Barrier(2, timeout=60)

    def meet(self) -> None:
        """Wait until both have come here."""
        self.barrier.wait()


def test_peers_share_the_models_work(
    inputs: SaeInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads every row of two epochs, in the order of one process; none is computed twice."""
    alone, together, loading = context("alone"), context("together"), threading.Lock()

    def rows(group: Group, ctx: StageContext) -> list[Tensor]:
        with ExitStack() as stack:
            with loading:  # transformers loads one model at a time
                reader = train_sae.open_train_split(inputs, STREAM, ctx, stack, group)
            batches = [b for epoch in (0, 1) for b in reader.shuffled(50, seed=3, epoch=epoch)]
        return [batch.resid for batch in batches if batch.resid is not None]

    expected = rows(Group(), alone)
    seen = count_tokens(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda rank: rows(InThreads(rank, 2), together), (0, 1)))
    assert sum(seen) == 2 * SEQUENCES * LENGTH
    for mine in found:
        assert len(mine) == len(expected) > 20
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    assert list((together.progress / "stream").iterdir()) == []


def test_a_peers_shard_that_is_damaged_is_not_read(
    inputs: SaeInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context("damaged")

    class Damaging(Group):
        """Its peer, by now, has written what is none of its own."""

        def meet(self) -> None:
            (ctx.progress / "stream" / "train-00001.safetensors").write_bytes(b"?")

    with ExitStack() as stack:
        reader = train_sae.open_train_split(inputs, STREAM, ctx, stack, Damaging(0, 2))
        with pytest.raises(DamagedFileError, match="not what another trainer wrote"):
            list(reader.shuffled(50, seed=3))
