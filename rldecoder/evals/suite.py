"""Generated tasks and tasks from files behind one call."""

from __future__ import annotations

from collections.abc import Sequence

from rldecoder.config.tasks import FileTask
from rldecoder.errors import BadInputError
from rldecoder.evals.file_tasks import FilePrompts
from rldecoder.evals.prompts import Split, Task, TaskPrompt, make_prompts
from rldecoder.lm.frozen import FrozenLM


class TaskSuite:
    """The tasks of a run.

    Args:
        file_tasks: read here, so that a bad file is refused before anything is trained.
        lm: its tokenizer measures prompts of files, its context bounds them.

    Raises:
        BadInputError: see `FilePrompts`.
    """

    def __init__(self, tasks: Sequence[Task], file_tasks: Sequence[FileTask], lm: FrozenLM) -> None:
        self._generated: dict[str, Task] = {task: task for task in tasks}
        self._files = {
            task.name: FilePrompts(task, lm.tokenizer, lm.context_length) for task in file_tasks
        }

    @property
    def names(self) -> list[str]:
        """Generated tasks first."""
        return [*self._generated, *self._files]

    @property
    def notes(self) -> list[str]:
        """A sentence for each file of which rows were left out."""
        return [
            f"Task {name}: rows left out: "
            + ", ".join(f"{count:,} {why}" for why, count in sorted(file.left_out.items()))
            for name, file in self._files.items()
            if file.left_out
        ]

    def make(
        self,
        name: str,
        split: Split,
        count: int,
        seed: int,
        *,
        fewer: bool = False,
        repeat_facts: bool = False,
    ) -> list[TaskPrompt]:
        """`count` prompts of one task and split, the same for the same arguments.

        `fewer`: where a file has fewer held-out prompts, take those. `repeat_facts`: see
        `make_prompts`.

        Raises:
            BadInputError: fewer are there.
        """
        if name in self._generated:
            task = self._generated[name]
            return make_prompts(task, split, count, seed, repeat_facts=repeat_facts)
        return self._files[name].make(split, count, seed, fewer=fewer)


def check_lengths(lm: FrozenLM, prompts: Sequence[TaskPrompt]) -> None:
    """Refuse prompts that do not fit the model together with their answers.

    Raises:
        BadInputError: a prompt and its answer exceed the model's context.
    """
    limit = lm.context_length
    for prompt in prompts:
        length = len(lm.encode_prompt(prompt.prompt)) + prompt.max_new_tokens
        if length > limit:
            raise BadInputError(
                f"Prompts of task {prompt.task} need {length} tokens with their answers.",
                f"The model's context is {limit} tokens.",
                f"Leave {prompt.task} out of the tasks (`num_task_prompts: 0` in baselines), "
                "or use a model with more context.",
            )
