"""Does this tokenizer belong to this model? Hashes of its files, and a proof by use."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from rldecoder.config.base import hash_json
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.user_cache import sha256_file
from rldecoder.schemas import JsonRecord, Scalar

PROBES: tuple[str, ...] = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 3.14159, isn't it? (Yes -- 100%!) \"quoted\" & <b>tagged</b>",
    "def f(x):\n\treturn {'a': [x ** 2, None]}  # comment\n",
    "  two leading spaces,   three inside, trailing tab\t",
    "line one\nline two\r\n\n\nline six",
    "naïve café, Ünïcödé, ὦ ἄνδρες, Москва, 東京, العربية, हिन्दी",
    "combining: e\u0301 a\u0308 n\u0303; precomposed: é ä ñ",
    "emoji: 🙂 👩🏽‍🚀 🇪🇺 ☺️",
    "zero\u200bwidth, non\u00a0breaking, bidi \u202eabc\u202c, \ufeffbom",
    "12345 67890 1e-7 0xFF 1,234,567",
    " ",
    "\n",
)
"""Texts that a lossless tokenizer returns unchanged, but for their Unicode normal form."""

# What a model under a wrong token table finds as surprising as noise, and under its own does not.
_ENGLISH = (
    "The city grew quickly after the railway arrived. By the end of the century more than forty "
    "thousand people lived there, and most of them worked in the mills along the river."
)


class Probe(JsonRecord):
    """One text, encoded and decoded."""

    text: str
    """As it was given."""
    num_tokens: int
    """How many it became."""
    decoded: str
    """What they spell."""
    lossless: bool
    """Whether it came back; a letter and its accent may have become one code point."""


class ParityRecord(JsonRecord):
    """What the checks found; `require_parity` decides."""

    tokenizer_size: int
    """Tokens in the tokenizer, added ones included."""
    highest_token_id: int
    """-1 where there is no token."""
    embedding_rows: int
    """Of the model."""
    padding_rows: int
    """Embedding rows that no token uses."""
    special_tokens: dict[str, int | None]
    """Ids of eos, bos, pad and unk."""
    model_special_tokens: dict[str, list[int]]
    """Ids that the model's own config names, for comparison."""
    probes: tuple[Probe, ...]
    """Texts that were encoded and decoded."""
    english_cross_entropy: float
    """Nats per token of the model on plain English; a wrong token table makes it large."""
    uniform_cross_entropy: float
    """ln(vocabulary): what guessing costs."""
    problems: tuple[str, ...]
    """What proves that the tokenizer does not fit, apart from the probes."""
    remarks: tuple[str, ...]
    """What is unusual and no proof."""

    @property
    def reads_english(self) -> bool:
        """Whether the model finds English less surprising than noise."""
        return self.english_cross_entropy < self.uniform_cross_entropy

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return {
            "probes_lossless": sum(probe.lossless for probe in self.probes),
            "probes": len(self.probes),
            "english_cross_entropy": self.english_cross_entropy,
        }


def check_parity(lm: FrozenLM, extra_probes: Sequence[str] = ()) -> ParityRecord:
    """Encode and decode probe texts, compare sizes and special tokens, and read English."""
    tokenizer = lm.tokenizer
    problems: list[str] = []
    remarks: list[str] = []

    token_ids = list(tokenizer.get_vocab().values())
    highest = max(token_ids, default=-1)
    if highest >= lm.vocab_size:
        problems.append(
            f"token id {highest} has no row in the model's {lm.vocab_size} embedding rows"
        )

    special = {
        name: getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad", "unk")
    }
    if special["eos"] is None:
        problems.append("the tokenizer has no end-of-text token")
    named = _model_special_tokens(lm)
    for name, ids in named.items():
        if ids and special[name] is not None and special[name] not in ids:
            remarks.append(
                f"the tokenizer's {name} token is {special[name]}, the model's config says {ids}"
            )

    probes = tuple(_probe(tokenizer, text) for text in (*PROBES, *extra_probes))
    if any(probe.lossless and probe.decoded != probe.text for probe in probes):
        remarks.append("the tokenizer brings text to a Unicode normal form before it reads it")

    # An id without a row cannot be read at all; that counts as guessing, and is a problem above.
    uniform = math.log(lm.vocab_size)
    cross_entropy = math.inf if highest >= lm.vocab_size else _english_cross_entropy(lm)
    if not math.isfinite(cross_entropy):
        cross_entropy = uniform

    return ParityRecord(
        tokenizer_size=len(token_ids),
        highest_token_id=highest,
        embedding_rows=lm.vocab_size,
        padding_rows=max(0, lm.vocab_size - len(set(token_ids))),
        special_tokens=special,
        model_special_tokens=named,
        probes=probes,
        english_cross_entropy=cross_entropy,
        uniform_cross_entropy=uniform,
        problems=tuple(problems),
        remarks=tuple(remarks),
    )


