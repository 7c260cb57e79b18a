"""The RL buffer as a stream: the batches of a cache, cycled, from any step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rldecoder.artifacts.catalogue import ActivationCache, Policy
from rldecoder.config.data import CacheActivationsConfig
from rldecoder.config.rl import ControlPpoConfig, PpoSettings
from rldecoder.data import forward, streaming
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import Advance
from rldecoder.rl.replay import Replay, ReplayBatch
from rldecoder.sae.model import Sae
from rldecoder.stages import cache_activations, control_ppo, replay_text, train_ppo
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import PpoInputs, TextInputs
from tests.executors.elsewhere import Elsewhere
from tests.stages.decoder_inputs import HOOK_LAYER, LENGTH
from tests.stages.published import files_of, published
from tests.stages.rl_inputs import make_rl_inputs, small_config, with_policy
from tests.stages.token_inputs import token_inputs

pytestmark = pytest.mark.usefixtures("no_proof")
MakeContext = Callable[..., StageContext]
SEQUENCES = 46
CACHE = CacheActivationsConfig(
    hook_layer=HOOK_LAYER, shard_tokens=6 * LENGTH, micro_batch_sequences=4
)
WINDOW = 12 * LENGTH * (10 + 2 * 2 * 64)
"""Two of the eight shards."""
STEPS = 58
"""Of two sequences each: two epochs and a half."""


def few_are_sinks(resid: Tensor, *_: object) -> Tensor:
    """About one row in 50: sequences differ in length."""
    first = resid[:, 0].float()
    return first > first.quantile(0.98)


@pytest.fixture(params=[(), (2, 3)], ids=["linear", "blocks"])
def inputs(
    request: pytest.FixtureRequest,
    tiny_lm_dir: Path,
    tmp_path: Path,
    context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> PpoInputs:
    """A real cache of a real corpus."""
    monkeypatch.setattr(forward, "is_sink", few_are_sinks)
    made = make_rl_inputs(tmp_path / "rl", tiny_lm_dir, request.param)
    splits = {"train": SEQUENCES, "validation": 6, "test": 6}
    model, corpus = token_inputs(tmp_path / "text", tiny_lm_dir, LENGTH, splits)
    ctx = context("cache")
    output = cache_activations.run(TextInputs(model, corpus), CACHE, ctx)
    assert output.metrics["sink_tokens"]
    cache = published(ActivationCache, ctx.out, output, CACHE.model_dump(mode="json"))
    return made._replace(model=model, corpus=corpus, cache=cache)


def settings(source: str) -> PpoSettings:
    """Two sequences a batch; windows of two shards."""
    update = {"replay_source": source, "replay_tokens": 32, "replay_window_bytes": WINDOW}
    return small_config().ppo.model_copy(update=update)


class Opened(NamedTuple):
    """Parts for a `Replay`."""

    lm: FrozenLM
    sae: Sae
    ctx: StageContext
    inputs: PpoInputs

    def streamed(self, stack: ExitStack) -> Replay:
        text = replay_text.open_replay(self.inputs, settings("stream"), self.ctx, stack, self.lm)
        assert text is not None
        return Replay(text, self.sae, 32, seed=5)

    def cached(self) -> Replay:
        text = ActivationReader(self.inputs.cache.folder, "train", window_bytes=WINDOW)
        return Replay(text, self.sae, 32, seed=5, sequences=True)


@pytest.fixture
def parts(inputs: PpoInputs, context: MakeContext) -> Opened:
    return Opened(inputs.model.load(), inputs.sae.load(), context("replay"), inputs)


def same(one: ReplayBatch, other: ReplayBatch) -> bool:
    def columns(batch: ReplayBatch) -> list[Tensor]:
        ids = [batch.seq_id, batch.pos]
        return [batch.latents.acts, batch.latents.indices, batch.frozen_hidden, *ids]

    return all(map(torch.equal, columns(one), columns(other)))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "elsewhere"])
def test_a_stream_gives_the_batches_of_the_cache(parts: Opened, elsewhere: bool) -> None:
    """In every epoch, each in another order, also by workers elsewhere that work ahead."""
    if elsewhere:
        parts = parts._replace(ctx=replace(parts.ctx, executor=Elsewhere()))
    replay = parts.cached()
    cached = [replay(step) for step in range(STEPS)]
    with ExitStack() as stack:
        replay = parts.streamed(stack)
        assert all(same(replay(step), cached[step]) for step in range(STEPS))
    assert len({tuple(batch.seq_id.unique().tolist()) for batch in cached}) > STEPS // 2


def test_the_step_is_the_cursor(parts: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that begins at a later step computes nothing of what it skips."""
    with ExitStack() as stack:
        replay = parts.streamed(stack)
        straight = [replay(step) for step in range(STEPS)]
    computed: list[int] = []
    original = streaming.ModelHere.compute

    def counted(
        self: streaming.ModelHere, shards: Sequence[forward.Shard], advance: Advance
    ) -> Iterator[ActivationBatch]:
        computed.extend(shard.index for shard in shards)
        return original(self, shards, advance)

    monkeypatch.setattr(streaming.ModelHere, "compute", counted)
    # An epoch has 23 batches: in its first window, its third, its last; then in the next epoch's.
    for first in (1, 14, 21, 24):
        with ExitStack() as stack:
            resumed = parts.streamed(stack)
            computed.clear()
            assert same(resumed(first), straight[first])
            assert len(computed) == 2
            assert same(resumed(first + 1), straight[first + 1])


