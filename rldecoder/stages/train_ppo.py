"""PPO on the supervised decoder, in three stages of different reward weights.

Publishes `decoder/` (the end of training or the chosen share of the way there, or the last healthy
evaluation when it collapsed), `stage1/decoder` to `stage3/decoder` (the ends of stages as they
were), `rollouts.parquet` (every response with its reward and all parts), `curves.parquet` (every
metric at every PPO step) and `evaluations.parquet` (validation). With several seeds these are of
the first; the others give `seeds/1/decoder`, `seeds/1/stage3/decoder` and so on, and curves
under `seed1/`. `training.json` has the seed of each training: the controls are trained with the
same, so that differences of pairs hold no differences of prompts and starts.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack

from rldecoder.artifacts.catalogue import Policy
from rldecoder.config.rl import TrainPpoConfig
from rldecoder.curves import Curves
from rldecoder.decoder.loading import save_decoder
from rldecoder.rl.ppo_run import PolicyTraining, PpoRun
from rldecoder.schemas import Scalar
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import PpoInputs
from rldecoder.stages.replay_text import open_replay


def run(inputs: PpoInputs, config: TrainPpoConfig, ctx: StageContext) -> Output:
    """Train; see the module's docstring for what is published."""
    seed_everything(ctx.seed)
    lm = inputs.model.load(ctx.device)
    sae = inputs.sae.load(ctx.device)
    size = config.ppo.batch_size
    total = config.seeds * size * sum(stage.steps for stage in config.stages)
    seeds = (ctx.seed, *(derive_seed(ctx.seed, f"seed{i}") for i in range(1, config.seeds)))

    curves = Curves()
    reasons: list[str] = []
    headline: dict[str, Scalar] = {}
    with ExitStack() as stack, ctx.report.track("PPO", total, unit="rollout") as bar:
        text = open_replay(inputs, config.ppo, ctx, stack, lm)
        for number, seed in enumerate(seeds):
            name = "" if number == 0 else f"seed{number}"
            decoder = inputs.supervised.load(lm, sae)
            ppo = PpoRun(
                name=f"train_ppo {name}".strip(),
                kind="trained",
                config=config,
                decoder=decoder,
                activations=inputs.cache.folder,
                progress=ctx.progress / name,
                owner=f"{ctx.owner} {name}",
                seed=seed,
                text=text,
                report=ctx.report,
                checkpoint_every_steps=config.checkpoint_every_steps,
            )
            if number == 0:
                for note in ppo.suite.notes:
                    ctx.report.note(note)

            bar.advance(ppo.done * size, "done before")
            ppo.train(lambda note: bar.advance(size, note))

            # Of the first training everything, of the others what the controls are compared with.
            save_decoder(decoder, Policy.trained_folder(ctx.out, number))
            for stage in (1, 2, 3) if number == 0 else (3,):
                end = Policy.stage_end_folder(ctx.out, number, stage)
                shutil.copytree(ppo.stage_decoder(stage), end)
            if number == 0:
                ppo.publish(Policy.evaluations.path(ctx.out), Policy.rollouts.path(ctx.out))
                headline = _headline(ppo)
            for row in ppo.curves.rows:
                curves.log(row.step, **{f"{name}/{row.name}" if name else row.name: row.value})
            if ppo.stopped is not None:
                reasons.append(f"PPO {name} {ppo.stopped}".replace("  ", " "))

    curves.write(Policy.curves.path(ctx.out))
    Policy.training.save(ctx.out, PolicyTraining(seeds=seeds))
    return Output(headline, reasons=tuple(reasons))


def _headline(ppo: PpoRun) -> dict[str, Scalar]:
    """First and last validation values, and how the rollouts ended."""

    def first(name: str) -> float | None:
        return next((row.value for row in ppo.curves.rows if row.name == name), None)

    last = ppo.curves.last
    return {
        "steps": ppo.done,
        "rollouts": ppo.done * ppo.settings.batch_size,
        "stopped_early": ppo.stopped is not None,
        "validation_kl_start": first("eval_kl"),
        "validation_kl_end": last("eval_kl"),
        "validation_task_score_start": first("eval_task_score"),
        "validation_task_score_end": last("eval_task_score"),
        "reward_start": first("reward"),
        "reward_end": last("reward"),
        "effective_latents_end": last("effective_latents"),
        "entropy_end": last("entropy"),
        "interpolation": last("interpolation"),
    }
