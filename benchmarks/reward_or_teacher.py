"""The registered experiment docs/experiments/reward_or_teacher.md: a reward, or a teacher?

    python -m benchmarks.reward_or_teacher train CONFIG --store STORE --out OUT
    python -m benchmarks.reward_or_teacher measure CONFIG --store STORE --out OUT
    python -m benchmarks.reward_or_teacher judge OUT [BLOCKS]

`train` trains every arm from the supervised decoder with the settings of the run's `train_ppo`, all
arms of one seed before the next seed, and goes on where it was stopped. `measure` asks every
decoder that is there, and the frozen model, the test questions of `benchmarks.reward_words` and the
validation questions, and writes a record a question. `judge` reads those records alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from benchmarks.reward_answers import Asked, ask_all
from benchmarks.reward_statistics import Records, judged
from benchmarks.reward_words import FAMILIES, fresh_prompts
from rldecoder.artifacts.catalogue import (
    ActivationCache,
    ModelFolder,
    SupervisedDecoder,
    TrainedSae,
)
from rldecoder.config.rl import TrainPpoConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.faithfulness import Predictor, decoder_predictor
from rldecoder.decoder.loading import load_decoder, save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.evals.prompts import TaskPrompt, make_prompts
from rldecoder.files import remove
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import SilentReporter
from rldecoder.rl.controls import sequence_kl
from rldecoder.rl.kinds import Kind
from rldecoder.rl.ppo_run import PpoRun
from rldecoder.run import open_run
from rldecoder.sae.model import Sae
from rldecoder.seeds import derive_seed, seed_everything

ARMS: tuple[Kind, ...] = (
    "trained",
    "losses_only",
    "reverse_distillation",
    "gold_answers",
    "correct_teacher",
    "random_reward",
)
"""In the order in which a seed's trainings are done."""

app = typer.Typer(help=__doc__)
console = Console(width=110)
Out = Annotated[Path, typer.Option(help="Folder of decoders and records")]


class Parts(NamedTuple):
    """What all trainings start from."""

    lm: FrozenLM
    sae: Sae
    activations: Path
    supervised: SupervisedDecoder
    training: TrainPpoConfig
    seeds: tuple[int, ...]
    """As `train_ppo` has them."""


def opened(config: Path, store: Path | None) -> Parts:
    """The run's frozen parts, its supervised decoder and its settings of PPO."""
    run = open_run(config, store=store)
    training, first = run.config.train_ppo, run.config.seed
    others = (derive_seed(first, f"seed{i}") for i in range(1, training.seeds))
    return Parts(
        lm=run.artifact(ModelFolder).load("cpu"),
        sae=run.artifact(TrainedSae).load("cpu"),
        activations=run.artifact(ActivationCache).folder,
        supervised=run.artifact(SupervisedDecoder),
        training=training,
        seeds=(first, *others),
    )


def decoder_of(out: Path, arm: str, number: int) -> Path:
    """Where a finished training's decoder is."""
    return out / f"{arm}-{number}" / "decoder"


@app.command()
def train(
    config: Path,
    out: Out,
    store: Path | None = None,
    numbers: Annotated[
        str, typer.Option(help="Of the run's seeds, with commas; all by default")
    ] = "",
    arms: Annotated[str, typer.Option(help="Names, with commas")] = ",".join(ARMS),
) -> None:
    """Train what is not there yet; processes with other numbers may run beside each other."""
    parts = opened(config, store)
    for number in map(int, numbers.split(",")) if numbers else range(len(parts.seeds)):
        seed = parts.seeds[number]
        for arm in ARMS:
            if arm in arms.split(",") and not decoder_of(out, arm, number).is_dir():
                started = time.monotonic()
                run = train_one(parts, arm, number, seed, out)
                took = time.monotonic() - started
                console.print(f"{arm}-{number}: {took:.0f} s, {last_values(run)}")


