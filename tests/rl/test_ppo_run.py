"""A ppo_run's bookkeeping: stages, weights, the adaptive rule, kinds of control."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rldecoder.checkpoints import Checkpoints
from rldecoder.config.rl import AdaptiveRule, CollapseRule
from rldecoder.config.run import load_run_config
from rldecoder.config.tasks import FileTask
from rldecoder.errors import BadInputError, NumericalError
from rldecoder.reporting import SilentReporter
from rldecoder.rl import core
from rldecoder.rl.learner import interpolate
from rldecoder.rl.ppo_run import PpoRun
from rldecoder.schemas import read_parquet
from tests.stages.rl_inputs import small_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def make_ppo_run(make_decoder, tiny_cache, tmp_path):
    def make(kind="trained", name="run", *, reporter=None, checkpoint_every_steps=1, **changes):
        reporter = reporter or SilentReporter()
        ppo_run = PpoRun(
            name="test", kind=kind, config=small_config(**changes), decoder=make_decoder(),
            activations=tiny_cache, progress=tmp_path / name, seed=0, report=reporter,
            checkpoint_every_steps=checkpoint_every_steps,
        )  # fmt: skip
        return ppo_run, reporter

    return make


def test_prompts_take_turns_and_fill_every_step(make_ppo_run):
    ppo_run, _ = make_ppo_run()
    prompts = ppo_run._prompts()
    assert len(prompts) == 3 * 4
    assert [prompt.task for prompt in prompts] == ["addition", "cloze"] * 6
    assert {prompt.split for prompt in prompts} == {"train"}


def test_a_task_can_have_several_turns_in_a_round(make_ppo_run):
    ppo_run, _ = make_ppo_run(task_turns={"cloze": 3})
    prompts = ppo_run._prompts()
    # Three steps of four prompts, a round each.
    assert [prompt.task for prompt in prompts] == ["addition", "cloze", "cloze", "cloze"] * 3
    assert len({prompt.prompt for prompt in prompts}) == 12


def test_prompts_are_repeated_for_their_responses(make_ppo_run):
    ppo = small_config().ppo.model_copy(update={"responses_per_prompt": 2})
    ppo_run, _ = make_ppo_run(ppo=ppo)
    prompts = ppo_run._prompts()
    assert [prompt.task for prompt in prompts] == ["addition", "addition", "cloze", "cloze"] * 3
    assert prompts[::2] == prompts[1::2]
    assert len({prompt.prompt for prompt in prompts}) == 6
    # One prompt a step: no task may be left out for that.
    one, _ = make_ppo_run(name="one", ppo=ppo.model_copy(update={"responses_per_prompt": 4}))
    tasks = [prompt.task for prompt in one._prompts()]
    assert tasks == ["addition"] * 4 + ["cloze"] * 4 + ["addition"] * 4
    ppo_run.train(lambda note: None)


def test_a_file_is_a_task_like_the_others(make_ppo_run, tmp_path):
    path = tmp_path / "task.parquet"
    questions = [f"What is {i}?" for i in range(40)]
    split = ["train"] * 20 + ["test"] * 20
    table = pa.table({"split": split, "question": questions, "answer": ["w x y z"] * 40})
    pq.write_table(table, path)
    task = FileTask(name="mine", path=path, metric="f1", max_new_tokens=3)
    ppo_run, _ = make_ppo_run(tasks=("cloze",), file_tasks=(task,), eval_prompts=1)
    prompts = ppo_run._prompts()
    assert [prompt.task for prompt in prompts] == ["cloze", "mine"] * 6
    ppo_run.train(lambda note: None)
    assert {row[2] for row in ppo_run.evaluations} == {"all", "cloze", "mine"}
    ppo_run.publish(tmp_path / "evaluations.parquet", tmp_path / "rollouts.parquet")
    rollouts = read_parquet(tmp_path / "rollouts.parquet").to_pylist()
    assert {row["num_tokens"] <= 3 for row in rollouts if row["task"] == "mine"} == {True}
    assert {row["answer"] for row in rollouts if row["task"] == "mine"} == {"w x y z"}


def test_kinds_differ_in_rewards_and_losses_only(make_ppo_run):
    trained, _ = make_ppo_run("trained", "a")
    noise, _ = make_ppo_run("random_reward", "b")
    losses, _ = make_ppo_run("losses_only", "c")
    assert [w.reward.name for w in trained._rewards()] == [
        "faithfulness", "monosemanticity", "consistency", "task", "kl_penalty",
    ]  # fmt: skip
    assert [w.reward.name for w in noise._rewards()] == ["random"]
    assert noise._replay() is None
    assert noise.settings.kl_loss_coef == noise.settings.sparsity_loss_coef == 0
    assert noise.settings.lr == trained.settings.lr
    assert noise.total_steps == losses.total_steps == trained.total_steps
    assert losses.settings.policy_coef == 0
    assert losses.settings.kl_loss_coef == trained.settings.kl_loss_coef
    assert noise.evaluator is None


def test_arms_without_reward_differ_in_the_loss_on_responses(make_ppo_run):
    """Same prompts and text; no advantages; each makes its own distance smaller."""
    seen, weights = {}, []
    for kind in ("losses_only", "reverse_distillation", "gold_answers"):
        ppo_run, _ = make_ppo_run(kind, kind, tasks=("cloze",))
        assert ppo_run.settings.policy_coef == ppo_run.settings.entropy_coef == 0
        ppo_run.train(lambda note: None)
        weights.append(ppo_run.decoder.W.detach().clone())
        name = "gold_ce" if kind == "gold_answers" else "rollout_kl"
        seen[kind] = [row.value for row in ppo_run.curves.rows if row.name == name]
        assert len(seen[kind]) == ppo_run.total_steps
    assert not any(torch.equal(one, other) for one, other in combinations(weights, 2))
    assert seen["gold_answers"][-1] < seen["gold_answers"][0]
    assert seen["losses_only"][0] != seen["reverse_distillation"][0]


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_only_right_answers_of_the_teacher_are_learned(make_ppo_run, monkeypatch, right):
    """Where none is right, there is no loss and the decoder stays where it was."""
    monkeypatch.setattr("rldecoder.rl.trainer.score", lambda prompt, text: right)
    ppo = small_config().ppo.model_copy(update={"replay_tokens": 0})
    ppo_run, _ = make_ppo_run("correct_teacher", tasks=("cloze",), ppo=ppo)
    before = ppo_run.decoder.W.detach().clone()
    ppo_run.train(lambda note: None)
    learned = [row.value for row in ppo_run.curves.rows if row.name == "gold_ce"]
    assert torch.equal(ppo_run.decoder.W, before) == (not right)
    assert [value > 0 for value in learned] == [bool(right)] * ppo_run.total_steps


def test_a_reward_alone_asks_no_teacher(make_ppo_run):
    ppo = small_config().ppo.model_copy(
        update={"faithfulness_reward": False, "response_kl_factors": {"cloze": 0.0}}
    )
    ppo_run, _ = make_ppo_run(tasks=("cloze",), ppo=ppo)
    assert "faithfulness" not in [part.reward.name for part in ppo_run._rewards()]
    ppo_run.train(lambda note: None)
    seen = {row.name for row in ppo_run.curves.rows}
    assert "task_score" in seen
    assert "text_kl" in seen
    assert not {"rollout_kl", "reward_faithfulness"} & seen


@pytest.mark.parametrize(("kind", "same"), [("losses_only", True), ("trained", False)])
def test_a_task_left_to_the_reward_is_distilled_in_the_control(make_ppo_run, kind, same):
    """`losses_only` has the KL loss on the responses of all tasks; training as it is told."""
    free = small_config().ppo.model_copy(update={"response_kl_factors": {"cloze": 0.0}})
    weights = []
    for name, changes in (("free", {"ppo": free}), ("full", {})):
        ppo_run, _ = make_ppo_run(kind, name, **changes)
        ppo_run.train(lambda note: None)
        weights.append(ppo_run.decoder.W.detach().clone())
    assert torch.equal(*weights) == same
    assert torch.allclose(*weights, atol=1e-6) == same


def test_the_text_only_continuation_learns_from_text_alone(make_ppo_run):
    ppo_run, _ = make_ppo_run("text_only")
    assert ppo_run.settings.policy_coef == ppo_run.settings.sparsity_loss_coef == 0
    ppo_run.train(lambda note: None)
    names = {row.name for row in ppo_run.curves.rows}
    assert "text_kl" in names
    assert not names & {"rollout_kl", "contribution_entropy", "text_entropy", "reward"}


def test_the_text_only_continuation_takes_the_steps_of_the_trainer(make_ppo_run, monkeypatch):
    """PPO's trainer samples responses that no loss reads, and ends at the same weights."""
    ppo = small_config().ppo.model_copy(update={"inner_epochs": 2, "minibatches": 2})
    alone, _ = make_ppo_run("text_only", "alone", ppo=ppo)
    start = alone.decoder.W.detach().clone()
    with monkeypatch.context() as without:
        without.setattr(PpoRun, "_train_on_responses", lambda *_: pytest.fail("sampled"))
        alone.train(lambda note: None)
    assert not torch.equal(alone.decoder.W, start)

    beside, _ = make_ppo_run("text_only", "beside", ppo=ppo)
    monkeypatch.setattr(PpoRun, "_train_on_text", PpoRun._train_on_responses)
    beside.train(lambda note: None)
    torch.testing.assert_close(alone.decoder.W, beside.decoder.W, rtol=0, atol=0)
    assert [row for row in alone.curves.rows if row.name == "text_kl"] == [
        row for row in beside.curves.rows if row.name == "text_kl"
    ]


