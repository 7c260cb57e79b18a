"""The PPO stage: what it publishes, that a kill changes nothing, that collapse stops it."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from rldecoder.artifacts.catalogue import Policy
from rldecoder.config.rl import CollapseRule, PpoSettings
from rldecoder.config.tasks import FileTask
from rldecoder.curves import read_curves
from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.rl import ppo_run
from rldecoder.stages.table import stage_named
from rldecoder.stages.train_ppo import run
from tests.stages.published import files_of, published
from tests.stages.rl_inputs import make_rl_inputs, small_config

STAGE = stage_named("train_ppo")


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir, tmp_path_factory):
    return make_rl_inputs(tmp_path_factory.mktemp("rl"), tiny_lm_dir)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is cleaned up."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die in the middle of PPO step `step` (0-based), after its rollouts."""
    original = ppo_run.DecoderSampler.__call__
    seen = 0

    def call(self, *args):
        nonlocal seen
        rollout = original(self, *args)
        seen += 1
        if seen == step + 1:
            raise Killed
        return rollout

    monkeypatch.setattr(ppo_run.DecoderSampler, "__call__", call)


def test_publishes_and_a_kill_changes_nothing(inputs, context, monkeypatch):
    update = {"responses_per_prompt": 2, "interpolation": (0.5, 1.0)}
    config = small_config(ppo=small_config().ppo.model_copy(update=update))
    straight = context("straight")
    output = run(inputs, config, straight)
    written = files_of(straight.out)
    assert {
        "curves.parquet", "rollouts.parquet", "evaluations.parquet", "training.json",
        "decoder/model.safetensors", "stage1/decoder/model.safetensors",
        "stage2/decoder/model.safetensors", "stage3/decoder/model.safetensors",
    } <= set(written)  # fmt: skip
    assert output.metrics["steps"] == 3
    assert output.metrics["rollouts"] == 12
    assert output.metrics["interpolation"] in (0.5, 1.0)
    assert output.verdict is None

    killed = context("killed")
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            run(inputs, config, killed)
    assert not files_of(killed.out)
    # What the checkpoint goes with was damaged: it all begins again, and ends the same.
    kept = killed.progress / "stage1" / "model.safetensors"
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    torch.manual_seed(99)
    again = run(inputs, config, killed)
    assert files_of(killed.out) == written
    assert again == output

    for folder in (straight.out, straight.progress, killed.progress):
        endings = {path.suffix for path in folder.rglob("*") if path.is_file()}
        assert endings <= {".parquet", ".json", ".safetensors"}, endings


