"""How the cost of every sharded stage grows with its tokens: CPU seconds and memory.

    nice -n 10 python -m benchmarks.bench_growth docs/images/growth.svg

The debug run's model (random, 4 blocks of 64), one thread, the local executor. Each measurement is
a process of its own, forked once all is imported: CPU seconds (user and system), and how far memory
rises above where it began. A busy machine, whose caches are others', takes up to a third more CPU
seconds too. A line, a fixed cost and one a token, is fitted to the relative errors; beside it
stands how far the worst size is off.
Results: docs/scale.md.
"""

from __future__ import annotations

import json
import os
import random
import resource
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

# Before tokenizers are loaded: their threads would not outlive the fork.
os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from rldecoder.artifacts.base import Artifact
from rldecoder.artifacts.catalogue import ActivationCache, Corpus, ModelFolder
from rldecoder.config.data import BaselinesConfig, CacheActivationsConfig, IngestConfig
from rldecoder.config.interp import RankFeaturesConfig
from rldecoder.config.run import load_run_config
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.packing import PackedSequence, TokenShardWriter
from rldecoder.decoder.faithfulness import summarise
from rldecoder.decoder.faithfulness_shards import (
    FaithfulnessSettings,
    FaithfulnessWorker,
    batch_ends,
)
from rldecoder.decoder.loading import save_decoder
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.executors.jobs import even_ends
from rldecoder.figures import svg_figure
from rldecoder.interp.encoding_shards import EncodingSettings, EncodingWorker
from rldecoder.interp.patch_shards import SHARD_TOKENS, AttributionSettings, AttributionWorker
from rldecoder.interp.tally import Tally
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import SilentReporter
from rldecoder.rl.replay import COLUMNS, Replay
from rldecoder.runner import plan, run_stage, store_for
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import IngestInputs, TextInputs
from rldecoder.stages.streams import open_stream
from rldecoder.stages.table import stage_named

app = typer.Typer(help=__doc__, add_completion=False)
console = Console(width=120)
CPU = torch.device("cpu")
Kind = TypeVar("Kind", bound=Artifact)
LENGTH, HOOK, LATENTS, K = 64, 2, 512, 16
CHARS_PER_DOCUMENT = 1_500
SIZES = "10000,100000,1000000,10000000"
SPARE = 1.1
"""Text beside what fills the budget: the cut at its end is not exact."""


class Cost(NamedTuple):
    """Of one measurement."""

    tokens: int
    cpu_seconds: float
    memory_bytes: int
    """Peak above where the process began."""


class Line(NamedTuple):
    """`fixed + slope * tokens`, in CPU seconds."""

    fixed: float
    slope: float
    deviation: float
    """Of the size that is furthest off, as a share of what the line says."""


def fit_line(costs: Sequence[Cost]) -> Line:
    """The line whose relative errors have the least sum of squares."""
    tokens, seconds = (np.array(values, float) for values in list(zip(*costs, strict=True))[:2])
    design = np.stack([1 / seconds, tokens / seconds], 1)
    (fixed, slope), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
    off = seconds / (fixed + slope * tokens) - 1
    return Line(float(fixed), float(slope), float(np.abs(off).max()))


@dataclass(frozen=True)
class Bed:
    """What the stages read."""

    folder: Path
    model: ModelFolder
    corpus: Corpus
    cache: ActivationCache

    def context(self, folder: Path) -> StageContext:
        """Of a stage that writes into a folder."""
        for name in ("out", "progress"):
            (folder / name).mkdir()
        return StageContext(
            folder / "out", folder / "progress", 0, CPU, SilentReporter(), owner="growth"
        )


def ingest(bed: Bed, tokens: int, folder: Path) -> None:
    """Read, compare, tokenise and pack a file of words."""
    config = IngestConfig.model_validate(
        {
            "sources": [{"type": "local", "paths": [str(bed.folder / f"text-{tokens}.jsonl")]}],
            "ood_sources": [],
            "context_length": LENGTH,
            "fractions": {"train": 0.97, "validation": 0.01, "label": 0.01, "test": 0.01},
            "budget_tokens": {"train": tokens, "validation": 0, "label": 0, "test": 0, "ood": 0},
        }
    )
    stage_named("ingest").run(IngestInputs(bed.model), config, bed.context(folder))


def baselines(bed: Bed, tokens: int, folder: Path) -> None:
    """Half of the tokens are fitted on, the other half measured on."""
    config = BaselinesConfig(
        lens_layers=(1, 3), fit_tokens=tokens // 2, validation_tokens=1024,
        eval_tokens=tokens // 2, jacobian_positions=0, num_task_prompts=0,
    )  # fmt: skip
    inputs = TextInputs(bed.model, bed.corpus)
    stage_named("baselines").run(inputs, config, bed.context(folder))


def cache_activations(bed: Bed, tokens: int, folder: Path) -> None:
    """The whole model over the text."""
    config = CacheActivationsConfig.model_validate(
        {
            "hook_layer": HOOK,
            "budget_tokens": {"train": tokens, "validation": 0, "label": 0, "test": 0, "ood": 0},
        }
    )
    inputs = TextInputs(bed.model, bed.corpus)
    stage_named("cache_activations").run(inputs, config, bed.context(folder))