def require_parity(report: ParityRecord, place: str, *, trained: bool, lossy: bool = False) -> None:
    """Raise if the tokenizer does not fit.

    Args:
        report: what `check_parity` found.
        place: the model, for the message.
        trained: the model is known to read English, so that failing to is a proof too.
        lossy: accept texts that do not come back unchanged.

    Raises:
        BadInputError: the problems, at most three of them.
    """
    problems = list(report.problems)
    if not lossy:
        problems += [
            f"the text {probe.text!r} comes back as {probe.decoded!r}"
            for probe in report.probes
            if not probe.lossless
        ]
    if trained and not report.reads_english:
        problems.append(
            f"plain English costs the model {report.english_cross_entropy:.2f} nats a token, as "
            f"bad as guessing ({report.uniform_cross_entropy:.2f})"
        )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise BadInputError(
            f"The tokenizer does not fit the model {place}.",
            "Found: " + "; ".join(problems[:3]) + more + ".",
            "Take the tokenizer files that were published with the weights; if only the round "
            "trip fails and you accept it, set `sync_tokenizer.allow_lossy_tokenizer: true`.",
        )


class FileHash(JsonRecord):
    """A file of a model and what is known of it."""

    sha256: str
    """Hexadecimal."""
    size_bytes: int
    """Of the file."""
    status: str
    """`matches the published hash`, or `no published hash`. A mismatch raises."""


class TokenizerHashes(JsonRecord):
    """What the tokenizer is known by."""

    files: dict[str, FileHash]
    """Its files, by name."""
    vocabulary_sha256: str
    """Of its token table (see `vocabulary_sha256`)."""


def hash_files(paths: Sequence[Path], known: Mapping[str, str]) -> dict[str, FileHash]:
    """SHA-256 of each file by its name, compared with the published hash of that name.

    Raises:
        DamagedFileError: a file differs from its published hash.
    """
    hashes = {}
    for path in paths:
        digest = sha256_file(path)
        expected = known.get(path.name)
        if expected is not None and digest != expected:
            raise DamagedFileError(
                f"{path.name} has SHA-256 {digest}.",
                f"The published one is {expected}.",
                "The file was damaged or edited: take the published one.",
            )
        status = "no published hash" if expected is None else "matches the published hash"
        hashes[path.name] = FileHash(sha256=digest, size_bytes=path.stat().st_size, status=status)
    return hashes


def vocabulary_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token table (token -> id as canonical JSON), whatever file it came in.

    tokenizer.json changes with the version of the library that writes it; this does not.
    """
    return hash_json(tokenizer.get_vocab())


def require_vocabulary(actual: str, expected: str | None, place: str) -> None:
    """Raise DamagedFileError if a pinned token table differs."""
    if expected is not None and actual != expected:
        raise DamagedFileError(
            f"The token table of {place} has SHA-256 {actual}.",
            f"The spec pins {expected}.",
            "Take the tokenizer that was published with the weights.",
        )


def _probe(tokenizer: PreTrainedTokenizerBase, text: str) -> Probe:
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(decoded, str)
    return Probe(
        text=text,
        num_tokens=len(ids),
        decoded=decoded,
        lossless=_canonical(decoded) == _canonical(text),
    )


def _canonical(text: str) -> str:
    """The text in Unicode's form C, which some tokenizers bring it to (Pythia, Qwen2).

    Texts that differ in nothing else are the same text, written with other code points.
    """
    return unicodedata.normalize("NFC", text)


def _model_special_tokens(lm: FrozenLM) -> dict[str, list[int]]:
    named: dict[str, list[int]] = {}
    for name in ("eos", "bos", "pad"):
        ids: set[int] = set()
        for config in (lm.model.config, lm.model.generation_config):
            value = getattr(config, f"{name}_token_id", None)
            ids |= set(value) if isinstance(value, list) else set() if value is None else {value}
        named[name] = sorted(ids)
    return named


@torch.no_grad()
def _english_cross_entropy(lm: FrozenLM) -> float:
    with quiet_transformers():  # it would warn of a text longer than the context, cut below
        tokens = lm.tokenizer.encode(_ENGLISH, add_special_tokens=False)
    ids = torch.tensor([tokens[: lm.context_length]], device=lm.device)
    if ids.shape[1] < 2:
        return math.inf
    _, final = lm.resid_and_final(ids, 0)
    return F.cross_entropy(lm.unembed(final[0, :-1]), ids[0, 1:]).item()
