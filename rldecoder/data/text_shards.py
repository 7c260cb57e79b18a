"""Texts made ready for packing, in shards that any worker computes: tokens and fingerprints.

Which text is packed hangs on those before it: whether its split has room, whether another split
has the same text. What costs time does not. So the stage reads a window of texts ahead, workers
tokenise and fingerprint it, and the stage takes them one by one. Texts of a window that turn out
to have no room are made ready for nothing, at most one window of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rldecoder import files
from rldecoder.data.deduplicate import Fingerprint, fingerprint
from rldecoder.executors.jobs import ShardFile, ShardSettings, TensorWorker, as_tensor, as_text
from rldecoder.executors.stage_shards import OpenShards, StageShards
from rldecoder.lm.text_tokens import encode_documents, load_tokenizer
from rldecoder.reporting import Advance, SilentBar

SHARD_TEXTS = 64
"""Texts a shard."""
VOLUME_SHARDS = 1024
"""Shards of a job; there is another one where the text does not end with it."""
WINDOW_SHARDS = 16
"""Shards that the workers of a cluster are given at once; one process goes shard by shard."""


class ReadyText(NamedTuple):
    """What packing needs to know of a text."""

    token_ids: list[int]
    fingerprint: Fingerprint


class HasText(Protocol):
    """Whatever is read ahead."""

    @property
    def text(self) -> str:
        """Clean, and cut to length."""
        ...


Item = TypeVar("Item", bound=HasText)


class TextSettings(ShardSettings):
    """Which tokenizer, and where the texts are."""

    model: Path
    record: Path
    texts: Path
    """Folder in which each shard's texts lie before it is asked for (`text_file`)."""

    def shards(self) -> list[ShardFile]:
        """See `ShardSettings.shards`."""
        return [
            ShardFile(f"ready-{number:05d}.safetensors", SHARD_TEXTS)
            for number in range(VOLUME_SHARDS)
        ]

    def text_file(self, number: int) -> Path:
        """JSON, a list of texts."""
        return self.texts / f"texts-{number:05d}.json"


class ReadyTexts(NamedTuple):
    """A shard."""

    sha256: str
    """Of the file of its texts."""
    texts: list[ReadyText]


class TextWorker(TensorWorker[TextSettings, ReadyTexts]):
    """The tokenizer."""

    settings_type = TextSettings
    unit = "texts"

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.settings.model, self.settings.record)

    def compute(self, number: int, advance: Advance) -> ReadyTexts:
        """Tokens and fingerprints of a shard's texts."""
        content = files.read_regular(self.settings.text_file(number))
        texts = json.loads(content)
        encoded = encode_documents(self._tokenizer, texts)
        ready = [
            ReadyText(token_ids, fingerprint(text))
            for text, token_ids in zip(texts, encoded, strict=True)
        ]
        return ReadyTexts(hashlib.sha256(content).hexdigest(), ready)

    @classmethod
    def pack(cls, result: ReadyTexts) -> Mapping[str, Tensor]:
        """All tokens, how many each text has, and the parts of the fingerprints."""
        ids = [token for text in result.texts for token in text.token_ids]
        words = [list(text.fingerprint.words) for text in result.texts]
        signatures = [text.fingerprint.signature.astype(np.int64) for text in result.texts]
        return {
            "sha256": as_tensor(result.sha256),
            "token_ids": torch.tensor(ids, dtype=torch.int32),
            "sizes": torch.tensor([len(text.token_ids) for text in result.texts]),
            "words": torch.tensor(words, dtype=torch.uint8),
            "signatures": torch.from_numpy(np.stack(signatures)),
        }

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor]) -> ReadyTexts:
        """See `TensorWorker.unpack`."""
        rows = zip(
            tensors["token_ids"].split(tensors["sizes"].tolist()),
            tensors["words"].tolist(),
            tensors["signatures"].numpy(),
            strict=True,
        )
        ready = [
            ReadyText(ids.tolist(), Fingerprint(bytes(words), signature))
            for ids, words, signature in rows
        ]
        return ReadyTexts(as_text(tensors["sha256"]), ready)


class ReadAhead:
    """Makes texts ready, a window at a time.

    Args:
        shards: of the stage.
        model: folder of the tokenizer; `record` is that of its record.
        reads: folders of artifacts that hold them.
    """

    def __init__(
        self, shards: StageShards, model: Path, record: Path, reads: Sequence[Path]
    ) -> None:
        self._shards, self._reads = shards, reads
        self._model, self._record = model.absolute(), record.absolute()
        self._window = SHARD_TEXTS * (1 if shards.executor.is_here else WINDOW_SHARDS)
        self._volumes = count()

    def __call__(self, items: Iterator[Item]) -> Iterator[tuple[Item, ReadyText]]:
        """The items with what was made of their texts, in order."""
        while window := list(islice(items, self._window)):
            part = f"texts-{next(self._volumes):04d}"
            settings = TextSettings(
                model=self._model,
                record=self._record,
                texts=(self._shards.folder / part).absolute(),
            )
            with self._shards.opened(TextWorker, settings, self._reads, part) as shards:
                # A window of a cluster is a whole number of shards, of which a volume has as many.
                for first in range(0, VOLUME_SHARDS, self._window // SHARD_TEXTS):
                    yield from zip(window, _made(shards, settings, first, window), strict=True)
                    if first + self._window // SHARD_TEXTS < VOLUME_SHARDS:
                        window = list(islice(items, self._window))
                    if not window:
                        return


def _made(
    shards: OpenShards[ReadyTexts], settings: TextSettings, first: int, window: Sequence[HasText]
) -> Iterator[ReadyText]:
    """What workers make of the texts of a window, whose first shard has this number."""
    written: dict[int, str] = {}
    for number, start in enumerate(range(0, len(window), SHARD_TEXTS), start=first):
        texts = [item.text for item in window[start : start + SHARD_TEXTS]]
        content = json.dumps(texts).encode()
        written[number] = hashlib.sha256(content).hexdigest()
        files.write_bytes(settings.text_file(number), content)

    shards.finish([*written], SilentBar())
    # A source without a fixed revision may give a rerun other texts than those taken up.
    stale = [number for number, sha256 in written.items() if shards.read(number).sha256 != sha256]
    shards.crew.run(stale, SilentBar())
    for number in written:
        yield from shards.read(number).texts
