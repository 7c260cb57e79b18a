"""Decoder gate: is the supervised decoder faithful on text that no training saw?

Measured on the same tokens beside it: the affine lens on the raw residual (what an affine map
can read when no SAE stands between) and the decoder before training (the same lens on the
SAE's reconstruction). The KL on the test split alone decides; everything is published.
"""

from __future__ import annotations

from collections.abc import Mapping

from rldecoder.artifacts.catalogue import DecoderGate, ModelFolder
from rldecoder.config.decoder import GateDecoderConfig
from rldecoder.decoder.faithfulness import (
    Faithfulness,
    decoder_predictor,
    evaluate_predictors,
    summarise,
)
from rldecoder.decoder.faithfulness_shards import (
    FaithfulnessSettings,
    FaithfulnessWorker,
    batch_ends,
)
from rldecoder.decoder.gate import DECODER, HEADLINES, lens_predictors, make_report
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import DecoderGateInputs


def run(inputs: DecoderGateInputs, config: GateDecoderConfig, ctx: StageContext) -> Output:
    """Measure, publish the report, and give the verdict."""
    seed_everything(ctx.seed)

    # The out-of-domain split is shown beside the test split; only the latter decides.
    splits = {"test": config.test_tokens, "ood": config.ood_tokens}
    measure = _measure_here if ctx.executor.is_here else _measure_elsewhere
    found = measure(inputs, splits, config, ctx)
    for split, scores in found.items():
        ctx.report.note(f"{split}: KL {scores[DECODER].kl:.3f} nats/token")

    report = make_report(found, config)
    DecoderGate.report.save(ctx.out, report)
    reasons: tuple[str, ...] = ()
    if not report["test_kl"].passed:
        reasons = (
            f"KL(frozen || decoder) on test is {report['test_kl'].value:.3f} nats/token, "
            f"not below {config.max_kl:g}.",
        )
    return Output(report.headline(HEADLINES), "fail" if reasons else "pass", reasons)


def _measure_here(
    inputs: DecoderGateInputs,
    splits: Mapping[str, int],
    config: GateDecoderConfig,
    ctx: StageContext,
) -> dict[str, dict[str, Faithfulness]]:
    """Faithfulness by split and predictor; nothing goes through files."""
    lm, sae = inputs.model.load(ctx.device), inputs.sae.load(ctx.device)
    decoder = inputs.supervised.load(lm, sae)
    predictors = {DECODER: decoder_predictor(decoder)}
    predictors |= lens_predictors(lm, sae, inputs.supervised.load_lens(ctx.device))
    return {
        split: evaluate_predictors(
            predictors,
            inputs.cache.reader(split),
            lm,
            max_tokens=max_tokens,
            seed=derive_seed(ctx.seed, "bootstrap"),
            precision=config.matmul_precision,
        )
        for split, max_tokens in splits.items()
    }


def _measure_elsewhere(
    inputs: DecoderGateInputs,
    splits: Mapping[str, int],
    config: GateDecoderConfig,
    ctx: StageContext,
) -> dict[str, dict[str, Faithfulness]]:
    """The same by workers, who read from disk; their scores come back and are summed up."""
    read = [part.folder for part in (inputs.model, inputs.sae, inputs.cache, inputs.supervised)]
    found = {}
    for split, max_tokens in splits.items():
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
        parts = ctx.shards.results(
            FaithfulnessWorker, settings, read, "faithfulness", f"faithfulness on {split}"
        )
        found[split] = summarise(list(parts), derive_seed(ctx.seed, "bootstrap"))
    return found
