"""Gate: does the reward teach the decoder anything that its controls do not have?

Controls, which are the plan's: a uniform policy, a randomly initialised decoder, training of equal
length on a random reward, and, unless switched off, more supervised training of equal length (the
KL loss on text alone). Another training of equal length answers a question of its own and does not
gate: with the differentiable losses and no reward it is distillation of the frozen model on own
responses (to all tasks, also where PPO leaves some to the reward by `ppo.response_kl_factors`), and
what the reward adds to that is said in words. `further_arms` are measured in the same way.
Trainings are repeated for every seed of `train_ppo` and with that very seed: same prompts, replayed
text, sampling noise and critic, so that pairs differ in what drives them alone. The supervised
decoder and the frozen model are measured beside them, and the trainings at their ends where what is
published lies short of them (`ppo.interpolation`). The gate fails where the task score is not
clearly above a control's, or where held-out KL rose above the supervised decoder's by too much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rldecoder.artifacts.catalogue import Controls
from rldecoder.config.rl import ControlPpoConfig, TrainPpoConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ShuffledActivations
from rldecoder.decoder.faithfulness import Predictor, decoder_predictor
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.evals.statistics import crossed_bootstrap
from rldecoder.evals.suite import TaskSuite
from rldecoder.evals.tasks import TaskResult
from rldecoder.rl.controls import (
    BESIDE,
    FROZEN,
    SUPERVISED,
    TRAINED,
    TRAINED_END,
    ControlVerdict,
    System,
    compare,
    control_rows,
    each_training,
    sequence_kl,
    task_drop,
    uniform_policy,
    uniform_predictor,
)
from rldecoder.rl.evaluation import Evaluator
from rldecoder.rl.kinds import Kind
from rldecoder.rl.ppo_run import PpoRun
from rldecoder.rl.spread import response_spread, sequence_spread
from rldecoder.rl.text_training import require_text
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import ControlInputs
from rldecoder.stages.replay_text import open_replay

UNIFORM = "uniform_policy"
RANDOM_INIT = "random_decoder"
RANDOM_REWARD = "random_reward"
MORE_SUPERVISED: Kind = "text_only"
DISTILLATION: Kind = "losses_only"
GATING = (UNIFORM, RANDOM_INIT, RANDOM_REWARD, MORE_SUPERVISED)
"""What the verdict depends on (docs/rl.md says why distillation is not among them)."""


def run(inputs: ControlInputs, config: ControlPpoConfig, ctx: StageContext) -> Output:
    """Train the controls, measure every system on the test split, and judge."""
    seed_everything(ctx.seed)
    training = TrainPpoConfig.model_validate(dict(inputs.policy.config))
    lm = inputs.model.load(ctx.device)
    sae = inputs.sae.load(ctx.device)

    # Before hours of training: bad prompts, and text that is not there, are refused here.
    if config.supervised_continuation:
        require_text(training.ppo)
    evaluator = Evaluator(
        lm,
        inputs.cache.folder,
        split="test",
        suite=TaskSuite(training.tasks, training.file_tasks, lm),
        num_prompts=config.test_prompts,
        num_tokens=config.test_tokens,
        seed=derive_seed(ctx.seed, "test"),
    )

    # The published trainings, what they started from, and their ends where a share was chosen.
    seeds = inputs.policy.training.seeds
    numbers = range(len(seeds))
    decoders: dict[str, list[SaeDecoderForCausalLM]] = {
        TRAINED: [inputs.policy.load(lm, sae, i) for i in numbers],
        SUPERVISED: [inputs.supervised.load(lm, sae)],
    }
    if training.ppo.interpolation != (1.0,):
        decoders[TRAINED_END] = [inputs.policy.load_end(lm, sae, i) for i in numbers]

    # The controls: one that was never trained, and those that are trained as long as the policy.
    seed_everything(derive_seed(ctx.seed, RANDOM_INIT))
    decoders[RANDOM_INIT] = [new_decoder(lm, sae, decoders[SUPERVISED][0].upper.numbers)]
    kinds: list[Kind] = ["random_reward"]
    kinds += [DISTILLATION, MORE_SUPERVISED] if config.supervised_continuation else []
    kinds += dict.fromkeys(config.further_arms)
    curves = Curves()
    with ExitStack() as stack:
        text = open_replay(inputs, training.ppo, ctx, stack, lm)
        for kind in kinds:
            decoders[kind] = [
                _train(
                    kind,
                    i,
                    seed,
                    inputs.supervised.load(lm, sae),
                    text,
                    inputs,
                    training,
                    config,
                    ctx,
                    curves,
                )
                for i, seed in enumerate(seeds)
            ]

    systems = _measure(decoders, evaluator, config, ctx)
    trained = systems[TRAINED]
    responses = _responses(
        decoders, evaluator.prompts, trained.tasks[0].groups, training.ppo.temperature, ctx
    )
    seed = derive_seed(ctx.seed, "bootstrap")
    comparisons = [
        compare(trained, system, seed)
        for system in systems.values()
        if system.name not in (TRAINED, FROZEN)
    ]
    failures = [c.reason() for c in comparisons if c.control in GATING and not c.beaten]
    # A random reward can do harm, so beating it does not prove that anything was learned.
    start = next(c for c in comparisons if c.control == SUPERVISED)
    if -start.kl_difference > config.max_kl_increase:
        failures.append(start.too_far(config.max_kl_increase))
    verdict: Literal["pass", "fail"] = "fail" if failures else "pass"
    notes = [] if start.beaten else [start.no_gain()]
    reasons = (*failures, *notes)
    beside = tuple(c.beside() for c in comparisons if c.control in BESIDE)
    for sentence in beside:
        ctx.report.note(sentence)

    rows = [row for system in systems.values() for row in control_rows(system, seed)]
    record = ControlVerdict(
        verdict=verdict,
        reasons=reasons,
        beside=beside,
        comparisons=tuple(comparisons),
        systems={row.system: row for row in rows if row.task == "all"},
        trainings=each_training(trained, list(systems.values()), systems[FROZEN], seed),
        supervised_drop=task_drop(systems[SUPERVISED], systems[FROZEN], seed),
        response_entropy=responses.entropy,
        response_effective_latents=responses.effective,
    )
    Controls.record.save(ctx.out, record)
    Controls.systems.save_rows(ctx.out, [row.model_dump() for row in rows])
    curves.write(Controls.curves.path(ctx.out))
    return Output(record.headline, verdict, reasons)


def _train(
    kind: Kind,
    number: int,
    seed: int,
    decoder: SaeDecoderForCausalLM,
    text: ShuffledActivations | None,
    inputs: ControlInputs,
    training: TrainPpoConfig,
    config: ControlPpoConfig,
    ctx: StageContext,
    curves: Curves,
) -> SaeDecoderForCausalLM:
    """Train a control as long as the decoder was trained; its curves get its name as prefix."""
    name = kind if number == 0 else f"{kind}{number}"
    ppo = PpoRun(
        name=f"control_ppo {name}",
        kind=kind,
        config=training,
        decoder=decoder,
        activations=inputs.cache.folder,
        progress=ctx.progress / name,
        owner=f"{ctx.owner} {name}",
        seed=seed,
        text=text,
        report=ctx.report,
        checkpoint_every_steps=config.checkpoint_every_steps,
    )
    size = ppo.settings.batch_size
    title = f"control: {name.replace('_', ' ')}"
    total, done = ppo.total_steps * size, ppo.done * size
    with ctx.report.track(title, total, unit="rollout", done=done) as bar:
        ppo.train(lambda note: bar.advance(size, note))
    for row in ppo.curves.rows:
        curves.log(row.step, **{f"{name}/{row.name}": row.value})
    return decoder


def _measure(
    decoders: Mapping[str, list[SaeDecoderForCausalLM]],
    evaluator: Evaluator,
    config: ControlPpoConfig,
    ctx: StageContext,
) -> dict[str, System]:
    """Task score and KL of every system on the same test prompts and test text."""
    lm = evaluator.lm
    trainings = {
        (name, number): decoder
        for name, group in decoders.items()
        for number, decoder in enumerate(group)
    }
    predictors: dict[tuple[str, int], Predictor] = {
        key: decoder_predictor(decoder) for key, decoder in trainings.items()
    }

    # Two systems are no decoders: the uniform policy, and the frozen model itself.
    predictors[UNIFORM, 0] = uniform_predictor(lm)
    scores: dict[tuple[str, int], TaskResult] = {
        (UNIFORM, 0): uniform_policy(evaluator.prompts, lm, ctx.seed)
    }
    with ctx.report.track("test of controls", len(trainings) + 3, unit="system") as bar:
        for key, decoder in trainings.items():
            scores[key] = evaluator.tasks(decoder)
            bar.advance(1, key[0])
        scores[FROZEN, 0] = evaluator.tasks(lm.model)
        bar.advance(1, FROZEN)
        kl = sequence_kl(predictors, evaluator.reader, lm, config.test_tokens)
        bar.advance(1, "KL")
        spread = sequence_spread(trainings, evaluator.reader, config.test_tokens)
        bar.advance(1, "contributions")
    kl[FROZEN, 0] = 0.0 * kl[UNIFORM, 0]

    return {
        name: System(
            name,
            [scores[key] for key in scores if key[0] == name],
            np.stack([kl[key] for key in scores if key[0] == name]),
            name in GATING,
            [spread[key] for key in scores if key[0] == name and key in spread],
        )
        for name, _ in scores
    }


class _Responses(NamedTuple):
    """Trained and supervised decoders on their own sampled responses."""

    entropy: dict[str, float]
    """Contribution entropy, and its fall from the supervised one's with the 95 % interval."""
    effective: dict[str, float]
    """Effective number of latents."""


