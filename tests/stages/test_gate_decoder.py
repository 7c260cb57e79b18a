"""The decoder gate: the verdict follows the KL, the report shows every comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rldecoder.artifacts.catalogue import DecoderGate, SupervisedDecoder
from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.decoder import faithfulness, faithfulness_shards
from rldecoder.decoder.faithfulness import Faithfulness
from rldecoder.decoder.gate import HEADLINES, make_report
from rldecoder.decoder.loading import AffineLens, decoder_from_lens, save_decoder
from rldecoder.gates import GateReport
from rldecoder.stages import gate_decoder
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import DecoderGateInputs
from tests.executors.elsewhere import Elsewhere
from tests.stages.decoder_inputs import make_inputs
from tests.stages.published import inputs_in

Contexts = Callable[..., StageContext]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> DecoderGateInputs:
    """The decoder of this artifact differs from its start by a known change of its bias."""
    folder = tmp_path_factory.mktemp("store")
    made = make_inputs(folder, tiny_lm_dir)
    lm, sae = made.model.load(), made.sae.load()
    lens = AffineLens(torch.eye(64), torch.zeros(64))
    decoder = decoder_from_lens(lm, sae, lens)
    with torch.no_grad():
        decoder.b.add_(0.5)
    inputs = inputs_in(DecoderGateInputs, folder)
    save_decoder(decoder, SupervisedDecoder.decoder.path(inputs.supervised.folder))
    lens.save(SupervisedDecoder.lens.path(inputs.supervised.folder))
    return inputs


def test_the_verdict_follows_the_kl(inputs: DecoderGateInputs, context: Contexts) -> None:
    loose, strict = context("loose"), context("strict")
    passed = gate_decoder.run(inputs, GateDecoderConfig(max_kl=1e6), loose)
    failed = gate_decoder.run(inputs, GateDecoderConfig(max_kl=1e-6), strict)
    assert passed.verdict == "pass"
    assert passed.reasons == ()
    assert failed.verdict == "fail"
    assert "not below 1e-06" in failed.reasons[0]
    report = DecoderGate.report.read(strict.out)
    assert report["test_kl"].threshold == 1e-6
    assert report["test_kl"].passed is False
    assert report["test_kl"].target == 1.5, "the plan's target does not follow the config"
    assert passed.metrics["test_kl"] == failed.metrics["test_kl"] == report["test_kl"].value
    assert set(passed.metrics) == set(HEADLINES)


def test_report_compares_trained_untrained_and_lens(
    inputs: DecoderGateInputs, context: Contexts
) -> None:
    ctx = context()
    config = GateDecoderConfig(test_tokens=40, ood_tokens=30, matmul_precision="highest")
    gate_decoder.run(inputs, config, ctx)
    report = DecoderGate.report.read(ctx.out)
    keys = {"value", "target", "met", "unit", "formula"}
    assert all(set(entry) >= keys for entry in report.rows().values())
    assert report["test_num_tokens"].value == 40
    assert report["ood_num_tokens"].value == 30
    kls = {report[f"test{name}_kl"].value for name in ("", "_untrained", "_residual_lens")}
    assert len(kls) == 3
    assert report["test_kl_gained_by_training"].value == pytest.approx(
        report["test_untrained_kl"].value - report["test_kl"].value
    )
    assert report["test_frozen_ce"].value == report["test_untrained_frozen_ce"].value


def test_workers_elsewhere_measure_the_same(
    inputs: DecoderGateInputs, context: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte, of several batches."""
    for module in (faithfulness, faithfulness_shards):
        monkeypatch.setattr(module, "BATCH_ROWS", 20)
    config = GateDecoderConfig(max_kl=1e6, test_tokens=70, ood_tokens=40)
    here, there = context("here"), replace(context("there"), executor=Elsewhere())
    expected = gate_decoder.run(inputs, config, here)
    assert gate_decoder.run(inputs, config, there) == expected
    bytes_here, bytes_there = (
        DecoderGate.report.path(ctx.out).read_bytes() for ctx in (here, there)
    )
    assert bytes_there == bytes_here
    shards = (there.progress / "faithfulness").glob("*.safetensors")
    assert sorted(path.name for path in shards) == [
        *(f"ood-{number:05d}.safetensors" for number in range(3)),
        *(f"test-{number:05d}.safetensors" for number in range(5)),
    ]


def scores(**change: float) -> Faithfulness:
    plain = Faithfulness(
        kl=1.0,
        kl_low=0.9,
        kl_high=1.1,
        ce=3.0,
        frozen_ce=2.0,
        accuracy=0.5,
        frozen_accuracy=0.6,
        agreement=0.8,
        ece=0.1,
        num_tokens=10,
        num_labels=9,
        num_sequences=2,
    )
    return plain.model_copy(update=change)


def report_of(test: Faithfulness, ood: Faithfulness) -> GateReport:
    found = {
        split: {"decoder": decoder, "untrained": scores(kl=2.0), "residual_lens": scores(kl=0.7)}
        for split, decoder in (("test", test), ("ood", ood))
    }
    return make_report(found, GateDecoderConfig())


def test_targets_met_and_missed() -> None:
    good = report_of(scores(), scores(agreement=0.65, accuracy=0.41))
    assert [good[name].met for name in ("test_kl", "test_agreement")] == [True, True]
    assert good["ood_agreement_ratio"].value == pytest.approx(0.65 / 0.8)
    assert good["ood_agreement_ratio"].met is True
    assert good["ood_accuracy_ratio"].met is True
    bad = report_of(scores(kl=1.5, agreement=0.75), scores(agreement=0.6, accuracy=0.4))
    assert [bad[name].met for name in ("test_kl", "test_agreement")] == [False, False]
    assert bad["ood_agreement_ratio"].met is False
    assert bad["ood_accuracy_ratio"].met is False


def test_a_ratio_to_zero_is_unknown_not_infinite() -> None:
    report = report_of(scores(accuracy=0.0), scores(accuracy=0.0))
    assert report["ood_accuracy_ratio"].value is None
    assert report["ood_accuracy_ratio"].met is None
