"""The harness's model against plain forward passes, and its judgments against our own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from rldecoder import open_run
from rldecoder.cli.harness import SYSTEMS, evaluate
from rldecoder.config.run import load_run_config
from rldecoder.errors import BadInputError
from rldecoder.evals import harness
from rldecoder.evals.harness import HarnessModel, evaluate_systems
from rldecoder.evals.harness_scores import HarnessScores
from rldecoder.evals.harness_systems import frozen_system, spliced_system
from rldecoder.evals.harness_tasks import write_tasks
from rldecoder.evals.prompts import TaskPrompt, score
from rldecoder.lm.frozen import FrozenLM
from rldecoder.run import Run

PAIRS = [
    ("The import statement", " finds a module"),
    ("A", " b"),
    ("", "Nothing stands before it"),
    ("It ends in a space ", "and goes on, for longer than the others do"),
]


def asked(kind: str, arguments: Sequence[Any]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)
    ]


def plain_loglikelihood(lm: FrozenLM, context: list[int], said: list[int]) -> float:
    """One text, no padding, the model's own logits."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([context + said])).logits[0].float().log_softmax(-1)
    rows = range(len(context) - 1, len(context) + len(said) - 1)
    return sum(float(logits[row, token]) for row, token in zip(rows, said, strict=True))


def test_loglikelihoods_are_those_of_the_model(run: Run) -> None:
    lm = run.lm()
    model = HarnessModel(lm, frozen_system(lm), batch_size=3)
    found = model.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, said), (value, _) in zip(PAIRS, found, strict=True):
        before = lm.encode_prompt(context.rstrip()) if context else [model.prefix_token_id]
        whole = lm.encode_prompt(context + said)
        after = whole[len(before) :] if context else whole
        assert value == pytest.approx(plain_loglikelihood(lm, before, after), abs=1e-3)

    # What the model writes itself is greedy, and ends where the task says.
    (text,) = model.generate_until(
        asked("generate_until", [("The import", {"until": ["@@"], "max_gen_toks": 6})])
    )
    ids = lm.encode_prompt("The import")
    own = lm.model.generate(
        torch.tensor([ids]), max_new_tokens=6, do_sample=False, pad_token_id=lm.pad_token_id
    )[0, len(ids) :].tolist()
    assert text == lm.tokenizer.decode(own, skip_special_tokens=True)
    ((_, greedy),) = model._loglikelihood_tokens([((), ids, own)])
    assert greedy
    first = text.strip()[:1] or text[:1]
    (cut,) = model.generate_until(
        asked("generate_until", [("The import", {"until": [first], "max_gen_toks": 6})])
    )
    assert cut == text.split(first)[0]


def test_a_whole_texts_loglikelihood_adds_up(run: Run) -> None:
    lm = run.lm()
    model = HarnessModel(lm, frozen_system(lm))
    text = "The import statement finds a module and then binds it to a name."
    (total,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,)]))
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert total == pytest.approx(plain_loglikelihood(lm, [model.prefix_token_id], ids), abs=1e-3)