def _responses(
    decoders: Mapping[str, list[SaeDecoderForCausalLM]],
    prompts: Sequence[TaskPrompt],
    groups: Sequence[str],
    temperature: float,
    ctx: StageContext,
) -> _Responses:
    seed = derive_seed(ctx.seed, "responses")
    entropies: dict[str, NDArray[np.float64]] = {}
    effective: dict[str, float] = {}
    ends = [name for name in (TRAINED, TRAINED_END) if name in decoders]
    for name in (*ends, SUPERVISED):
        spreads = [
            response_spread(decoder, prompts, temperature=temperature, seed=derive_seed(seed, i))
            for i, decoder in enumerate(decoders[name])
        ]
        entropies[name] = np.array([spread.entropy for spread in spreads])
        effective[name] = float(np.mean([spread.effective for spread in spreads]))
    entropy = {name: float(values.mean()) for name, values in entropies.items()}
    for name in ends:
        fall = crossed_bootstrap(entropies[SUPERVISED] - entropies[name], seed=seed, groups=groups)
        prefix = "" if name == TRAINED else f"{name}_"
        entropy |= {
            f"{prefix}fall": fall.difference,
            f"{prefix}fall_low": fall.low,
            f"{prefix}fall_high": fall.high,
        }
    return _Responses(entropy, effective)
