"""EleutherAI's lm-evaluation-harness on the frozen model, the spliced one and the decoders.

The package `lm_eval` (extra `eval`) asks; `HarnessModel` answers. The run's own tasks become tasks
of the harness, as YAML and JSONL that `lm_eval --include_path` reads too, and are judged by the
harness's own metrics. Source: Gao et al. 2024, github.com/EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import stdev
from typing import Any, cast

import torch
from lm_eval import evaluator
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rldecoder.errors import BadInputError
from rldecoder.evals.generation import newline_token_ids
from rldecoder.evals.harness_scores import HarnessScores, Score
from rldecoder.evals.harness_systems import System
from rldecoder.evals.harness_tasks import write_tasks
from rldecoder.evals.prompts import TaskPrompt
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import answer_texts

# It asks git for the commit of the current folder, whatever that is: nothing here reads it, and
# elsewhere git's complaint would stand on the terminal.
evaluator.get_git_commit_hash = lambda: None

DEFAULT_NEW_TOKENS = 64
"""Length of an answer where a task names none."""


class HarnessModel(TemplateLM):
    """What lm_eval calls a model: log-likelihoods and greedy answers of one `System`.

    Texts longer than the model's context lose their beginning, as in the harness's own models.
    """

    def __init__(self, lm: FrozenLM, system: System, *, batch_size: int = 16) -> None:
        super().__init__()
        self._lm, self._system, self._batch = lm, system, batch_size
        self.tokenizer = lm.tokenizer
        self._newlines = newline_token_ids(lm.tokenizer)

    @property
    def eot_token_id(self) -> int:
        return self._lm.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._lm.front[0] if self._lm.front else self._lm.eos_token_id

    def tok_encode(self, string: str, **kwargs: Any) -> list[int]:
        return self._lm.encode_prompt(string)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Any], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        limit = self._lm.context_length
        order = sorted(
            range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2])
        )
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self._batch):
            places = order[start : start + self._batch]
            texts = [(requests[i][1] + requests[i][2])[-limit - 1 :] for i in places]
            # The last token is predicted and not read.
            width = max(len(text) for text in texts) - 1
            ids = torch.full((len(texts), width), self._lm.pad_token_id, device=self._lm.device)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                ids[row, : len(text) - 1] = torch.tensor(text[:-1])
                mask[row, : len(text) - 1] = 1
            states = self._system.hidden(ids, mask)
            for row, (place, text) in enumerate(zip(places, texts, strict=True)):
                wanted = torch.tensor(requests[place][2][-len(text) + 1 :], device=ids.device)
                at = states[row, len(text) - 1 - len(wanted) : len(text) - 1]
                logprobs = self._lm.unembed(at).log_softmax(-1)
                said = logprobs.gather(-1, wanted[:, None]).sum()
                greedy = bool((logprobs.argmax(-1) == wanted).all())
                found[place] = (float(said), greedy)
        return [found[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Log-likelihood of whole texts, each token read once in as much context as fits."""
        totals = []
        for request in requests:
            (text,) = request.args
            ids = self._lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            windows = map(
                make_disjoint_window,
                get_rolling_token_windows(
                    token_list=ids,
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self._lm.context_length,
                    context_len=1,
                ),
            )
            parts = [((None, None), context, said) for context, said in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """Greedy answers, cut at the first of the strings that end one."""
        texts = [""] * len(requests)
        by_length: dict[tuple[int, bool], list[int]] = {}
        for place, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample"):
                raise BadInputError(
                    "A task wants sampled answers.",
                    "The decoders are compared greedily: what differs is then theirs.",
                    "Set `do_sample: false` in its generation_kwargs.",
                )
            new = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
            by_length.setdefault((new, "\n" in _ends(settings)), []).append(place)

        for (new, line), places in by_length.items():
            for start in range(0, len(places), self._batch):
                batch = places[start : start + self._batch]
                prompts = [requests[place].args[0] for place in batch]
                for place, text in zip(batch, self._answer(prompts, new, line), strict=True):
                    for end in _ends(requests[place].args[1]):
                        text = text.split(end)[0] if end else text
                    texts[place] = text
        return texts

    def _answer(self, prompts: Sequence[str], new: int, line: bool) -> list[str]:
        """Completions; `line`: they end at their first line break."""
        lm = self._lm
        rows = [self.tok_encode(text)[-max(1, lm.context_length - new) :] for text in prompts]
        width = max(map(len, rows))
        ids = [[lm.pad_token_id] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        stops = [*dict.fromkeys([*(self._newlines if line else ()), *lm.end_token_ids])]
        out = self._system.generate(
            input_ids=torch.tensor(ids, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            max_new_tokens=new,
            eos_token_id=stops,
            pad_token_id=lm.pad_token_id,
        )
        return answer_texts(lm.tokenizer, out[:, width:].tolist(), lm.end_token_ids)


def _ends(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    return [until] if isinstance(until, str) else [str(end) for end in until]


def ask_harness(
    lm: FrozenLM,
    systems: Mapping[str, System],
    tasks: Sequence[str],
    own: Mapping[str, Sequence[TaskPrompt]],
    folder: Path,
    include: Sequence[Path] = (),
    *,
    limit: int | None = None,
    batch_size: int = 16,
    say: Callable[[str], None] = lambda text: None,
) -> HarnessScores:
    """Ask every system tasks of three kinds: the run's own, those of folders, published ones.

    Args:
        own: the run's tasks, by name; written for the harness to `folder`.
        folder: for tasks, their data and its cache.
        include: folders with YAMLs of further tasks.

    The others, and the errors, are those of `evaluate_systems`.
    """
    written = write_tasks(own, folder) if own else []

    # The harness's own list is thousands of YAMLs, and its data lie on the hub.
    here = {*written, *(path.stem for one in include for path in one.glob("**/*.yaml"))}
    scores = evaluate_systems(
        lm, systems, tasks, [*([folder] if own else []), *include],
        published=not set(tasks) <= here, limit=limit, batch_size=batch_size, say=say,
    )  # fmt: skip
    return HarnessScores(harness=version("lm_eval"), scores=tuple(scores))


def evaluate_systems(
    lm: FrozenLM,
    systems: Mapping[str, System],
    tasks: Sequence[str],
    folders: Sequence[Path],
    *,
    published: bool,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Ask every system every task. The first system is the one that deltas are taken to.

    Args:
        tasks: names, of the folders' tasks or of the harness's own.
        published: look among the harness's own tasks too, which need the hub.
        limit: at most so many documents a task.
        seed: of the harness's own draws (few-shot examples).
        say: told which system is asked.

    Raises:
        BadInputError: there is no such task.
    """
    manager = TaskManager(
        include_path=[str(folder) for folder in folders], include_defaults=published
    )

    # The harness itself would say so after models are loaded, in a traceback.
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise BadInputError(
            f"The harness knows no task {', '.join(unknown)}.",
            f"Tasks that are here: {', '.join(sorted(manager.all_tasks)[:20])}.",
            "Correct --tasks, or name a folder of YAMLs with --include.",
        )

    # Every system has the same seeds, hence the same documents and worked examples.
    scores: list[Score] = []
    reference: dict[tuple[str, str], dict[int, float]] = {}
    for name, system in systems.items():
        say(f"lm-eval: {name}")
        out = evaluator.simple_evaluate(
            model=HarnessModel(lm, system, batch_size=batch_size),
            tasks=[*tasks],
            task_manager=manager,
            limit=limit,
            log_samples=True,
            bootstrap_iters=1000,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            verbosity="ERROR",
        )
        scores += _scores(name, cast("dict[str, Any]", out), reference)

    # A metric is compared with itself under the same filter.
    first = {
        (s.task, s.metric, s.filter): s.value for s in scores if s.system == next(iter(systems))
    }
    return [
        s.model_copy(update={"delta": s.value - first[s.task, s.metric, s.filter]}) for s in scores
    ]


def _scores(
    system: str, out: Mapping[str, Any], reference: dict[tuple[str, str], dict[int, float]]
) -> list[Score]:
    """The harness's table as records; `reference` keeps the first system's single documents."""
    scores = []
    for task, values in out["results"].items():
        for key, value in values.items():
            # Keys are `metric,filter`; names and sizes stand beside them without a filter.
            metric, _, how = key.partition(",")
            if not how or metric.endswith("_stderr"):
                continue

            # Document by document where there is such a value: differences are then paired.
            samples = [one for one in out["samples"].get(task, ()) if one["filter"] == how]
            single = {
                one["doc_id"]: float(one[metric])
                for one in samples
                if isinstance(one.get(metric), int | float)
            }
            first = reference.setdefault((task, key), single)

            error = values.get(f"{metric}_stderr,{how}")
            scores.append(
                Score(
                    task=task,
                    system=system,
                    metric=metric,
                    filter=how,
                    n=len(samples),
                    value=float(value),
                    stderr=error if isinstance(error, float) else None,
                    delta_stderr=_paired_error(single, first),
                )
            )
    return scores


def _paired_error(values: Mapping[int, float], first: Mapping[int, float]) -> float | None:
    """Standard error of the mean difference over the same documents."""
    if len(values) < 2 or values.keys() != first.keys():
        return None
    return stdev(values[doc] - first[doc] for doc in values) / len(values) ** 0.5
