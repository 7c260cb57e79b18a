"""The control stage: systems, verdict, and that it can say no."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from rldecoder.artifacts.catalogue import Controls, Policy
from rldecoder.config.rl import ControlPpoConfig
from rldecoder.errors import BadInputError
from rldecoder.reporting import SilentReporter
from rldecoder.rl.controls import Comparison
from rldecoder.rl.ppo_run import PolicyTraining, PpoRun
from rldecoder.stages import control_ppo, train_ppo
from rldecoder.stages.context import StageContext
from rldecoder.stages.control_ppo import run
from rldecoder.stages.table import stage_named
from tests.stages.published import published as artifact
from tests.stages.rl_inputs import make_rl_inputs, small_config, with_policy

STAGE = stage_named("control_ppo")


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir, tmp_path_factory):
    """`train_ppo` is stood in for by the supervised decoder: nothing was learned."""
    folder = tmp_path_factory.mktemp("control")
    made = make_rl_inputs(folder, tiny_lm_dir)
    policy = artifact(Policy, folder / Policy.stage, config=small_config().model_dump(mode="json"))
    shutil.copytree(made.supervised.decoder, policy.decoder)
    Policy.training.save(policy.folder, PolicyTraining(seeds=(0,)))
    return with_policy(made, policy)


CONFIG = ControlPpoConfig(test_prompts=2, test_tokens=75)
BEATEN = Comparison(
    control="", score_difference=0.3, score_low=0.2, score_high=0.4, score_pvalue=0.001,
    kl_difference=0.5, kl_low=0.4, kl_high=0.6, beaten=True,
    entropy_difference=None, entropy_low=None, entropy_high=None,
)  # fmt: skip
NO_CONTINUATION = CONFIG.model_copy(update={"supervised_continuation": False})


@pytest.fixture(scope="module")
def published(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    (folder / "out").mkdir()
    ctx = StageContext(
        folder / "out", folder / "progress", 0, torch.device("cpu"), SilentReporter()
    )
    return run(inputs, CONFIG, ctx), folder / "out"


def test_a_control_without_text_is_refused_before_any_training(inputs, context, monkeypatch):
    monkeypatch.setattr(PpoRun, "train", lambda *_: pytest.fail("trained"))
    ppo = small_config().ppo.model_copy(update={"replay_tokens": 0})
    config = small_config(ppo=ppo).model_dump(mode="json")
    policy = artifact(Policy, inputs.policy.folder, config=config)
    with pytest.raises(BadInputError, match="no text to train on"):
        run(inputs._replace(policy=policy), CONFIG, context())


def test_inputs_and_gate():
    assert STAGE.gate
    assert "train_ppo" in STAGE.upstream


def test_a_control_that_is_better_fails_the_gate(published):
    """The decoder of a random model is farther from it than the uniform policy is."""
    output, out = published
    assert output.verdict == "fail"
    assert any("control uniform_policy comes near" in reason for reason in output.reasons)
    record = artifact(Controls, out).record
    assert record.verdict == "fail"
    assert record.reasons == output.reasons
    assert record.headline == output.metrics


def test_no_gain_over_the_start_is_said_but_does_not_gate(published):
    """Here the trained decoder *is* the supervised one."""
    output, out = published
    assert output.reasons[-1].startswith("PPO is not clearly better than the supervised decoder")
    record = artifact(Controls, out).record
    (same,) = (c for c in record.comparisons if c.control == "supervised")
    responses = record.response_entropy
    assert responses["trained"] == responses["supervised"] > 0
    assert responses["fall"] == 0.0
    effective = record.response_effective_latents
    assert 1 < effective["trained"] == effective["supervised"] <= 16
    for name, value in effective.items():
        assert output.metrics[f"{name}_response_effective_latents"] == value
    assert same.score_difference == same.kl_difference == 0.0
    assert not same.beaten


def test_the_verdict_has_each_training_by_itself(published):
    record = artifact(Controls, published[1]).record
    (only,) = record.trainings
    trained = record.systems["trained"]
    assert (only.score, only.kl) == (trained.score, trained.kl)
    frozen = record.systems["frozen"]
    for drop, of in ((only.drop, trained), (record.supervised_drop, record.systems["supervised"])):
        assert drop is not None
        assert drop.low <= drop.value <= drop.high
        assert drop.value == pytest.approx(frozen.score - of.score)
    judged = {c.control for c in record.comparisons if c.control in control_ppo.GATING}
    assert set(only.not_beaten or ()) == judged - {
        c.control for c in record.comparisons if c.beaten
    }


def test_every_system_is_measured(published):
    _, out = published
    rows = pq.read_table(out / "controls.parquet").to_pylist()
    gates = {row["system"]: row["gates"] for row in rows}
    assert gates == {
        "trained": False, "supervised": False, "frozen": False,
        "uniform_policy": True, "random_decoder": True, "random_reward": True, "losses_only": False,
        "text_only": True,
    }  # fmt: skip
    overall = {row["system"]: row for row in rows if row["task"] == "all"}
    assert all(row["num_prompts"] == 4 for row in overall.values())
    assert overall["frozen"]["kl"] == 0.0
    assert overall["trained"]["kl"] == overall["supervised"]["kl"] > 0
    assert overall["losses_only"]["kl"] < overall["random_reward"]["kl"]
    without = {name for name, row in overall.items() if row["contribution_entropy"] is None}
    assert without == {"frozen", "uniform_policy"}
    assert all(
        0 < overall[name]["contribution_entropy"] <= 1 <= overall[name]["effective_latents"]
        for name in set(overall) - without
    )


def test_curves_have_a_prefix_for_each_trained_control(published):
    names = set(pq.read_table(published[1] / "curves.parquet")["name"].to_pylist())
    assert "random_reward/reward_random" in names
    assert {"losses_only/text_kl", "losses_only/rollout_kl", "text_only/text_kl"} <= names
    assert "text_only/rollout_kl" not in names
    assert "random_reward/text_kl" not in names
    assert "random_reward/contribution_entropy" not in names


def test_passes_when_all_controls_are_beaten(inputs, context, monkeypatch):
    def clear(trained, control, seed):
        return BEATEN.model_copy(update={"control": control.name})

    monkeypatch.setattr(control_ppo, "compare", clear)
    monkeypatch.setattr(control_ppo, "_train", lambda kind, number, seed, decoder, *rest: decoder)
    output = run(inputs, NO_CONTINUATION, context())
    assert output.verdict == "pass"
    assert output.reasons == ()


def test_distillation_is_measured_beside_the_verdict(inputs, context, monkeypatch):
    """What comes near by distillation alone is said, and does not gate; any other control does."""

    def near(names):
        def comparison(trained, control, seed):
            far = {"score_low": -0.01, "beaten": False} if control.name in names else {}
            return BEATEN.model_copy(update={"control": control.name, **far})

        return comparison

    monkeypatch.setattr(control_ppo, "_train", lambda kind, number, seed, decoder, *rest: decoder)
    monkeypatch.setattr(control_ppo, "compare", near({"losses_only"}))
    ctx = context()
    output = run(inputs, CONFIG, ctx)
    assert (output.verdict, output.reasons) == ("pass", ())
    (sentence,) = artifact(Controls, ctx.out).record.beside
    assert sentence.startswith("the reward adds ")
    assert "-0.01" in sentence
    for control in ("uniform_policy", "random_decoder", "random_reward", "text_only"):
        monkeypatch.setattr(control_ppo, "compare", near({control}))
        output = run(inputs, CONFIG, context())
        assert output.verdict == "fail"
        assert control in output.reasons[0]


def test_a_rise_of_held_out_kl_fails_the_gate(inputs, context, monkeypatch):
    def dear(trained, control, seed):
        risen = {"kl_difference": -0.2, "kl_low": -0.3, "kl_high": -0.1}
        return BEATEN.model_copy(update={"control": control.name, **risen})

    monkeypatch.setattr(control_ppo, "compare", dear)
    monkeypatch.setattr(control_ppo, "_train", lambda kind, number, seed, decoder, *rest: decoder)
    output = run(inputs, NO_CONTINUATION, context())
    assert output.verdict == "fail"
    (reason,) = output.reasons
    assert reason.startswith("PPO raised held-out KL above the supervised decoder's by 0.200")
    allowed = NO_CONTINUATION.model_copy(update={"max_kl_increase": 0.25})
    assert run(inputs, allowed, context()).verdict == "pass"


def test_every_seed_is_trained_again_and_judged(inputs, context, monkeypatch, tmp_path):
    folder = tmp_path / Policy.stage
    for number in range(2):
        shutil.copytree(inputs.supervised.decoder, Policy.trained_folder(folder, number))
    Policy.training.save(folder, PolicyTraining(seeds=(11, 12)))
    config = small_config(seeds=2).model_dump(mode="json")
    trained = artifact(Policy, folder, config=config)
    seen = []

    class Untrained(PpoRun):
        def train(self, advance):
            seen.append((self.kind, self.seed, self))
            self.decoder.requires_grad_(False)

    monkeypatch.setattr(control_ppo, "PpoRun", Untrained)
    ctx = context()
    lm, sae = inputs.model.load(), inputs.sae.load()
    arms = ("reverse_distillation", "gold_answers", "correct_teacher")
    further = CONFIG.model_copy(update={"further_arms": arms})
    output = run(inputs._replace(policy=trained), further, ctx)
    kinds = ("random_reward", "losses_only", "text_only", *arms)
    assert [row[:2] for row in seen] == [(kind, seed) for kind in kinds for seed in (11, 12)]
    for kind, seed, control in seen:
        pair = PpoRun(
            name="pair", kind="trained", config=small_config(seeds=2), seed=seed,
            decoder=inputs.supervised.load(lm, sae), activations=inputs.cache.folder,
            progress=tmp_path / f"{kind}{seed}", report=ctx.report, checkpoint_every_steps=1,
        )  # fmt: skip
        if kind == "text_only":  # no loss looks at its responses; the text is what it learns from
            assert torch.equal(control._replay()(1).latents.acts, pair._replay()(1).latents.acts)
        else:
            assert control._prompts() == pair._prompts()
        critics = (control.learner.critic.parameters(), pair.learner.critic.parameters())
        for ours, theirs in zip(*critics, strict=True):
            assert torch.equal(ours, theirs)
    rows = pq.read_table(ctx.out / "controls.parquet").to_pylist()
    trainings = {row["system"]: row["num_trainings"] for row in rows}
    assert trainings == {
        "trained": 2, "random_reward": 2, "losses_only": 2, "text_only": 2,
        "reverse_distillation": 2, "gold_answers": 2, "correct_teacher": 2,
        "supervised": 1, "frozen": 1, "uniform_policy": 1, "random_decoder": 1,
    }  # fmt: skip
    # What is measured beside the verdict is said and gates nothing.
    beside = artifact(Controls, ctx.out).record.beside
    assert [sum(words in line for line in beside) for words in ("reverse KL", "right ans")] == [
        1,
        1,
    ]
    assert not any(arm in reason for arm in arms for reason in output.reasons)
    assert not {row["system"] for row in rows if row["gates"]} & set(arms)


def test_the_end_of_training_stands_beside_a_share_of_the_way(inputs, context, monkeypatch):
    ppo = small_config().ppo.model_copy(update={"interpolation": (0.25,)})
    config = small_config(ppo=ppo, seeds=2)
    trained = context("trained")
    train_ppo.run(inputs, config, trained)
    given = artifact(Policy, trained.out, config=config.model_dump(mode="json"))
    monkeypatch.setattr(control_ppo, "_train", lambda kind, number, seed, decoder, *rest: decoder)
    ctx = context("control")
    output = run(inputs._replace(policy=given), NO_CONTINUATION, ctx)
    rows = pq.read_table(ctx.out / "controls.parquet").to_pylist()
    kl = {row["system"]: row["kl"] for row in rows if row["task"] == "all"}
    end = next(row for row in rows if row["system"] == "trained_end")
    assert end["num_trainings"] == 2
    assert not end["gates"]
    # The way is so short that KL is nearly linear on it: a quarter is not as far as the end.
    moved = {name: abs(kl[name] - kl["supervised"]) for name in ("trained", "trained_end")}
    assert 0 < moved["trained"] < moved["trained_end"]
    record = artifact(Controls, ctx.out).record
    found = record.response_entropy
    for prefix in ("trained", "trained_end"):
        fall = found["fall" if prefix == "trained" else "trained_end_fall"]
        assert fall == pytest.approx(found["supervised"] - found[prefix], abs=1e-6)
        assert output.metrics[f"{prefix}_response_entropy"] == found[prefix]
    assert "trained_end" in {comparison.control for comparison in record.comparisons}
    lm, sae = inputs.model.load(), inputs.sae.load()
    start = inputs.supervised.load(lm, sae).W
    for number in range(2):
        last = given.load_end(lm, sae, number).W
        published = given.load(lm, sae, number).W
        torch.testing.assert_close(published, torch.lerp(start, last, 0.25))


def test_same_seed_same_bytes(inputs, context, monkeypatch):
    monkeypatch.setattr(control_ppo, "_train", lambda kind, number, seed, decoder, *rest: decoder)
    one, two = context("one"), context("two")
    assert run(inputs, NO_CONTINUATION, one) == run(inputs, NO_CONTINUATION, two)
    for name in ("verdict.json", "controls.parquet"):
        assert (one.out / name).read_bytes() == (two.out / name).read_bytes()
    other = replace(context("three"), seed=1)
    run(inputs, NO_CONTINUATION, other)
    assert (other.out / "controls.parquet").read_bytes() != (
        one.out / "controls.parquet"
    ).read_bytes()
