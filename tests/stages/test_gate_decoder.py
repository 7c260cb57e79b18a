"""The decoder gate: the verdict follows the KL, the report shows every comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.decoder.faithfulness import Faithfulness
from rldecoder.decoder.loading import AffineLens, decoder_from_lens, save_decoder
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.schemas import read_json
from rldecoder.stages import gate_decoder
from rldecoder.stages.context import InputArtifact, StageContext
from rldecoder.stages.gate_decoder import HEADLINES, make_report
from tests.stages.decoder_inputs import artifact, make_inputs

Contexts = Callable[..., StageContext]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> dict[str, InputArtifact]:
    """The decoder of this artifact differs from its start by a known change of its bias."""
    folder = tmp_path_factory.mktemp("store")
    found = make_inputs(folder, tiny_lm_dir)
    lm = FrozenLM.load(found["sync_tokenizer"].path / "model")
    sae = Sae.load(found["train_sae"].path / "sae")
    lens = AffineLens(torch.eye(64), torch.zeros(64))
    decoder = decoder_from_lens(lm, sae, lens)
    with torch.no_grad():
        decoder.b.add_(0.5)
    save_decoder(decoder, folder / "train_decoder" / "decoder")
    save_file(lens._asdict(), folder / "train_decoder" / "affine_lens.safetensors")
    return {**found, "train_decoder": artifact(folder, "train_decoder")}


def test_the_verdict_follows_the_kl(inputs: dict[str, InputArtifact], context: Contexts) -> None:
    loose, strict = context("loose"), context("strict")
    passed = gate_decoder.run(inputs, GateDecoderConfig(max_kl=1e6), loose)
    failed = gate_decoder.run(inputs, GateDecoderConfig(max_kl=1e-6), strict)
    assert passed.verdict == "pass"
    assert passed.reasons == ()
    assert failed.verdict == "fail"
    assert "not below 1e-06" in failed.reasons[0]
    report = read_json(strict.out / "report.json")
    assert report["test_kl"]["threshold"] == 1e-6
    assert report["test_kl"]["passed"] is False
    assert report["test_kl"]["target"] == 1.5, "the plan's target does not follow the config"
    assert passed.metrics["test_kl"] == failed.metrics["test_kl"] == report["test_kl"]["value"]
    assert set(passed.metrics) == set(HEADLINES)


def test_report_compares_trained_untrained_and_lens(
    inputs: dict[str, InputArtifact], context: Contexts
) -> None:
    ctx = context()
    config = GateDecoderConfig(test_tokens=40, ood_tokens=30, matmul_precision="highest")
    gate_decoder.run(inputs, config, ctx)
    report = read_json(ctx.out / "report.json")
    keys = {"value", "target", "met", "unit", "formula"}
    assert all(set(entry) >= keys for entry in report.values())
    assert report["test_num_tokens"]["value"] == 40
    assert report["ood_num_tokens"]["value"] == 30
    kls = {report[f"test{name}_kl"]["value"] for name in ("", "_untrained", "_residual_lens")}
    assert len(kls) == 3
    assert report["test_kl_gained_by_training"]["value"] == pytest.approx(
        report["test_untrained_kl"]["value"] - report["test_kl"]["value"]
    )
    assert report["test_frozen_ce"] | {"formula": ""} == report["test_untrained_frozen_ce"] | {
        "formula": ""
    }


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


def report_of(test: Faithfulness, ood: Faithfulness) -> dict[str, dict[str, object]]:
    found = {
        split: {"decoder": decoder, "untrained": scores(kl=2.0), "residual_lens": scores(kl=0.7)}
        for split, decoder in (("test", test), ("ood", ood))
    }
    return make_report(found, GateDecoderConfig())


def test_targets_met_and_missed() -> None:
    good = report_of(scores(), scores(agreement=0.65, accuracy=0.41))
    assert [good[name]["met"] for name in ("test_kl", "test_agreement")] == [True, True]
    assert good["ood_agreement_ratio"]["value"] == pytest.approx(0.65 / 0.8)
    assert good["ood_agreement_ratio"]["met"] is True
    assert good["ood_accuracy_ratio"]["met"] is True
    bad = report_of(scores(kl=1.5, agreement=0.75), scores(agreement=0.6, accuracy=0.4))
    assert [bad[name]["met"] for name in ("test_kl", "test_agreement")] == [False, False]
    assert bad["ood_agreement_ratio"]["met"] is False
    assert bad["ood_accuracy_ratio"]["met"] is False


def test_a_ratio_to_zero_is_unknown_not_infinite() -> None:
    report = report_of(scores(accuracy=0.0), scores(accuracy=0.0))
    assert report["ood_accuracy_ratio"]["value"] is None
    assert report["ood_accuracy_ratio"]["met"] is None