def test_a_kill_changes_nothing_with_blocks(tiny_lm_dir, tmp_path, context, monkeypatch):
    inputs = make_rl_inputs(tmp_path / "rl", tiny_lm_dir, blocks=[2, 3])
    straight, killed = context("straight"), context("killed")
    output = run(inputs, small_config(), straight)
    before = load_file(inputs.supervised.decoder / "model.safetensors")
    after = load_file(straight.out / "decoder" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    with monkeypatch.context() as patch:
        kill_after(patch, 2)
        with pytest.raises(Killed):
            run(inputs, small_config(), killed)
    torch.manual_seed(99)
    assert run(inputs, small_config(), killed) == output
    assert files_of(killed.out) == files_of(straight.out)


def test_contents(inputs, context):
    ctx = context()
    run(inputs, small_config(), ctx)
    before = load_file(inputs.supervised.decoder / "model.safetensors")
    after = load_file(ctx.out / "decoder" / "model.safetensors")
    assert not torch.equal(before["model.W"], after["model.W"])
    last = load_file(ctx.out / "stage3" / "decoder" / "model.safetensors")
    assert torch.equal(last["model.W"], after["model.W"])  # all of the way, unless told otherwise
    published(Policy, ctx.out).load(inputs.model.load(), inputs.sae.load())

    rollouts = pq.read_table(ctx.out / "rollouts.parquet").to_pylist()
    assert len(rollouts) == 12
    assert [row["step"] for row in rollouts] == sorted(row["step"] for row in rollouts)
    assert {row["stage"] for row in rollouts} == {1, 2, 3}
    assert {row["task"] for row in rollouts} == {"addition", "cloze"}
    for row in rollouts:
        f, m, t = ((0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.3, 0.2, 0.5))[row["stage"] - 1]
        used = 0.75 * row["monosemanticity"] + 0.25 * row["consistency"]
        parts = f * row["faithfulness"] + m * used + t * row["task_score"]
        # the adaptive rule does not fire here: KL is far above 0.5 at this start
        assert row["reward"] == pytest.approx(parts + 0.1 * row["kl_penalty"], abs=1e-4)

    curves = read_curves(ctx.out / "curves.parquet")
    assert {
        "reward", "reward_faithfulness", "reward_monosemanticity", "reward_task",
        "reward_kl_penalty", "entropy", "clip_fraction", "approx_kl", "value_loss",
        "rollout_kl", "text_kl", "contribution_entropy", "effective_latents", "eval_kl",
        "eval_task_score", "weight_faithfulness", "lr",
    } <= set(curves)  # fmt: skip
    assert curves["weight_task"] == ([1, 2, 3], pytest.approx([0.2, 0.3, 0.5]))
    assert curves["eval_kl"][0] == [0, 1, 2, 3]
    evaluations = pq.read_table(ctx.out / "evaluations.parquet").to_pylist()
    assert [row["stage"] for row in evaluations if row["task"] == "all"] == [0, 1, 2, 3]


def test_seeds_share_the_start_and_nothing_else(inputs, context):
    one, two = context("one"), context("two")
    single = run(inputs, small_config(), one)
    both = run(inputs, small_config(seeds=2), two)
    assert single.metrics == both.metrics
    first = files_of(one.out)
    assert {name: data for name, data in files_of(two.out).items() if name in first} | {
        name: first[name] for name in ("curves.parquet", "training.json")
    } == first
    seeds = published(Policy, two.out).training.seeds
    assert len(set(seeds)) == 2
    assert seeds[:1] == published(Policy, one.out).training.seeds == (two.seed,)
    weights = [
        load_file(Policy.trained_folder(two.out, number) / "model.safetensors")["model.W"]
        for number in range(2)
    ]
    assert not torch.equal(*weights)
    curves = read_curves(two.out / "curves.parquet")
    assert curves["seed1/eval_kl"][1][0] == curves["eval_kl"][1][0]  # before training
    assert curves["seed1/reward"] != curves["reward"]


def test_collapse_stops_and_publishes_the_last_healthy_weights(inputs, context):
    ctx = context()
    ppo = PpoSettings(batch_size=4, inner_epochs=1, replay_tokens=0, critic_width=8, lr=30.0)
    rule = CollapseRule(max_kl_increase=0.5)
    output = run(inputs, small_config(ppo=ppo, collapse=rule), ctx)
    assert output.metrics["stopped_early"] is True
    assert output.metrics["steps"] == 1
    assert "held-out KL rose" in output.reasons[0]
    assert any("held-out KL rose" in alert for alert in ctx.report.alerts)
    start = load_file(inputs.supervised.decoder / "model.safetensors")
    for place in ("decoder", "stage1/decoder", "stage3/decoder"):
        kept = load_file(ctx.out / place / "model.safetensors")
        assert torch.equal(kept["model.W"], start["model.W"])


def test_prompts_that_do_not_fit_are_refused(inputs, context, monkeypatch):
    load = FrozenLM.load

    def short(*args, **kwargs):
        lm = load(*args, **kwargs)
        lm.model.config.n_positions = 100
        return lm

    monkeypatch.setattr(FrozenLM, "load", short)
    with pytest.raises(BadInputError, match="addition"):
        run(inputs, small_config(), context())


def test_task_files_are_looked_at_before_anything_runs(tmp_path):
    path = tmp_path / "task.parquet"
    task = FileTask(name="mine", path=path)
    config = small_config(file_tasks=(task,))
    with pytest.raises(BadInputError, match="file_tasks"):
        STAGE.fingerprint(config)
    path.write_bytes(b"one")
    first = STAGE.fingerprint(config)
    path.write_bytes(b"two")
    assert STAGE.fingerprint(config) != first
    with pytest.raises(ValueError, match="nothing to ask"):
        small_config(tasks=())
    with pytest.raises(ValueError, match="same name"):
        small_config(file_tasks=(task, task))
