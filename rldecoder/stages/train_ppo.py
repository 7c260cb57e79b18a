"""PPO on the supervised decoder, in three stages of different reward weights.

Publishes `decoder/` (the end of training, or the last healthy evaluation when it collapsed),
`stage1/decoder` to `stage3/decoder`, `rollouts.parquet` (every response with its reward and all
parts), `curves.parquet` (every metric at every PPO step) and `evaluations.parquet` (validation).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from rldecoder.config.rl import TrainPpoConfig
from rldecoder.decoder.loading import load_decoder, save_decoder
from rldecoder.lm.frozen import FrozenLM
from rldecoder.rl.session import Session
from rldecoder.sae.model import Sae
from rldecoder.seeds import seed_everything
from rldecoder.stages.context import InputArtifact, Scalar, StageContext, StageOutput


def run(
    inputs: Mapping[str, InputArtifact], config: TrainPpoConfig, ctx: StageContext
) -> StageOutput:
    """Train; see the module's docstring for what is published."""
    seed_everything(ctx.seed)
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    decoder = load_decoder(inputs["train_decoder"].path / "decoder", lm, sae)
    session = Session(
        name="train_ppo",
        kind="trained",
        config=config,
        decoder=decoder,
        activations=inputs["cache_activations"].path,
        progress=ctx.progress,
        seed=ctx.seed,
        watcher=ctx.report,
        checkpoint_every_steps=config.checkpoint_every_steps,
    )
    size = config.ppo.batch_size
    with ctx.report.track(
        "PPO", session.total_steps * size, unit="rollout", done=session.done * size
    ) as bar:
        session.run(lambda note: bar.advance(size, note))
    save_decoder(decoder, ctx.out / "decoder")
    for stage in range(1, len(config.stages) + 1):
        shutil.copytree(session.stage_decoder(stage), ctx.out / f"stage{stage}" / "decoder")
    session.publish(ctx.out)
    reasons = () if session.stopped is None else (f"PPO {session.stopped}",)
    return StageOutput(metrics=_headline(session), reasons=reasons)


def _headline(session: Session) -> dict[str, Scalar]:
    """First and last validation values, and how the rollouts ended."""

    def first(name: str) -> float | None:
        return next((row.value for row in session.curves.rows if row.name == name), None)

    last = session.curves.last
    return {
        "steps": session.done,
        "rollouts": session.done * session.settings.batch_size,
        "stopped_early": session.stopped is not None,
        "validation_kl_start": first("eval_kl"),
        "validation_kl_end": last("eval_kl"),
        "validation_task_score_start": first("eval_task_score"),
        "validation_task_score_end": last("eval_task_score"),
        "reward_start": first("reward"),
        "reward_end": last("reward"),
        "effective_latents_end": last("effective_latents"),
        "entropy_end": last("entropy"),
    }