def encoding(bed: Bed, tokens: int, folder: Path) -> None:
    """Encode, write and read back what `label_features` reads its examples from."""
    settings = EncodingSettings.of(
        bed.folder / "sae", bed.cache.folder, "train", max_tokens=tokens, batch_tokens=512
    )
    shards = bed.context(folder).shards
    for _ in shards.results(EncodingWorker, settings, [], "encoded", "encode"):
        pass


def attribution(bed: Bed, tokens: int, folder: Path) -> None:
    """Attribution patching of the decoder's predictions, added up as in `rank_features`."""
    size = SHARD_TOKENS // LENGTH
    settings = AttributionSettings(
        name="test",
        ends=even_ends(tokens // LENGTH, size),
        model=bed.model.model,
        record=ModelFolder.record.path(bed.model.folder),
        sae=bed.folder / "sae",
        decoder=bed.folder / "decoder",
        corpus=bed.corpus.folder,
        config=RankFeaturesConfig(budget_tokens=tokens),
        seed=0,
        skip_first=1,
        domain="test",
        steps={"decoder": None},
    )
    tally = Tally(LATENTS)
    shards = bed.context(folder).shards
    for part in shards.results(AttributionWorker, settings, [], "attributed", "attribute"):
        for sequence in part["decoder"]:
            tally.add(sequence)


def faithfulness(bed: Bed, tokens: int, folder: Path) -> None:
    """Score a decoder beside the frozen model, as `evaluate` does."""
    reader = ActivationReader(bed.cache.folder, "train")
    settings = FaithfulnessSettings(
        name="train",
        ends=batch_ends(reader, tokens),
        model=bed.model.model,
        record=ModelFolder.record.path(bed.model.folder),
        sae=bed.folder / "sae",
        decoders={"decoder": bed.folder / "decoder"},
        cache=bed.cache.folder,
        precision="highest",
    )
    shards = bed.context(folder).shards
    summarise(shards.results(FaithfulnessWorker, settings, [], "scored", "score"), 0)


def streamed_text(bed: Bed, tokens: int, folder: Path) -> None:
    """What PPO replays, from a stream in windows of 8 MB: the frozen model, then the SAE."""
    config = {"shard_tokens": 16_384, "micro_batch_sequences": 8}
    cache = ActivationCache(bed.cache.folder, "0" * 16, {}, config)
    stream = open_stream(
        bed.model, bed.corpus, cache, bed.context(folder), columns=COLUMNS, window_bytes=1 << 23
    )
    with stream as text:
        replay = Replay(text, Sae.load(bed.folder / "sae"), 2048, seed=0)
        for step in range(tokens // 2048):
            replay(step)


STAGES: dict[str, Callable[[Bed, int, Path], None]] = {
    "ingest": ingest,
    "baselines": baselines,
    "cache_activations": cache_activations,
    "label_features: encoding": encoding,
    "rank_features: attribution": attribution,
    "evaluate: faithfulness": faithfulness,
    "train_ppo: streamed text": streamed_text,
}
LARGEST = {"ingest": 10**7, "label_features: encoding": 10**7}
"""Tokens; of the others, which run the frozen model, 10^6."""


def make_bed(folder: Path, sizes: Sequence[int], only: Sequence[str]) -> Bed:
    """The debug run's model, random tokens, and an SAE and a decoder of random weights."""
    config = load_run_config("configs/debug.yaml", [])
    refs, store = plan(config), store_for(config, folder / "store")
    run_stage(config, "sync_tokenizer", refs, store=store, report=SilentReporter(), device="cpu")
    model = _opened(ModelFolder, store.path(refs["sync_tokenizer"]))

    # Tokens: as many as the largest size of the stages that read them.
    read = [size for stage in only if stage != "ingest" for size in _sizes_of(stage, sizes)]
    most = max(read, default=0)
    (folder / "corpus").mkdir()
    generator = np.random.default_rng(0)
    for split, tokens in {"train": most, "validation": 1024, "test": most}.items():
        writer = TokenShardWriter(folder / "corpus", split, 512, 4096)
        rows = generator.integers(1, 512, (tokens // LENGTH, LENGTH))
        writer.add([PackedSequence("random", [0], [0], row) for row in rows])
        writer.close()
    corpus = _opened(Corpus, folder / "corpus")

    if "ingest" in only:
        words = ["".join(random.Random(n).choices("aeioustnrl", k=2 + n % 7)) for n in range(5000)]
        for size in sizes:
            _write_text(folder / f"text-{size}.jsonl", size, words, model)

    # What reads the cache finds one of the largest size.
    bed = Bed(folder, model, corpus, _opened(ActivationCache, folder / "cached" / "out"))
    if any(":" in name for name in only):
        (folder / "cached").mkdir()
        cache_activations(bed, most, folder / "cached")
    lm = FrozenLM.load(model.model, device=CPU, record=ModelFolder.record.path(model.folder))
    sae = Sae.random_init(
        SaeSpec(d_model=lm.d_model, num_latents=LATENTS, k=K, hook_layer=HOOK), seed=0
    )
    sae.save(folder / "sae")
    decoder = new_decoder(lm, sae)
    with torch.no_grad():
        decoder.W.copy_(sae.W_dec)
    save_decoder(decoder, folder / "decoder")
    return bed


def _sizes_of(stage: str, sizes: Sequence[int]) -> list[int]:
    return [size for size in sizes if size <= LARGEST.get(stage, 10**6)]


def _opened(kind: type[Kind], folder: Path) -> Kind:
    return kind(folder=folder, digest="0" * 16, metrics={}, config={})


def _write_text(path: Path, tokens: int, words: Sequence[str], model: ModelFolder) -> None:
    """Documents of random words, enough for a budget."""
    from rldecoder.lm.text_tokens import encode_documents, load_tokenizer

    source = random.Random(tokens)
    per_document = CHARS_PER_DOCUMENT // 6
    sample = [" ".join(source.choices(words, k=per_document)) for _ in range(20)]
    rows = encode_documents(load_tokenizer(model.model), sample)
    count = int(SPARE * tokens / (sum(map(len, rows)) / len(rows))) + 3
    with path.open("w") as file:
        for _ in range(count):
            text = " ".join(source.choices(words, k=per_document))
            file.write(json.dumps({"text": text}) + "\n")


def measure(work: Callable[[], None], tokens: int) -> Cost:
    """Run it in a fork; what that took.

    Raises:
        RuntimeError: it failed there.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            # The peak that the parent reached is not this process's.
            Path("/proc/self/clear_refs").write_text("5")
            before = _high_water()
            work()
            spent = resource.getrusage(resource.RUSAGE_SELF)
            found = spent.ru_utime + spent.ru_stime, _high_water() - before
            os.write(writing, json.dumps(found).encode())
            status = 0
        except Exception:  # told here: this fork must not go on as if it were the parent
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        content = file.read()
    os.waitpid(pid, 0)
    if not content:
        raise RuntimeError("a measurement failed; see above")
    seconds, memory = json.loads(content)
    return Cost(tokens, seconds, memory)


def _high_water() -> int:
    """Most memory that this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10


def draw(found: dict[str, list[Cost]], path: Path) -> None:
    """CPU seconds with their lines, and memory, over tokens."""
    with svg_figure(path, (8, 3.4), font_size=9) as figure:
        left, right = figure.subplots(1, 2)
        for number, (name, costs) in enumerate(found.items()):
            line, colour = fit_line(costs), f"C{number}"
            tokens = np.geomspace(costs[0].tokens, costs[-1].tokens, 50)
            left.plot(tokens, line.fixed + line.slope * tokens, color=colour, linewidth=1)
            xs = [cost.tokens for cost in costs]
            left.plot(xs, [cost.cpu_seconds for cost in costs], "o", color=colour, label=name)
            memory = [cost.memory_bytes / 1e6 for cost in costs]
            right.plot(xs, memory, "o-", color=colour, linewidth=1)
        left.set(xscale="log", yscale="log", xlabel="tokens", ylabel="CPU seconds, one thread")
        right.set(xscale="log", xlabel="tokens", ylabel="peak memory above the start, MB")
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend(fontsize="small")


@app.command()
def main(
    figure: Path,
    sizes: Annotated[str, typer.Option(help="Tokens, by commas.")] = SIZES,
    only: Annotated[str, typer.Option(help="Stages, by commas.")] = ",".join(STAGES),
    repeats: Annotated[int, typer.Option(help="Of each size; the fastest counts.")] = 2,
) -> None:
    """Measure, print a table, draw the figure, and put the numbers beside it as JSON."""
    torch.set_num_threads(1)
    names, asked = only.split(","), sorted(map(int, sizes.split(",")))
    found: dict[str, list[Cost]] = {}
    with tempfile.TemporaryDirectory() as name:
        bed = make_bed(Path(name), asked, names)
        for stage in names:
            for tokens in _sizes_of(stage, asked):
                tries = []
                for _ in range(repeats):
                    with tempfile.TemporaryDirectory(dir=name) as work:
                        run = partial(STAGES[stage], bed, tokens, Path(work))
                        tries.append(measure(run, tokens))
                cost = min(tries, key=lambda one: one.cpu_seconds)
                found.setdefault(stage, []).append(cost)
                console.print(f"{stage}: {cost}")

    table = Table("stage", "tokens", "fixed, s", "s a million", "off by", "memory, MB")
    for stage, costs in found.items():
        line = fit_line(costs)
        table.add_row(
            stage, f"{costs[0].tokens:.0e} to {costs[-1].tokens:.0e}", f"{line.fixed:.2f}",
            f"{line.slope * 1e6:.1f}", f"{line.deviation:.1%}",
            ", ".join(f"{cost.memory_bytes / 1e6:.0f}" for cost in costs),
        )  # fmt: skip
    console.print(table)
    draw(found, figure)
    console.print_json(json.dumps(found))


if __name__ == "__main__":
    app()
