"""Which tasks a reward could teach something: two numbers each, on training prompts alone.

    python -m benchmarks.task_choice configs/quickstart.yaml --store artifacts

The rule, stated before any PPO run: PPO asks tasks that the frozen model answers rightly in .3 to
.6 of its samples, and that a linear probe on the latents of the prompt's last token answers rightly
in .8 or more. Then the layer knows and the model does not say. The probe is logistic regression,
judged on groups of questions (a word, a pair) that it was not fitted on. Needs a run that has come
to `train_sae`; about three minutes of one CPU core. Results: docs/experiments/ppo_tasks.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler
from torch import Tensor

from rldecoder.artifacts.catalogue import ModelFolder, TrainedSae
from rldecoder.evals.generation import newline_token_ids
from rldecoder.evals.prompts import CHOICES, TASKS, Task, TaskPrompt, make_prompts, score
from rldecoder.evals.statistics import bootstrap_mean_ci
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.text_tokens import answer_texts, encode_prompts
from rldecoder.rl.rollout import draw
from rldecoder.run import open_run
from rldecoder.sae.model import Sae
from rldecoder.seeds import torch_generator

TEACHER = (0.3, 0.6)
"""Share of the frozen model's samples that are right: sure enough to be rewarded."""
PROBE = 0.8
"""Least share that the probe has right."""
FOLDS = 5

app = typer.Typer(help=__doc__)


class Measured(NamedTuple):
    """A task on training prompts."""

    prompts: int
    samples: NDArray[np.float64]
    """[prompts] share of the frozen model's samples that are right."""
    greedy: float
    """Share of its first choices that are right."""
    commonest: float
    """Share of the commonest answer among the right ones: what knowing nothing scores."""
    probe: float
    """Share that the linear probe has right on questions it was not fitted on."""

    @property
    def fits(self) -> bool:
        """Whether the rule takes the task."""
        low, high = TEACHER
        return low <= float(self.samples.mean()) <= high and self.probe >= PROBE


@torch.no_grad()
def measure(
    lm: FrozenLM, sae: Sae, prompts: Sequence[TaskPrompt], num_samples: int, seed: int
) -> Measured:
    """Both numbers, and what stands beside them. Prompts are of one task, whose answers are shared
    by groups of questions."""
    latents, rights = [], []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        resid, texts = _answers(lm, sae.spec.hook_layer, part, num_samples, seed + start)
        found = sae.encode(resid.float())
        rows = torch.zeros(len(part), sae.spec.num_latents).scatter_(1, found.indices, found.acts)
        latents.append(sparse.csr_array(rows.numpy()))
        rows_of = [part[i // (1 + num_samples)] for i in range(len(texts))]
        rights += [score(prompt, text) for prompt, text in zip(rows_of, texts, strict=True)]

    by_prompt = np.array(rights).reshape(len(prompts), 1 + num_samples)
    answers = np.array([prompt.answer for prompt in prompts])
    # Only whether a latent is rare or common should not decide how much the probe may use it.
    probe = make_pipeline(MaxAbsScaler(), LogisticRegression(C=1.0, max_iter=500))
    guesses = cross_val_predict(
        probe,
        sparse.vstack(latents).tocsr(),
        answers,
        groups=[prompt.group for prompt in prompts],
        cv=GroupKFold(FOLDS),
    )
    return Measured(
        prompts=len(prompts),
        samples=by_prompt[:, 1:].mean(1),
        greedy=float(by_prompt[:, 0].mean()),
        commonest=float(np.unique(answers, return_counts=True)[1].max() / len(answers)),
        probe=float((guesses == answers).mean()),
    )


def _answers(
    lm: FrozenLM, layer: int, prompts: Sequence[TaskPrompt], num_samples: int, seed: int
) -> tuple[Tensor, list[str]]:
    """The residual [B, D] at each prompt's last token, and each prompt's first choice followed by
    its samples."""
    ids = encode_prompts(lm.tokenizer, [prompt.prompt for prompt in prompts])
    width, pad = max(map(len, ids)), lm.pad_token_id
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    resid = lm.trunk(tokens, layer, attention_mask=mask).resid[:, -1]

    # A prompt is read once for its first choice and all its samples.
    repeats = 1 + num_samples
    out = lm.model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=True,
        logits_to_keep=1,
    )
    past = out.past_key_values
    past.batch_repeat_interleave(repeats)
    mask = mask.repeat_interleave(repeats, 0)
    positions = mask.sum(-1, keepdim=True) - 1
    greedy = torch.arange(len(mask)) % repeats == 0
    stops = torch.tensor([*newline_token_ids(lm.tokenizer), *lm.end_token_ids])
    generator, alive = torch_generator(seed, "samples"), torch.ones(len(mask), dtype=torch.bool)
    logits, chosen = out.logits[:, -1].repeat_interleave(repeats, 0).float(), []

    for left in reversed(range(prompts[0].max_new_tokens)):
        token = torch.where(greedy, logits.argmax(-1), draw(logits.softmax(-1), generator))
        token = torch.where(alive, token, pad)
        chosen.append(token)
        alive = alive & ~torch.isin(token, stops)
        if not alive.any() or not left:
            break
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        positions = positions + 1
        out = lm.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
            use_cache=True,
        )
        logits = out.logits[:, -1].float()
    return resid, answer_texts(lm.tokenizer, torch.stack(chosen, 1).tolist(), lm.end_token_ids)


@app.command()
def main(
    config: Path,
    store: Path | None = None,
    prompts: Annotated[int, typer.Option(help="Training prompts a task")] = 80,
    samples: Annotated[int, typer.Option(help="Samples of the frozen model a prompt")] = 4,
    tasks: Annotated[str, typer.Option(help="Names, with commas; all by default")] = "",
) -> None:
    """Print the table."""
    run = open_run(config, store=store)
    lm = run.artifact(ModelFolder).load("cpu")
    sae = run.artifact(TrainedSae).load("cpu")
    names: list[Task] = [*CHOICES, *TASKS]
    console = Console(width=100)
    table = Table(title=f"{run.name}: {prompts} training prompts a task")
    for column in ("task", "samples right", "95 %", "greedy", "commonest", "probe", "fits"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for name in names:
        if tasks and name not in tasks.split(","):
            continue
        console.print(f"[dim]{name}[/dim]")
        found = measure(lm, sae, make_prompts(name, "train", prompts, 0), samples, 0)
        mean, low, high = bootstrap_mean_ci(found.samples, seed=0)
        table.add_row(
            name,
            f"{mean:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{found.greedy:.2f}",
            f"{found.commonest:.2f}",
            f"{found.probe:.2f}",
            "yes" if found.fits else "no",
        )
    console.print(table)


if __name__ == "__main__":
    app()
