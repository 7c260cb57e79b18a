"""Decoder gate: is the supervised decoder faithful on text that no training saw?

Measured on the same tokens beside it: the affine lens on the raw residual (what an affine map
can read when no SAE stands between) and the decoder before training (the same lens on the
SAE's reconstruction). The KL on the test split alone decides; everything is published.
"""

from __future__ import annotations

from rldecoder.artifacts.catalogue import DecoderGate
from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.decoder.faithfulness import decoder_predictor, evaluate_predictors, lens_predictor
from rldecoder.decoder.gate import HEADLINES, make_report
from rldecoder.decoder.loading import decoder_from_lens
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import DecoderGateInputs


def run(inputs: DecoderGateInputs, config: GateDecoderConfig, ctx: StageContext) -> Output:
    """Measure, publish the report, and give the verdict."""
    seed_everything(ctx.seed)
    sae = inputs.sae.load(ctx.device)
    lm = inputs.model.load(ctx.device)
    lens = inputs.supervised.load_lens(ctx.device)
    predictors = {
        "decoder": decoder_predictor(inputs.supervised.load(lm, sae)),
        "untrained": decoder_predictor(decoder_from_lens(lm, sae, lens)),
        "residual_lens": lens_predictor(lens.A, lens.c),
    }

    # The out-of-domain split is shown beside the test split; only the latter decides.
    found = {}
    for split, max_tokens in (("test", config.test_tokens), ("ood", config.ood_tokens)):
        found[split] = evaluate_predictors(
            predictors,
            inputs.cache.reader(split),
            lm,
            max_tokens=max_tokens,
            seed=derive_seed(ctx.seed, "bootstrap"),
            precision=config.matmul_precision,
        )
        ctx.report.note(f"{split}: KL {found[split]['decoder'].kl:.3f} nats/token")

    report = make_report(found, config)
    DecoderGate.report.save(ctx.out, report)
    reasons: tuple[str, ...] = ()
    if not report["test_kl"].passed:
        reasons = (
            f"KL(frozen || decoder) on test is {report['test_kl'].value:.3f} nats/token, "
            f"not below {config.max_kl:g}.",
        )
    return Output(report.headline(HEADLINES), "fail" if reasons else "pass", reasons)