def test_the_text_only_continuation_needs_text(make_ppo_run):
    ppo = small_config().ppo.model_copy(update={"replay_tokens": 0})
    ppo_run, _ = make_ppo_run("text_only", ppo=ppo)
    with pytest.raises(BadInputError, match="supervised_continuation"):
        ppo_run.train(lambda note: None)


def test_stage_weights_and_adaptive_rule(make_ppo_run):
    rule = AdaptiveRule(kl_target=1e9, latents_target=0.5)
    ppo_run, _ = make_ppo_run(adaptive=rule)
    assert ppo_run.weights() == pytest.approx((0.5, 0.3, 0.2))
    notes: list[str] = []
    ppo_run.train(notes.append)
    assert len(notes) == 3
    # evaluated at the end of each of the three stages: the rule fired three times
    assert ppo_run.scale == pytest.approx((0.95**3, 1.1**3, 1.0))
    rows = [row for row in ppo_run.evaluations if row[2] == "all"]
    assert rows[1][-3:] == pytest.approx([0.4 * 0.95, 0.3 * 1.1, 0.3])
    assert not ppo_run.decoder.W.requires_grad


def three_each():
    """Stages of three PPO steps."""
    return tuple(stage.model_copy(update={"steps": 3}) for stage in small_config().stages)


