"""Decoder gate: is the supervised decoder faithful on text that no training saw?

Measured on the same tokens beside it: the affine lens on the raw residual (what an affine map
can read when no SAE stands between) and the decoder before training (the same lens on the
SAE's reconstruction). The KL on the test split alone decides; everything is published.
"""

from __future__ import annotations

from rldecoder.artifacts.catalogue import DecoderGate, ModelFolder
from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.decoder.faithfulness import Faithfulness, summarise
from rldecoder.decoder.faithfulness_shards import (
    FaithfulnessSettings,
    FaithfulnessWorker,
    Opened,
    batch_ends,
)
from rldecoder.decoder.gate import DECODER, HEADLINES, make_report
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import DecoderGateInputs


def run(inputs: DecoderGateInputs, config: GateDecoderConfig, ctx: StageContext) -> Output:
    """Measure, publish the report, and give the verdict."""
    seed_everything(ctx.seed)

    # The out-of-domain split is shown beside the test split; only the latter decides.
    found: dict[str, dict[str, Faithfulness]] = {}
    opened: Opened | None = None
    for split, max_tokens in (("test", config.test_tokens), ("ood", config.ood_tokens)):
        settings = FaithfulnessSettings(
            model=inputs.model.model.absolute(),
            record=ModelFolder.record.path(inputs.model.folder).absolute(),
            sae=inputs.sae.sae.absolute(),
            decoders={DECODER: inputs.supervised.decoder.absolute()},
            lens=inputs.supervised.lens.absolute(),
            cache=inputs.cache.folder.absolute(),
            name=split,
            precision=config.matmul_precision,
            ends=batch_ends(inputs.cache.reader(split), max_tokens),
        )
        # One process loads the models once for both.
        if ctx.executor.is_here:
            opened = opened or settings.open(ctx.device)
        scores = ctx.shards.results(
            FaithfulnessWorker, settings, [artifact.folder for artifact in inputs], "faithfulness",
            f"faithfulness on {split}",
            here=opened and FaithfulnessWorker(settings, ctx.device, ctx.report.note, opened),
        )  # fmt: skip
        found[split] = summarise(scores, derive_seed(ctx.seed, "bootstrap"))
        ctx.report.note(f"{split}: KL {found[split][DECODER].kl:.3f} nats/token")

    report = make_report(found, config)
    DecoderGate.report.save(ctx.out, report)
    reasons: tuple[str, ...] = ()
    if not report["test_kl"].passed:
        reasons = (
            f"KL(frozen || decoder) on test is {report['test_kl'].value:.3f} nats/token, "
            f"not below {config.max_kl:g}.",
        )
    return Output(report.headline(HEADLINES), "fail" if reasons else "pass", reasons)