def train_one(parts: Parts, arm: Kind, number: int, seed: int, out: Path) -> PpoRun:
    """One training, from its last checkpoint where there is one; its decoder is kept."""
    seed_everything(seed)
    folder = out / f"{arm}-{number}"
    run = PpoRun(
        name=f"{arm}-{number}",
        kind=arm,
        config=parts.training,
        decoder=parts.supervised.load(parts.lm, parts.sae),
        activations=parts.activations,
        progress=folder / "progress",
        seed=seed,
        report=SilentReporter(),
        checkpoint_every_steps=parts.training.checkpoint_every_steps,
        owner=f"{parts.supervised.folder.name} {arm} {number}",
    )
    run.train(lambda note: None)

    # Whole or not at all; weights and moments of a finished training are not needed again.
    run.curves.write(folder / "curves.parquet")
    if run.stopped is not None:
        console.print(f"[red]{run.name} {run.stopped}[/red]")
    save_decoder(run.decoder, folder / "writing")
    (folder / "writing").rename(folder / "decoder")
    remove(folder / "progress")
    return run


def last_values(run: PpoRun, steps: int = 10) -> str:
    """Means of the last steps, all of training prompts and training text."""
    found = []
    for name in ("task_score", "entropy", "text_kl", "rollout_kl", "gold_ce", "clip_fraction"):
        values = [row.value for row in run.curves.rows if row.name == name]
        if values:
            first = sum(values[:steps]) / len(values[:steps])
            found.append(f"{name} {first:.3f} -> {sum(values[-steps:]) / len(values[-steps:]):.3f}")
    return ", ".join(found)


def _every(step: int, prompts: list[TaskPrompt]) -> list[TaskPrompt]:
    """Those about every `step`-th word: all questions of a word, so that no answer is left out."""
    kept = set(list(dict.fromkeys(prompt.group for prompt in prompts))[::step])
    return [prompt for prompt in prompts if prompt.group in kept]


@app.command()
def measure(
    config: Path,
    out: Out,
    store: Path | None = None,
    samples: Annotated[int, typer.Option(help="Samples a question at temperature 1")] = 4,
    teacher_samples: Annotated[int, typer.Option(help="The same, of the frozen model")] = 16,
    tokens: Annotated[int, typer.Option(help="Test tokens for KL")] = 2048,
    questions: Annotated[int, typer.Option(help="Test questions a family")] = 240,
) -> None:
    """Ask every system every question; the records go to OUT/records.json."""
    parts = opened(config, store)
    decoders: dict[str, SaeDecoderForCausalLM] = {
        "supervised-0": parts.supervised.load(parts.lm, parts.sae)
    }
    for number in range(len(parts.seeds)):
        for arm in ARMS:
            folder = decoder_of(out, arm, number)
            if folder.is_dir():
                decoders[f"{arm}-{number}"] = load_decoder(folder, parts.lm, parts.sae)

    step = 240 // questions
    asked: dict[str, Asked] = {}
    for split in ("validation", "test"):
        prompts = [
            prompt
            for family in FAMILIES
            for prompt in (
                _every(step, fresh_prompts(family))
                if split == "test"
                else make_prompts(family, "validation", 16, 0)
            )
        ]
        asked[split] = ask_all(
            parts.lm,
            decoders,
            prompts,
            samples=samples,
            teacher_samples=teacher_samples,
            seed=derive_seed(parts.seeds[0], "answers", split),
        )
        console.print(f"{split}: {len(prompts)} questions, {len(decoders)} decoders")

    predictors: dict[str, Predictor] = {
        name: decoder_predictor(decoder) for name, decoder in decoders.items()
    }
    reader = ActivationReader(parts.activations, "test")
    kl = sequence_kl(predictors, reader, parts.lm, tokens)
    records = Records.of(asked["test"], asked["validation"], kl)
    records.save(out / "records.json")


@app.command()
def judge(linear: Path, blocks: Path | None = None) -> None:
    """The registered tests, from the records alone."""
    for title, folder in (("linear", linear), ("six blocks", blocks)):
        if folder is not None:
            console.rule(title)
            console.print(judged(Records.load(folder / "records.json")))


if __name__ == "__main__":
    app()