def test_no_stream_is_opened_where_nothing_is_replayed(parts: Opened) -> None:
    for unused in ({"replay_tokens": 0}, {"kl_loss_coef": 0.0, "sparsity_loss_coef": 0.0}):
        none = settings("stream").model_copy(update=unused)
        with ExitStack() as stack:
            assert replay_text.open_replay(parts.inputs, none, parts.ctx, stack, parts.lm) is None


class Killed(BaseException):
    """Stands for kill -9."""


def test_ppo_on_a_stream_is_ppo_on_the_cache(
    inputs: PpoInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same files with blocks; killed and run again, with any decoder; no cached text is read."""
    blocks = inputs.supervised.load(inputs.model.load(), inputs.sae.load()).looks_back
    cached, straight, killed = context("cached"), context("straight"), context("killed")
    train_ppo.run(inputs, small_config(ppo=settings("cache")), cached)
    for path in inputs.cache.folder.glob("train-*"):
        path.unlink()
    config = small_config(ppo=settings("stream"))
    train_ppo.run(inputs, config, straight)
    assert (files_of(straight.out) == files_of(cached.out)) == blocks

    original = Replay.__call__

    def call(self: Replay, update: int) -> ReplayBatch:
        if update == 3:
            raise Killed
        return original(self, update)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Replay, "__call__", call)
        train_ppo.run(inputs, config, killed)
    train_ppo.run(inputs, config, killed)
    assert files_of(killed.out) == files_of(straight.out)


def test_controls_replay_what_ppo_replayed(
    inputs: PpoInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a stream, too; all trainings of the stage share one."""
    config = small_config(ppo=settings("stream"))
    trained, ctx = context("trained"), context("controls")
    seen: list[int] = []
    original = Replay.__call__

    def call(self: Replay, update: int) -> ReplayBatch:
        batch = original(self, update)
        seen.append(hash(tuple(batch.seq_id.tolist())))
        return batch

    monkeypatch.setattr(Replay, "__call__", call)
    train_ppo.run(inputs, config, trained)
    of_ppo = list(seen)
    seen.clear()
    for path in inputs.cache.folder.glob("train-*"):
        path.unlink()
    policy = published(Policy, trained.out, config=config.model_dump(mode="json"))
    few = ControlPpoConfig(test_prompts=2, test_tokens=60)
    opened = []

    def open_once(*arguments: Any) -> object:
        opened.append(replay_text.open_replay(*arguments))
        return opened[-1]

    monkeypatch.setattr("rldecoder.stages.control_ppo.open_replay", open_once)
    control_ppo.run(with_policy(inputs, policy), few, ctx)
    # Distillation, then more supervised training: the same text at the same steps.
    assert seen == of_ppo * 2
    assert len(opened) == 1
