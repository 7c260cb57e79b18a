"""The registered experiment: its questions, its answers and its tests, before any run of it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import reward_or_teacher
from benchmarks.reward_answers import FROZEN, ask_all, undecided
from benchmarks.reward_statistics import DISTILLATIONS, PPO, Records, judged, slope
from benchmarks.reward_statistics import tests as registered
from benchmarks.reward_words import FAMILIES, fresh_prompts, past_of, words_of_training
from rldecoder.evals.generation import prefix_generate
from rldecoder.evals.prompts import make_prompts
from rldecoder.evals.tasks import run_task

SEEDS = 5
ARMS = (PPO, *DISTILLATIONS, "gold_answers")


def test_questions_are_new_and_balanced():
    known = words_of_training()
    assert {"tiger", "broom", "hammer", "walked."[:-1]} <= known
    for family in FAMILIES:
        prompts = fresh_prompts(family)
        assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 240
        assert not {prompt.group for prompt in prompts} & known
        answers = [prompt.answer for prompt in prompts]
        assert len({answers.count(answer) for answer in set(answers)}) == 1
        # The wording is training's: only the question differs.
        asked = make_prompts(family, "train", 1, 0)[0]
        shared = prompts[0].prompt.rsplit("\n\n", 1)[0]
        assert asked.prompt.startswith(shared)
    assert [past_of(verb) for verb in ("beg", "fry", "obey", "dive")] == [
        "begged", "fried", "obeyed", "dived",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "open_"),
    [("", True), (" An", True), (" an anim", True), (" a", True), (" food", False), ("\"ani", True),
     (" animals", False), (" th", True), (" the", True), (" animal", True)],
)  # fmt: skip
def test_an_answer_is_written_on_while_it_may_become_right(text, open_):
    assert undecided(text, "animal") == open_


@pytest.fixture
def made_up():
    """A lead that grows with the teacher's errors by .4, and noise."""
    rng = np.random.default_rng(0)
    size = 720
    teacher = rng.integers(0, 17, size) / 16
    words = tuple(f"w{i // 2}" for i in range(size))

    def records(effect: float, lead: float = 0.0) -> Records:
        base = rng.uniform(0.2, 0.4, size)
        samples = {FROZEN: tuple(teacher), "supervised-0": tuple(base)}
        validation = {FROZEN: 0.5, "supervised-0": 0.1}
        for arm in ARMS:
            for number in range(SEEDS):
                more = lead + effect * (1 - teacher) if arm == PPO else 0.0
                noise = rng.normal(0, 0.1, size) + rng.normal(0, 0.01)
                samples[f"{arm}-{number}"] = tuple(base + more + noise)
                validation[f"{arm}-{number}"] = 0.6 if arm == "reverse_distillation" else 0.5
        flat = dict.fromkeys(samples, 0.5)
        return Records(
            families=tuple(FAMILIES[i % 3] for i in range(size)),
            groups=words,
            samples=samples,
            greedy=samples,
            start_kl=flat,
            kl=flat | {f"{PPO}-1": 0.9},
            validation=validation,
        )

    return records


def test_the_registered_tests_find_what_was_put_in(made_up, tmp_path):
    records = made_up(0.4)
    records.save(tmp_path / "records.json")
    assert Records.load(tmp_path / "records.json") == records
    assert records.better_distillation() == "reverse_distillation"
    primary, within, *others = registered(records)
    for found in (primary, within):
        assert found.low < 0.4 < found.high
        assert found.pvalue < 0.001
    values = {found.name: found.value for found in others}
    below, above = (v for name, v in values.items() if "half" in name or "other" in name)
    assert below > above > 0
    assert abs(values["PPO - gold_answers, all"] - 0.2) < 0.03
    # A lead that is the same everywhere is no slope.
    flat = registered(made_up(0.0, lead=0.3))[0]
    assert flat.low < 0 < flat.high
    assert flat.pvalue > 0.01
    assert "trained-1" in str(judged(records).renderables[-1])


def test_the_slope_is_least_squares_and_seeds_widen_it():
    rng = np.random.default_rng(1)
    x, y = rng.uniform(size=60), rng.normal(size=(4, 60))
    words = [str(i) for i in range(60)]
    found = slope(y, x, words)
    assert found.slope == pytest.approx(np.polyfit(x, y.mean(0), 1)[0])
    # Trainings that differ in their slopes: with one alone the interval does not know.
    steep = np.array([[-1.0], [0.0], [1.0], [2.0]]) * x + 0.01 * y
    wide, narrow = slope(steep, x, words), slope(steep[1:2], x, words)
    assert wide.high - wide.low > 10 * (narrow.high - narrow.low)


@pytest.mark.parametrize("blocks", [(), (2,)])
def test_answers_are_those_of_decoder_and_frozen_model(make_decoder, monkeypatch, blocks):
    """Greedy ones as `run_task` has them; samples as often as the distribution says."""
    decoder = make_decoder(scale=0.3, blocks=blocks)
    lm = decoder.frozen.lm
    prompts = [p for f in ("alive", "kind") for p in make_prompts(f, "test", 6, 0)]
    monkeypatch.setattr("benchmarks.reward_answers.BATCH", 4)
    # Any answer counts, by what is written: nothing is cut short.
    monkeypatch.setattr("benchmarks.reward_answers.undecided", lambda text, answer: True)
    for module in ("benchmarks.reward_answers", "rldecoder.evals.tasks"):
        monkeypatch.setattr(f"{module}.score", lambda prompt, text: float(sum(map(ord, text))))
    asked = ask_all(lm, {"start-0": decoder}, prompts, samples=3, teacher_samples=2, seed=0)
    again = ask_all(lm, {"start-0": decoder, "same-0": decoder}, prompts, samples=3,
                    teacher_samples=2, seed=0)  # fmt: skip
    for name, model in ((FROZEN, lm.model), ("start-0", decoder)):
        expected = run_task(prefix_generate(model), prompts, lm.tokenizer)
        np.testing.assert_array_equal(asked.systems[name].greedy, expected.scores)
    for name in ("start-0", FROZEN):
        np.testing.assert_array_equal(asked.systems[name].samples, again.systems[name].samples)
    same = again.systems["same-0"]
    np.testing.assert_array_equal(same.samples, again.systems["start-0"].samples)
    np.testing.assert_allclose(same.start_kl, 0, atol=1e-6)
    assert (asked.systems[FROZEN].start_kl > 0).all()


def test_fewer_questions_leave_out_no_answer() -> None:
    fewer = reward_or_teacher._every(2, fresh_prompts("tense"))
    assert len(fewer) == 120
    assert sorted({prompt.answer for prompt in fewer}) == ["future", "past"]
