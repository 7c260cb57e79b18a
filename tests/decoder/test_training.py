"""The training step: parts of a batch, epochs over small windows."""

from __future__ import annotations

import pytest
import torch

from rldecoder.config.decoder import DistillConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.decoder import training
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.decoder.training import DecoderTrainer
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae

CONFIG = DistillConfig(
    epochs=1, budget_tokens=None, batch_tokens=64, lr=1e-3, blocks_lr=1e-3,
    matmul_precision="highest",
)  # fmt: skip


@pytest.fixture(scope="module")
def reader(lm: FrozenLM, tmp_path_factory: pytest.TempPathFactory) -> ActivationReader:
    """Six sequences of 16 tokens, one in each shard."""
    folder = tmp_path_factory.mktemp("cache")
    meta = ActivationMeta(
        model_name="tiny", hook_layer=2, num_layers=4, d_model=64, vocab_size=512,
        context_length=16,
    )  # fmt: skip
    ids = torch.randint(512, (6, 16), generator=torch.Generator().manual_seed(0))
    resid, final = (x[:, 1:].flatten(0, 1) for x in lm.resid_and_final(ids, 2))
    with ActivationWriter(folder, "train", meta, 15) as writer:
        for row in range(6):
            mine = slice(15 * row, 15 * row + 15)
            writer.add(
                torch.full((15,), row), torch.arange(1, 16), ids[row, 1:], resid[mine], final[mine]
            )
    return ActivationReader(folder, "train")


def trainer(
    lm: FrozenLM, sae: Sae, reader: ActivationReader, blocks: list[int], config: DistillConfig
) -> DecoderTrainer:
    torch.manual_seed(0)
    decoder = new_decoder(lm, sae, blocks)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)
    return DecoderTrainer(decoder, reader, config, 0)


@pytest.mark.parametrize("blocks", [[], [2, 3]])
def test_parts_of_a_batch_add_up_to_its_step(
    lm: FrozenLM,
    sae: Sae,
    reader: ActivationReader,
    blocks: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = (trainer(lm, sae, reader, blocks, CONFIG) for _ in range(2))
    batch = next(whole.rest_of_epoch())
    expected = whole.step(batch)
    monkeypatch.setattr(training, "PART_TOKENS", 20)
    assert parts.step(batch) == pytest.approx(expected, rel=1e-5)
    pairs = zip(whole.decoder.parameters(), parts.decoder.parameters(), strict=True)
    for one, other in pairs:
        assert one.grad is not None
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_an_epoch_ends_also_where_windows_are_smaller_than_batches(
    lm: FrozenLM, sae: Sae, reader: ActivationReader
) -> None:
    small = ActivationReader(reader.folder, "train", window_bytes=1)
    config = CONFIG.model_copy(update={"epochs": 2})
    found = trainer(lm, sae, small, [3], config)
    assert found.total_steps == 2
    while found.step_done < found.total_steps:
        batches = list(found.rest_of_epoch())
        assert [len(batch.seq_id.unique()) for batch in batches] == [4]
        for batch in batches:
            found.step(batch)
