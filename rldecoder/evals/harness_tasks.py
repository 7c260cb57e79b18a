"""The run's tasks as tasks of lm-evaluation-harness: YAML and JSONL that `lm_eval` reads too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rldecoder.evals.prompts import TaskPrompt

# How the harness finds in a completion what `evals.answers` finds there. `group_select: -1` is the
# last match. What differs for rare answers is told in docs/metrics.md.
_PATTERNS: Mapping[str, tuple[str, int]] = {
    "sum": (r"answer is\s*(\d+)", 0),
    "place": (r"([A-Za-z]+)", 0),
    "first_word": (r"([A-Za-z0-9]+)", 0),
    "number": (r"(-?[$]?\d[\d,]*(?:\.\d+)?)", -1),
}
# They are applied before case and punctuation are dropped, so a full stop may end a word.
_WORDS_ALONE = [r"(?i)\b(?:a|an|the)\b\s*", r"^\s+", r"[\s.]+$"]
_IGNORED: Mapping[str, list[str]] = {
    "number": [",", r"\$"],
    "exact_match": _WORDS_ALONE,
    "f1": _WORDS_ALONE,
}
_YES_NO = ("no", "yes")


def write_tasks(prompts: Mapping[str, Sequence[TaskPrompt]], folder: Path) -> list[str]:
    """Write the run's tasks for the harness: `NAME.yaml` and `NAME.jsonl` each; their names.

    A yes/no task has a second form, `NAME_choices`: the likelier of the two answers, as the
    harness's own BoolQ asks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, asked in prompts.items():
        docs = [
            {
                "prompt": one.prompt,
                "answer": one.answer,
                "answers": [*(one.answers or (one.answer,))],
            }
            for one in asked
        ]
        names.append(_write_task(folder, name, docs, _generated(asked[0], docs)))
        said = {answer.lower() for doc in docs for answer in doc["answers"]}
        if asked[0].metric == "first_word" and said <= set(_YES_NO):
            names.append(_write_task(folder, f"{name}_choices", docs, _CHOICES))
    return names


_CHOICES: Mapping[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": list(_YES_NO),
    "doc_to_target": "{{['no', 'yes'].index(answer.lower())}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def _generated(prompt: TaskPrompt, docs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Settings of a task whose answers are written."""
    judged: dict[str, Any] = {
        "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
        "ignore_case": True, "ignore_punctuation": prompt.metric in ("exact_match", "f1"),
    }  # fmt: skip
    if ignored := _IGNORED.get(prompt.metric):
        judged["regexes_to_ignore"] = ignored
    settings: dict[str, Any] = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "answers" if any(len(d["answers"]) > 1 for d in docs) else "{{answer}}",
        "generation_kwargs": {
            "until": ["\n"], "max_gen_toks": prompt.max_new_tokens, "do_sample": False,
        },
        "metric_list": [judged],
    }  # fmt: skip
    if prompt.metric in _PATTERNS:
        pattern, group = _PATTERNS[prompt.metric]
        found = {"function": "regex", "regex_pattern": pattern, "group_select": group}
        settings["filter_list"] = [
            {"name": "answer", "filter": [found, {"function": "take_first"}]}
        ]
    return settings


def _write_task(
    folder: Path, name: str, docs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> str:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str(folder.resolve() / "cache"),
        },
        "test_split": "test",
        **settings,
        "metadata": {"version": 1.0},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
    return name