def test_the_spliced_model_reads_reconstructions(run: Run) -> None:
    lm, sae, layer = run.lm(), run.sae(), run.config.cache_activations.hook_layer
    system = spliced_system(lm, sae, layer)
    rows = [lm.encode_prompt(text) for text in ("The import statement finds", "A name")]
    width = max(map(len, rows))
    ids = torch.tensor([row + [lm.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        found = system.hidden(ids, mask)
        for row, own in enumerate(rows):
            resid = lm.trunk(torch.tensor([own]), layer).resid
            read = sae.decode(sae.encode(resid[0].float()))
            changed = torch.cat([resid[0, :1], read[1:]])[None]  # no sink in so short a text
            wanted = lm.tail(changed, layer)[0]
            assert torch.allclose(found[row, : len(own)], wanted, atol=1e-4)
            assert not torch.allclose(wanted, lm.tail(resid, layer)[0], atol=1e-2)

        # Written a token at a time, each from the whole text before it.
        text, new = torch.tensor([rows[0]]), []
        for _ in range(4):
            new.append(int(lm.unembed(system.hidden(text, torch.ones_like(text))[0, -1]).argmax()))
            text = torch.cat([text, torch.tensor([[new[-1]]])], dim=1)
    model = HarnessModel(lm, system)
    (said,) = model.generate_until(
        asked("generate_until", [("The import statement finds", {"max_gen_toks": 4})])
    )
    assert said == lm.tokenizer.decode(new, skip_special_tokens=True)


# Metric, right answers, completions: what people would write, right and wrong.
JUDGED = [
    ("sum", ("14",), [" 6 + 8 = 14. The answer is 14.", " the answer is 13", " 14", ""]),
    ("place", ("box",), [" box.", " Box", " the box", " bag"]),
    ("first_word", ("yes",), [" Yes, it is.", " no", " yes", " certainly yes"]),
    ("number", ("1,200",), [" 3 + 4, so 1200", " $1,200 in all", " 1,200 or 7", " none"]),
    ("exact_match", ("The Tower", "Paris"), [" tower.", " Paris", " the Paris tower", " London"]),
]


@pytest.mark.parametrize(("metric", "answers", "completions"), JUDGED, ids=[j[0] for j in JUDGED])
def test_the_harness_judges_as_we_do(
    metric: Any,
    answers: tuple[str, ...],
    completions: list[str],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [
        TaskPrompt("mine", "test", i, f"Q{i}", answers[0], metric, 20, answers)
        for i in range(len(completions))
    ]

    class Canned(HarnessModel):
        def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
            return [completions[int(request.args[0][1:])] for request in requests]

    monkeypatch.setattr(harness, "HarnessModel", Canned)
    assert write_tasks({"mine": prompts}, tmp_path)[:1] == ["mine"]
    systems = {"frozen": frozen_system(run.lm())}
    (found,) = evaluate_systems(run.lm(), systems, ["mine"], [tmp_path], published=False)
    ours = [score(prompt, said) for prompt, said in zip(prompts, completions, strict=True)]
    assert 0 < sum(ours) < len(ours)
    assert (found.value, found.n) == (pytest.approx(sum(ours) / len(ours)), len(ours))


def test_a_metric_is_compared_under_its_own_filter(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task that looks for its answer in two ways, as the harness's GSM8K does."""
    prompts = [TaskPrompt("mine", "test", i, f"Q{i}", "7", "number", 20) for i in range(4)]
    write_tasks({"mine": prompts}, tmp_path)
    task = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    first = {"function": "regex", "regex_pattern": "answer is ([0-9]+)"}
    strict = {"name": "strict", "filter": [first, {"function": "take_first"}]}
    task["filter_list"].insert(0, strict)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task))

    class Canned(HarnessModel):
        def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
            return [" answer is 7" if r.args[0] == "Q0" else " 7" for r in requests]

    monkeypatch.setattr(harness, "HarnessModel", Canned)
    lm = run.lm()
    systems = {"frozen": frozen_system(lm), "again": frozen_system(lm)}
    found = evaluate_systems(lm, systems, ["mine"], [tmp_path], published=False)
    values = {one.filter: one.value for one in found if one.system == "frozen"}
    assert values == {"strict": 0.25, "answer": 1.0}
    assert [(one.delta, one.delta_stderr) for one in found] == [(0, 0)] * 4


def test_all_systems_on_the_debug_run(debug_store: Path, tmp_path: Path) -> None:
    questions = [
        {"question": f"Is {i} even?", "answer": i % 2 == 0, "split": "test"} for i in range(6)
    ]
    (tmp_path / "even.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    even = f"{{name: even, path: {tmp_path}/even.jsonl, metric: first_word, max_new_tokens: 2}}"
    settings = [f"evaluate.file_tasks=[{even}]", "evaluate.num_prompts=4"]
    run = open_run(load_run_config("debug", settings), debug_store)
    out = tmp_path / "out"
    scores = evaluate(run, ["cloze", "even", "even_choices"], SYSTEMS, out, batch_size=4)
    assert HarnessScores.load(out / "lm_eval.json").scores == tuple(scores)
    assert {(one.task, one.system) for one in scores} == {
        (task, system) for task in ("cloze", "even", "even_choices") for system in SYSTEMS
    }
    assert all(one.n == 4 for one in scores)
    choices = {one.system: one for one in scores if one.task == "even_choices"}
    frozen = choices["frozen"]
    assert (frozen.delta, frozen.delta_stderr) == (0, 0)
    for one in choices.values():
        assert one.delta == pytest.approx(one.value - frozen.value)
        assert one.stderr == pytest.approx((one.value * (1 - one.value) / 3) ** 0.5)

    # Asked the same as the stage `evaluate` did, ours stands beside it.
    plain = open_run(load_run_config("debug"), debug_store)
    same = evaluate(plain, ["cloze"], ["frozen", "rl"], out)
    assert [one.ours for one in same] == [one.value for one in same]

    systems = {"frozen": frozen_system(plain.lm())}
    with pytest.raises(BadInputError, match="knows no task nothing"):
        evaluate_systems(plain.lm(), systems, ["nothing"], [out / "tasks"], published=False)
