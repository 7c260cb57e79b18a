"""What `rldecoder init` counts is what `ingest` then finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rldecoder.artifacts.catalogue import Corpus, ModelFolder
from rldecoder.config.data import IngestConfig
from rldecoder.data.counting import count_text
from rldecoder.lm.text_tokens import encode_documents, load_tokenizer
from rldecoder.stages import ingest
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import IngestInputs
from tests.stages.published import published

LENGTH = 32


def settings(folder: Path) -> IngestConfig:
    """Eighty documents of many lengths, one of which is too short; more budget than text."""
    texts = [" ".join(f"{n}word{i}" for i in range(60 + n)) for n in range(80)]
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in [*texts, "short"]))
    return IngestConfig.model_validate(
        {
            "sources": [{"type": "local", "paths": [str(path)]}],
            "context_length": LENGTH,
            "budget_tokens": dict.fromkeys(("train", "validation", "label", "test"), 10**6)
            | {"ood": 0},
            "fractions": {"train": 0.4, "validation": 0.2, "label": 0.2, "test": 0.2},
        }
    )


def test_what_is_counted_is_what_ingest_finds(
    tiny_lm_dir: Path, tmp_path: Path, context: Callable[..., StageContext]
) -> None:
    config, ctx = settings(tmp_path), context(seed=7)
    ingest.run(IngestInputs(published(ModelFolder, tiny_lm_dir.parent)), config, ctx)
    found = published(Corpus, ctx.out).provenance

    tokenizer, asked = load_tokenizer(tiny_lm_dir), list[int]()

    def encode(texts: list[str]) -> list[list[int]]:
        asked.append(len(texts))
        return encode_documents(tokenizer, texts)

    counted = count_text(config.sources, config, 7, encode, most_tokens=10**9)
    assert counted.complete
    assert counted.dropped == {"too_short": 1}
    assert counted.documents == sum(split.documents for split in found.splits.values()) == 80
    assert {name: count // LENGTH * LENGTH for name, count in counted.tokens.items()} == {
        name: split.tokens for name, split in found.splits.items()
    }

    # It ends when it has seen enough, and says that there is more.
    asked.clear()
    some = count_text(config.sources, config, 7, encode, most_tokens=1)
    assert not some.complete
    assert some.documents == sum(asked) < 80