class Recorder(SilentReporter):
    """Keeps live metrics, too."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[str, int, dict[str, float]]] = []

    def metrics(self, stage, step, values):
        self.seen.append((stage, step, dict(values)))


def test_evaluates_and_saves_every_n_steps_and_at_the_ends_of_stages(make_ppo_run, monkeypatch):
    saved: list[int] = []
    original = Checkpoints.save

    def save(self, step, *rest, **named):
        saved.append(step)
        original(self, step, *rest, **named)

    monkeypatch.setattr(Checkpoints, "save", save)
    ppo_run, watched = make_ppo_run(
        reporter=Recorder(), stages=three_each(), eval_every_steps=2, checkpoint_every_steps=4
    )
    ppo_run.train(lambda note: None)
    evaluated = [row[0] for row in ppo_run.evaluations if row[2] == "all"]
    assert evaluated == [0, 2, 3, 4, 6, 8, 9]
    assert [row[1] for row in ppo_run.evaluations if row[2] == "all"] == [0, 1, 1, 2, 2, 3, 3]
    assert saved == [4, 8, 9]
    # Live metrics: each step's and each evaluation's, as in the curves.
    assert {name for name, *_ in watched.seen} == {"test"}
    steps = [(step, values) for _, step, values in watched.seen if "reward" in values]
    assert [step for step, _ in steps] == [*range(1, 10)]
    assert [step for _, step, values in watched.seen if "eval_kl" in values] == evaluated
    logged = {(row.step, row.name): row.value for row in ppo_run.curves.rows}
    for _, step, values in watched.seen:
        assert {name: logged[step, name] for name in values} == values
    assert {"weight_task", "clip_fraction", "entropy"} <= set(steps[0][1])


@pytest.mark.parametrize(("kind", "done"), [("trained", 2), ("random_reward", 9)])
def test_the_watch_stops_training_but_no_control(make_ppo_run, make_decoder, kind, done):
    """Entropy below twice its start is collapse to this rule: two such steps end it."""
    rule = CollapseRule(min_entropy_fraction=2.0, patience=2)
    ppo_run, watched = make_ppo_run(kind, stages=three_each(), eval_every_steps=9, collapse=rule)
    ppo_run.train(lambda note: None)
    assert ppo_run.done == done
    start = make_decoder()
    if kind == "trained":
        assert ppo_run.stopped.startswith("stopped after PPO step 2: entropy")
        assert watched.alerts[-1] == f"test {ppo_run.stopped}"
        # What is left is the last evaluation in order: here the start.
        assert torch.equal(ppo_run.decoder.W, start.W)
        assert all((ppo_run.stage_decoder(stage) / "config.json").is_file() for stage in (1, 2, 3))
    else:
        assert ppo_run.stopped is None
        assert watched.alerts == []
        assert not torch.equal(ppo_run.decoder.W, start.W)


@pytest.mark.parametrize(
    ("path", "seeds"),
    [
        (CONFIGS / "scale.yaml", 3),
        (CONFIGS / "gpt2_phase1.yaml", 3),
        (CONFIGS.parent / "docs" / "experiments" / "ppo_plan_smollm.yaml", 1),
        (CONFIGS.parent / "docs" / "experiments" / "ppo_plan_length.yaml", 1),
    ],
    ids=lambda value: getattr(value, "stem", None),
)
def test_the_seed_plan_has_its_stages_borders(path, seeds):
    """2,000, 6,000 and 2,000 steps from one YAML; nothing is trained here."""
    config = load_run_config(path).train_ppo
    assert config.seeds == seeds
    assert [stage.steps for stage in config.stages] == [2000, 6000, 2000]
    ppo_run = object.__new__(PpoRun)  # the counting alone: no model, no cache
    ppo_run.config = config
    found = [ppo_run._stage_of(step) for step in (0, 1999, 2000, 7999, 8000, 9999)]
    assert found == [1, 1, 2, 2, 3, 3]


def test_a_finished_run_does_not_train_again(make_ppo_run):
    ppo_run, _ = make_ppo_run("random_reward")
    ppo_run.train(lambda note: None)
    again, _ = make_ppo_run("random_reward")
    assert again.done == 3
    again.train(lambda note: pytest.fail("trained again"))
    assert torch.equal(again.decoder.W, ppo_run.decoder.W)


def test_the_published_weights_lie_between_start_and_end(make_ppo_run, make_decoder):
    def trained(name, share):
        ppo = small_config().ppo.model_copy(update={"interpolation": (share,)})
        ppo_run, _ = make_ppo_run(name=name, ppo=ppo)
        ppo_run.train(lambda note: None)
        return ppo_run

    start, end, between = make_decoder(), trained("whole", 1.0), trained("part", 0.25)
    assert not torch.equal(start.W, end.decoder.W)
    torch.testing.assert_close(between.decoder.W, 0.75 * start.W + 0.25 * end.decoder.W)
    torch.testing.assert_close(between.decoder.b, 0.75 * start.b + 0.25 * end.decoder.b)
    # Training itself is the same, and what is evaluated last is what is published.
    assert between.evaluations[:-3] == end.evaluations[:-3]
    assert between.evaluations[-3:] != end.evaluations[-3:]
    again = trained("part", 0.25)  # a resumed one does not move them a second time
    assert torch.equal(again.decoder.W, between.decoder.W)


@pytest.mark.parametrize("kind", ["trained", "losses_only"])
def test_the_share_is_chosen_by_validation_kl(make_ppo_run, make_decoder, kind):
    """A bound that nothing passes leaves the least KL; one that all pass leaves the end."""

    def trained(name, bound):
        update = {"interpolation": (0.25, 0.5, 1.0), "interpolation_max_kl": bound}
        ppo_run, _ = make_ppo_run(kind, name, ppo=small_config().ppo.model_copy(update=update))
        ppo_run.train(lambda note: None)
        (share,) = (row.value for row in ppo_run.curves.rows if row.name == "interpolation")
        return ppo_run, share

    (end, all_of_it), (near, share) = trained("all", 100.0), trained("none", -100.0)
    assert all_of_it == 1.0
    start, judge = make_decoder(), near._evaluator()
    torch.testing.assert_close(
        near.decoder.W, torch.lerp(start.W, end.decoder.W, share), atol=1e-6, rtol=0
    )
    learner = near.learner._replace(decoder=start)
    kl = {}
    for candidate in (0.25, 0.5, 1.0):
        interpolate(learner, end.decoder.parameters(), candidate)
        kl[candidate] = judge.kl(start)
    assert share == min(kl, key=kl.__getitem__)
    if kind == "trained":  # what is evaluated last is what is published
        last = next(row.value for row in reversed(near.curves.rows) if row.name == "eval_kl")
        assert last == pytest.approx(kl[share], abs=1e-5)


def test_nan_is_an_error_that_names_the_metric(make_ppo_run, monkeypatch):
    ppo_run, _ = make_ppo_run("random_reward")
    monkeypatch.setattr(core, "explained_variance", lambda *args: float("nan"))
    with pytest.raises(NumericalError, match="value_explained_variance"):
        ppo_run.train(lambda note: None)
