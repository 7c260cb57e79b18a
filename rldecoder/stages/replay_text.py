"""Where the text comes from that PPO and its controls replay."""

from __future__ import annotations

from contextlib import ExitStack

from rldecoder.config.rl import PpoSettings
from rldecoder.data.streaming import StreamedActivations
from rldecoder.lm.frozen import FrozenLM
from rldecoder.rl.replay import COLUMNS
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import ControlInputs, PpoInputs
from rldecoder.stages.streams import open_stream


def open_replay(
    inputs: PpoInputs | ControlInputs,
    settings: PpoSettings,
    ctx: StageContext,
    stack: ExitStack,
    lm: FrozenLM,
) -> StreamedActivations | None:
    """The RL buffer as a stream; None where it is the cache, or nothing is replayed.

    Args:
        stack: closed when it is no longer read.
    """
    if settings.replay_source == "cache" or not settings.replays:
        return None
    return stack.enter_context(
        open_stream(
            inputs.model,
            inputs.corpus,
            inputs.cache,
            ctx,
            columns=COLUMNS,
            window_bytes=settings.replay_window_bytes,
            lm=lm,
        )
    )
