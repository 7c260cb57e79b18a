"""A language whose best possible predictor is known: the decoder must come within 0.02 nats of it.

Each position has one of `STATES` states, shown by one SAE latent. A fair coin that nothing shows
moves the frozen model's hidden state one way or the other; in the second language the state of the
position before moves it too. The vocabulary is smaller than the width, so that any distribution
over it can be expressed: the Bayes-optimal predictor is the mean over the coin.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rldecoder.config.decoder import DistillConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.decoder.faithfulness import evaluate_faithfulness
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.decoder.training import DecoderTrainer
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.seeds import torch_generator

STATES, WIDTH, VOCAB, LENGTH = 16, 32, 12, 17


class Language(NamedTuple):
    """The tables of the language, in the frozen model's final hidden space [., D]."""

    now: Tensor
    before: Tensor
    """What the state of the position before adds; zero in the first language."""
    coin: Tensor
    """[STATES, D], added or taken away."""


def language(strength_before: float) -> Language:
    generator = torch_generator(1, "language")
    now, before, coin = (torch.randn(STATES, WIDTH, generator=generator) for _ in range(3))
    return Language(1.5 * now, strength_before * before, 0.7 * coin)


@pytest.fixture(scope="module")
def lm(tiny_llama_dir: Path) -> FrozenLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    return FrozenLM(model, AutoTokenizer.from_pretrained(tiny_llama_dir), tiny_llama_dir)


@pytest.fixture(scope="module")
def sae() -> Sae:
    """One latent a state: residuals are one-hot."""
    spec = SaeSpec(d_model=WIDTH, num_latents=STATES, k=1, hook_layer=1)
    sae = Sae(spec)
    with torch.no_grad():
        for weight in (sae.b_enc, sae.b_dec):
            weight.zero_()
        sae.W_enc.copy_(torch.eye(WIDTH)[:, :STATES])
        sae.W_dec.copy_(torch.eye(WIDTH)[:STATES])
    return sae


def text(
    folder: Path, split: str, spoken: Language, sequences: int, lm: FrozenLM
) -> tuple[ActivationReader, float]:
    """A cache of the language, and the KL that the best predictor of its hidden states has."""
    generator = torch_generator(2, split)
    states = torch.randint(STATES, (sequences, LENGTH), generator=generator)
    coins = torch.randint(2, (sequences, LENGTH), generator=generator) * 2 - 1
    before = spoken.before[states].roll(1, dims=1)
    before[:, 1] = 0  # position 0 is never cached
    centre = spoken.now[states] + before
    swing = spoken.coin[states]
    final = centre + coins[..., None] * swing
    meta = ActivationMeta(
        model_name="known", hook_layer=1, num_layers=2, d_model=WIDTH, vocab_size=VOCAB,
        context_length=LENGTH,
    )  # fmt: skip
    grid = torch.meshgrid(torch.arange(sequences), torch.arange(1, LENGTH), indexing="ij")
    resid = torch.nn.functional.one_hot(states, WIDTH).float()
    with ActivationWriter(folder, split, meta, sequences * LENGTH) as writer:
        writer.add(
            grid[0].flatten(), grid[1].flatten(), states[:, 1:].flatten() % VOCAB,
            resid[:, 1:].flatten(0, 1), final[:, 1:].flatten(0, 1),
        )  # fmt: skip
    q, heads, tails = (
        lm.unembed(hidden[:, 1:].bfloat16().float()).softmax(-1)
        for hidden in (final, centre + swing, centre - swing)
    )
    best = (heads + tails) / 2
    return ActivationReader(folder, split), float((q * (q / best).log()).sum(-1).mean())


@pytest.mark.parametrize(
    ("blocks", "strength_before", "epochs", "lr"), [([], 0.0, 3, 2e-2), ([1], 1.0, 12, 5e-3)]
)
def test_the_decoder_comes_within_002_nats_of_the_bayes_optimum(
    blocks: list[int],
    strength_before: float,
    epochs: int,
    lr: float,
    lm: FrozenLM,
    sae: Sae,
    tmp_path: Path,
) -> None:
    spoken = language(strength_before)
    train, _ = text(tmp_path, "train", spoken, 2000, lm)
    test, bayes = text(tmp_path, "test", spoken, 200, lm)
    assert bayes > 0.1, "the coin must cost something, or the test says nothing"
    torch.manual_seed(0)
    decoder = new_decoder(lm, sae, blocks)
    start = evaluate_faithfulness(decoder, test).kl
    config = DistillConfig(
        epochs=epochs, budget_tokens=None, batch_tokens=512, lr=lr, blocks_lr=lr, ce_weight=0.0,
        matmul_precision="highest",
    )  # fmt: skip
    trainer = DecoderTrainer(decoder, train, config, seed=0)
    while trainer.step_done < trainer.total_steps:
        for batch in trainer.rest_of_epoch():
            trainer.step(batch)
    found = evaluate_faithfulness(decoder, test)
    assert start > bayes + 0.3
    assert -0.02 < found.kl - bayes < 0.02
