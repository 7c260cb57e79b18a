"""A tiny frozen model with SAE and decoder, and a world of planted features."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.interp.corpus import SplitFirings, TokenGrid, read_firings
from rldecoder.interp.importance import PatchBatch, Subject, make_batch
from rldecoder.interp.predicate import (
    Affix,
    And,
    NgramIn,
    Not,
    Or,
    PositionRange,
    Predicate,
    TokenClass,
    TokenIn,
    evaluate,
)
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator

HOOK_LAYER = 2
NUM_LATENTS = 96
POSITIONS = 48


@pytest.fixture(scope="session")
def subject(tiny_lm_dir: Path) -> Subject:
    """Random GPT-2, random TopK SAE (k = 8), random linear decoder."""
    lm = FrozenLM.load(tiny_lm_dir, dtype=torch.float32)
    spec = SaeSpec(d_model=64, num_latents=NUM_LATENTS, k=8, hook_layer=HOOK_LAYER)
    sae = Sae.random_init(spec, seed=1).requires_grad_(False)
    torch.manual_seed(0)
    decoder = new_decoder(lm, sae).requires_grad_(False)
    # The initial scale (0.02) would leave the decoder's distribution nearly flat.
    decoder.W.mul_(10)
    return Subject(lm, sae, decoder)


@pytest.fixture(scope="session")
def subject_with_blocks(subject: Subject) -> Subject:
    """The same model and SAE; a decoder that kept both blocks above the hook layer."""
    decoder = new_decoder(subject.lm, subject.sae, [2, 3])
    decoder.blocks.copy_from(subject.lm.base)
    with torch.no_grad():
        decoder.W.copy_(subject.sae.W_dec)
        # Without a constant, norms would have a pole where integrated gradients begin.
        decoder.b.copy_(torch.randn(decoder.b.shape, generator=torch_generator(6)))
        for bridge in decoder.blocks.maps():
            bridge.weight.add_(0.1 * torch.randn(bridge.weight.shape, generator=torch_generator(5)))
    return Subject(subject.lm, subject.sae, decoder.requires_grad_(False))


@pytest.fixture(scope="session")
def batch(subject: Subject) -> PatchBatch:
    """3 sequences of 14 random tokens; every second position counts."""
    ids = torch.randint(subject.lm.vocab_size, (3, 14), generator=torch_generator(3))
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, 1:-1:2] = True
    return make_batch(subject, ids, mask)


def make_words() -> list[str]:
    """312 different token texts: words with affixes, numbers, punctuation, code, white space."""
    stems = ["walk", "talk", "jump", "look", "turn", "help", "play", "work", "call", "open"]
    endings = ["", "ing", "ed", "er", "s"]
    words = [f" {stem}{ending}" for stem in stems for ending in endings]
    words += [word.capitalize() for word in (w.strip() for w in list(words))]
    words += [f" un{stem}{ending}" for stem in stems for ending in endings]
    words += [str(i) for i in range(40)] + list(".,;:!?'\"-") + list("{}()[]=<>_")
    words += ["\n", "\n\n", " ", "  ", "\t"] + [f" {c}{d}" for c in "bcdfgklm" for d in "aeiou"]
    words += [f"{c}{d}" for c in "bcdfgklm" for d in "aeiou"] + ["é", "ü", " ñandú"]
    words += [" NASA", " UNO", " EU", "USA", "IBM"]
    assert len(set(words)) == len(words)
    return words


PLANTED: tuple[Predicate, ...] = (
    TokenIn(tokens=(3,)),
    TokenIn(tokens=(5, 60, 110)),
    TokenIn(tokens=(7, 8, 9, 120, 130, 140)),
    TokenIn(tokens=(12,), offset=-1),
    TokenIn(tokens=(20, 21, 22), offset=-1),
    TokenIn(tokens=(33,), offset=-2),
    Affix(side="suffix", text="ing"),
    Affix(side="suffix", text="ed"),
    Affix(side="prefix", text="un"),
    Affix(side="prefix", text="walk"),
    Affix(side="suffix", text="er", offset=-1),
    TokenClass(name="number"),
    TokenClass(name="newline"),
    TokenClass(name="code_symbol"),
    TokenClass(name="uppercase"),
    TokenClass(name="non_ascii"),
    TokenClass(name="whitespace", offset=-1),
    TokenClass(name="punctuation", offset=-1),
    PositionRange(low=0, high=3),
    And(parts=(Affix(side="suffix", text="ing"), TokenClass(name="capitalised"))),
    And(parts=(TokenClass(name="number"), TokenClass(name="number", offset=-1))),
    Or(parts=(TokenIn(tokens=(44,)), TokenIn(tokens=(55,), offset=-1))),
    Or(parts=(TokenClass(name="newline"), TokenClass(name="uppercase"))),
    TokenIn(tokens=(70, 71)),
)


class Planted(NamedTuple):
    """Two splits whose latents fire exactly where known predicates hold."""

    vocabulary: Vocabulary
    predicates: tuple[Predicate, ...]
    fit: SplitFirings
    scored: SplitFirings
    sae: Sae
    cache: Path


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """A ReLU SAE with W_enc = 1 on residuals that hold the truth of each predicate."""
    vocabulary = Vocabulary(make_words())
    size = len(PLANTED)
    folder = tmp_path_factory.mktemp("planted")
    meta = ActivationMeta(
        model_name="planted",
        hook_layer=1,
        num_layers=2,
        d_model=size,
        vocab_size=vocabulary.size,
        context_length=POSITIONS,
    )
    sae = Sae(SaeSpec(architecture="relu", d_model=size, num_latents=size, hook_layer=1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(size))
        sae.W_dec.copy_(torch.eye(size))
    splits = {}
    for number, split in enumerate(("label", "test")):
        rng = np.random.default_rng(number)
        rows = 240
        tokens = rng.integers(0, vocabulary.size, (rows, POSITIONS))
        truth = np.stack([evaluate(p, tokens, vocabulary) for p in PLANTED], -1)
        acts = truth * rng.uniform(0.5, 2.0, truth.shape)
        resid = torch.from_numpy(acts).bfloat16()
        with ActivationWriter(folder, split, meta, shard_rows=4000) as writer:
            for row in range(rows):
                writer.add(
                    torch.full((POSITIONS - 1,), row),
                    torch.arange(1, POSITIONS),
                    torch.from_numpy(tokens[row, 1:]),
                    resid[row, 1:],
                    resid[row, 1:],
                )
        grid, firings = read_firings(
            ActivationReader(folder, split), sae, split=split, batch_tokens=1000
        )
        # Every sequence is one document; ids differ between splits.
        docs = np.broadcast_to(np.arange(rows)[:, None] + 1000 * number, tokens.shape).copy()
        full = TokenGrid(split, grid.seq_ids, tokens, grid.valid, docs)
        splits[split] = SplitFirings(full, firings)
    return Planted(vocabulary, PLANTED, splits["label"], splits["test"], sae, folder)


def extra_predicates() -> tuple[Predicate, ...]:
    """Predicates of the kinds that are not planted."""
    return (
        NgramIn(ngrams=((1, 2), (3, 4))),
        NgramIn(ngrams=((1, 2, 3),)),
        Not(part=TokenClass(name="letters")),
    )
