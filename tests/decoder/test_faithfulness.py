"""Held-out faithfulness against naive computations."""

from __future__ import annotations

import copy
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationBatch
from rldecoder.decoder import faithfulness, faithfulness_shards
from rldecoder.decoder.faithfulness import (
    TokenScores,
    calibration_gaps,
    decoder_predictor,
    evaluate_faithfulness,
    evaluate_predictors,
    expected_calibration_error,
    lens_predictor,
    summarise,
)
from rldecoder.decoder.faithfulness_shards import (
    FaithfulnessSettings,
    FaithfulnessWorker,
    batch_ends,
)
from rldecoder.decoder.loading import AffineLens, save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import NumericalError
from rldecoder.executors.local import LocalExecutor
from rldecoder.executors.stage_shards import StageShards
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import SilentReporter
from rldecoder.sae.model import Sae


@torch.no_grad()
def test_equals_a_dense_computation(
    decoder: SaeDecoderForCausalLM,
    lm: FrozenLM,
    sae: Sae,
    reader: ActivationReader,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(faithfulness, "chunk_rows", lambda vocab_size: 7)
    found = evaluate_faithfulness(decoder, reader)

    (batch,) = reader.ordered(10_000, columns=("resid", "final_hidden"))
    assert batch.resid is not None
    assert batch.final_hidden is not None
    probs = F.softmax(lm.unembed(decoder.hidden(sae.encode(batch.resid.float()))), -1).double()
    frozen = F.softmax(lm.unembed(batch.final_hidden), -1).double()
    kl = (frozen * (frozen.log() - probs.log())).sum(-1)
    here = list(zip(batch.seq_id.tolist(), batch.pos.tolist(), strict=True))
    token_at = dict(zip(here, batch.token_id.tolist(), strict=True))
    labelled = torch.tensor([(seq, pos + 1) in token_at for seq, pos in here])
    label = torch.tensor([token_at.get((seq, pos + 1), 0) for seq, pos in here])
    rows = torch.arange(len(label))
    assert found.num_tokens == len(label) == 84
    assert found.num_labels == int(labelled.sum()) == 78
    assert found.num_sequences == 6
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.ce == pytest.approx(float(-probs[rows, label].log()[labelled].mean()), rel=1e-4)
    assert found.frozen_ce == pytest.approx(
        float(-frozen[rows, label].log()[labelled].mean()), rel=1e-4
    )
    agree = (probs.argmax(-1) == frozen.argmax(-1)).double().mean()
    assert found.agreement == pytest.approx(float(agree))
    correct = (probs.argmax(-1) == label)[labelled].double()
    assert found.accuracy == pytest.approx(float(correct.mean()))
    confidence = probs.max(-1).values[labelled]
    naive_ece = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
        if inside.any():
            gap = (correct[inside].mean() - confidence[inside].mean()).abs()
            naive_ece += float(gap * inside.sum() / len(confidence))
    assert found.ece == pytest.approx(naive_ece, rel=1e-3)
    assert found.kl_low <= found.kl <= found.kl_high


def test_the_frozen_model_is_faithful_to_itself(lm: FrozenLM, reader: ActivationReader) -> None:
    def perfect(batch: ActivationBatch) -> torch.Tensor:
        assert batch.final_hidden is not None
        return batch.final_hidden.float()

    found = evaluate_predictors({"frozen": perfect}, reader, lm)["frozen"]
    assert found.kl == 0
    assert found.agreement == 1
    assert found.ce == found.frozen_ce
    assert found.accuracy == found.frozen_accuracy


def test_predictors_are_measured_on_the_same_tokens(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, lens: AffineLens, reader: ActivationReader
) -> None:
    both = evaluate_predictors(
        {"decoder": decoder_predictor(decoder), "lens": lens_predictor(*lens)},
        reader,
        lm,
        max_tokens=30,
    )
    assert both["decoder"].num_tokens == both["lens"].num_tokens == 30
    assert both["decoder"].frozen_ce == both["lens"].frozen_ce
    assert both["decoder"] == evaluate_faithfulness(decoder, reader, max_tokens=30)
    assert both["decoder"].kl != both["lens"].kl


def test_shards_say_what_one_pass_says(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, sae: Sae, reader: ActivationReader,
    tiny_lm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit, for batches that end within no sequence but the last."""
    for module in (faithfulness, faithfulness_shards):
        monkeypatch.setattr(module, "BATCH_ROWS", 20)
    sae.save(tmp_path / "sae")
    with torch.no_grad():
        other = {"a": decoder, "b": copy.deepcopy(decoder)}
        other["b"].W.mul_(0.9)
    for name, held in other.items():
        save_decoder(held, tmp_path / name)
    settings = FaithfulnessSettings(
        model=tiny_lm_dir, record=tmp_path / "none", sae=tmp_path / "sae",
        decoders={name: tmp_path / name for name in other}, cache=reader.folder,
        name="test", precision="highest", ends=batch_ends(reader, 70),
    )  # fmt: skip
    assert settings.ends == (15, 30, 45, 60, 70)
    here = StageShards(
        LocalExecutor(), tmp_path, "test/0123", torch.device("cpu"), SilentReporter()
    )
    parts = list(here.results(FaithfulnessWorker, settings, [], "shards", "faithfulness"))
    expected = evaluate_predictors(
        {name: decoder_predictor(held) for name, held in other.items()}, reader, lm,
        max_tokens=70, seed=3,
    )  # fmt: skip
    assert summarise(parts, 3) == expected
    assert expected["a"].kl != expected["b"].kl


def test_nan_is_an_error(decoder: SaeDecoderForCausalLM, reader: ActivationReader) -> None:
    with torch.no_grad():
        decoder.W.fill_(float("nan"))
    with pytest.raises(NumericalError, match="decoder"):
        evaluate_faithfulness(decoder, reader)


def test_one_sequence_has_no_interval(
    decoder: SaeDecoderForCausalLM, reader: ActivationReader
) -> None:
    found = evaluate_faithfulness(decoder, reader, max_tokens=10)
    assert found.num_sequences == 1
    assert found.kl_low == found.kl == found.kl_high


def test_calibration_error_of_known_cases() -> None:
    def error(confidence: list[float], correct: list[float]) -> float:
        gaps = calibration_gaps(np.array(confidence), np.array(correct))
        return expected_calibration_error(gaps, len(correct))

    assert error([1.0] * 4, [1.0, 1.0, 0.0, 0.0]) == 0.5
    assert error([0.5] * 4, [1.0, 0.0, 1.0, 0.0]) == 0
    assert error([], []) == 0


def scored(sequence: list[int], seed: int) -> TokenScores:
    """Tokens of some sequences with random scores."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.random((len(sequence), 7), dtype=np.float32))
    has_label = torch.from_numpy(rng.random(len(sequence)) < 0.8)
    return TokenScores({"one": scores}, has_label, torch.tensor(sequence))


def test_parts_may_end_within_a_sequence() -> None:
    whole = scored([3] * 10 + [5] * 30 + [9] * 20, 0)
    halves = [
        TokenScores({"one": whole.by_predictor["one"][part]}, whole.has_label[part],
                    whole.sequence[part])
        for part in (slice(0, 25), slice(25, 60))
    ]  # fmt: skip
    found, expected = summarise(halves, 1)["one"], summarise([whole], 1)["one"]
    assert found.num_sequences == expected.num_sequences == 3
    for name, value in expected.model_dump().items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


def test_memory_is_that_of_a_part() -> None:
    def peak(parts: int) -> int:
        tracemalloc.start()
        summarise((scored([n] * 2000, n) for n in range(parts)), 0)
        (_, found) = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    peak(2)
    assert peak(60) < 1.5 * peak(4)
