"""Stage train_explainer: Method B learns from exact patches and is tested on held-out text.

Fit on the `label` split and on training prompts; evaluated on the `test` split and on test
prompts. Publishes the explainer, its pairs, `evaluation.json` and example explanations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from rldecoder import schemas
from rldecoder.config.explain import TrainExplainerConfig
from rldecoder.curves import Curves
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.loading import load_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.errors import NumericalError
from rldecoder.evals.prompts import TASKS, make_prompts
from rldecoder.explain.evaluation import evaluate_claims, evaluate_reconstruction
from rldecoder.explain.explainer import Explainer, ExplainerSpec, Slots, losses, make_slots
from rldecoder.explain.inputs import read_importance, read_labels
from rldecoder.explain.pairs import (
    Pairs,
    Positions,
    join_positions,
    make_pairs,
    positions_from_cache,
    positions_from_prompts,
    write_pairs,
)
from rldecoder.explain.patching import Candidates
from rldecoder.explain.ranking import activation_scales
from rldecoder.explain.session import Explanation, Session
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.seeds import derive_seed, torch_generator
from rldecoder.stages.context import InputArtifact, StageContext, StageOutput

TOKENS_PER_BATCH = 4096
LOG_EVERY = 10
# Fewer than the smallest task has: test prompts never repeat.
MAX_TEST_PROMPTS = 48


def run(
    inputs: Mapping[str, InputArtifact], config: TrainExplainerConfig, ctx: StageContext
) -> StageOutput:
    """Make pairs, train, evaluate, explain examples."""
    lm = FrozenLM.load(inputs["sync_tokenizer"].path / "model", device=ctx.device)
    sae = Sae.load(inputs["train_sae"].path / "sae", device=ctx.device)
    decoder = load_decoder(inputs["freeze_decoder"].path / "decoder", lm, sae)
    cache = inputs["cache_activations"].path
    train = _make(decoder, cache, config, ctx, "train")
    test = _make(decoder, cache, config, ctx, "test")
    write_pairs(ctx.out / "pairs.parquet", train)

    explainer = _new_explainer(decoder, train, config, ctx)
    explainer.scales.copy_(_scales(sae, cache, config))
    explainer.importance.copy_(
        read_importance(inputs["rank_features"].path / "importance.parquet", sae.spec.num_latents)
    )
    curves = _train(explainer, decoder, train, config, ctx)
    curves.write(ctx.out / "curves.parquet")
    explainer.eval().requires_grad_(False)
    explainer.save(ctx.out)

    evaluation = _evaluate(explainer, decoder, train, test, config, ctx)
    labels = read_labels(inputs["label_features"].path)
    session = Session(lm, sae, decoder, labels, explainer)
    examples = _examples(session, cache, config, ctx)
    evaluation["frozen_model"] = _frozen_agreement(examples)
    schemas.write_json(ctx.out / "evaluation.json", evaluation)
    schemas.write_json(ctx.out / "examples.json", [example.to_json() for example in examples])
    return _output(evaluation, explainer)


def _make(
    decoder: SaeDecoderForCausalLM,
    cache: Path,
    config: TrainExplainerConfig,
    ctx: StageContext,
    split: Literal["train", "test"],
) -> Pairs:
    """Positions of cached text and of task prompts, with their exact patches."""
    count = config.num_pairs if split == "train" else config.num_test_positions
    reader = ActivationReader(cache, "label" if split == "train" else "test")
    num_prompts = math.ceil(count * config.task_share / len(TASKS))
    if split == "test":
        num_prompts = min(num_prompts, MAX_TEST_PROMPTS)
    seed = derive_seed(ctx.seed, "positions", split)
    parts: list[Positions] = []
    if count > num_prompts * len(TASKS):
        parts.append(positions_from_cache(reader, decoder, count - num_prompts * len(TASKS), seed))
    for task in TASKS if num_prompts else ():
        prompts = [prompt.prompt for prompt in make_prompts(task, split, num_prompts, seed)]
        parts.append(positions_from_prompts(decoder, prompts, task))
    positions = join_positions(parts)
    with ctx.report.track(f"patches ({split})", len(positions.source), "positions") as bar:
        pairs = make_pairs(
            decoder,
            positions,
            max_candidates=config.max_candidates,
            interventions=config.interventions_per_position,
            generator=torch_generator(ctx.seed, "removals", split),
        )
        bar.advance(len(positions.source))
    return pairs


@torch.no_grad()
def _scales(sae: Sae, cache: Path, config: TrainExplainerConfig) -> torch.Tensor:
    """Each latent's usual high on the label split."""
    indices, acts = [], []
    reader = ActivationReader(cache, "label")
    for batch in reader.ordered(TOKENS_PER_BATCH, max_tokens=config.scale_tokens):
        assert batch.resid is not None
        latents = sae.encode(batch.resid.to(sae.W_enc.device).float())
        indices.append(latents.indices.flatten().cpu())
        acts.append(latents.acts.flatten().cpu())
    return activation_scales(torch.cat(indices), torch.cat(acts), sae.spec.num_latents)


def _new_explainer(
    decoder: SaeDecoderForCausalLM, train: Pairs, config: TrainExplainerConfig, ctx: StageContext
) -> Explainer:
    active = train.candidates.acts > 0
    unit = float(train.measured.single[active].square().mean().sqrt()) if active.any() else 0.0
    spec = ExplainerSpec(
        d_model=decoder.config.d_model,
        num_latents=decoder.config.num_latents,
        max_candidates=config.max_candidates,
        max_claims=config.max_claims,
        width=config.width,
        num_layers=config.num_layers,
        effect_unit=max(unit, 1e-6),
        min_effect=config.min_effect,
    )
    return Explainer(spec).to(ctx.device)


def _train(
    explainer: Explainer,
    decoder: SaeDecoderForCausalLM,
    train: Pairs,
    config: TrainExplainerConfig,
    ctx: StageContext,
) -> Curves:
    optimizer = torch.optim.AdamW(
        explainer.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    warmup_steps = max(1, config.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup_steps)
            * (0.5 + 0.5 * math.cos(math.pi * step / config.steps))
        ),
    )
    order = torch_generator(ctx.seed, "batches")
    curves = Curves()
    with ctx.report.track("explainer", config.steps, "steps") as bar:
        for step in range(1, config.steps + 1):
            rows = torch.randint(
                len(train.positions.source), (config.batch_size,), generator=order
            ).to(ctx.device)
            candidates = Candidates(*(column[rows] for column in train.candidates))
            slots = make_slots(explainer, decoder, candidates)
            parts = losses(
                explainer,
                slots,
                candidates.logprobs,
                train.measured.single[rows],
                train.removals[rows],
                train.measured.joint[rows],
            )
            loss = (
                parts.pointer
                + config.effect_weight * parts.effect
                + config.reconstruction_weight * parts.reconstruction
                + config.length_weight * parts.length
            )
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    f"The explainer's loss is {float(loss)} at step {step}.",
                    "Training diverged.",
                    "Lower `train_explainer.lr`.",
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(explainer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % LOG_EVERY == 0 or step == config.steps:
                values = {"loss": float(loss.detach())} | {
                    name: float(value.detach()) for name, value in parts._asdict().items()
                }
                curves.log(step, **values)
                ctx.report.metrics("train_explainer", step, values)
            bar.advance(1, f"loss {float(loss.detach()):.3f}")
    return curves


@torch.no_grad()
def _evaluate(
    explainer: Explainer,
    decoder: SaeDecoderForCausalLM,
    train: Pairs,
    test: Pairs,
    config: TrainExplainerConfig,
    ctx: StageContext,
) -> dict[str, Any]:
    generator = torch_generator(ctx.seed, "evaluation")
    slots = make_slots(explainer, decoder, test.candidates)
    parts = [
        explainer(Slots(*(column[start : start + 256] for column in slots)))
        for start in range(0, len(slots.mask), 256)
    ]
    pointers = type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))
    found = evaluate_claims(
        decoder,
        explainer,
        train,
        test,
        pointers,
        generator=generator,
        resamples=config.bootstrap_resamples,
        seed=ctx.seed,
    )
    found["reconstruction"] = evaluate_reconstruction(decoder, explainer, test, pointers, generator)
    found["num_pairs"] = len(train.positions.source)
    return found


def _examples(
    session: Session, cache: Path, config: TrainExplainerConfig, ctx: StageContext
) -> list[Explanation]:
    """One prompt a task and the first tokens of some test sequences."""
    seed = derive_seed(ctx.seed, "examples")
    prompts = [make_prompts(task, "test", 1, seed)[0].prompt for task in TASKS]
    prompts += _test_snippets(session, cache, config)
    with ctx.report.track("examples", len(prompts), "prompts") as bar:
        examples = []
        for prompt in prompts:
            examples.append(session.explain(prompt))
            bar.advance()
    return examples


def _test_snippets(session: Session, cache: Path, config: TrainExplainerConfig) -> list[str]:
    reader = ActivationReader(cache, "test")
    snippets: dict[int, list[int]] = {}
    for batch in reader.ordered(TOKENS_PER_BATCH, columns=()):
        for sequence, token in zip(batch.seq_id.tolist(), batch.token_id.tolist(), strict=True):
            if len(snippets.setdefault(sequence, [])) < config.example_tokens:
                snippets[sequence].append(token)
        if len(snippets) > config.num_text_examples:
            break
    tokenizer = session.lm.tokenizer
    rows = list(snippets.values())[: config.num_text_examples]
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]


def _frozen_agreement(examples: list[Explanation]) -> dict[str, Any]:
    """Of the examples' supported claims, how many have the same sign on the frozen model."""
    claims = [
        checked
        for example in examples
        for checked in example.claims
        if checked.verdict == "supported" and checked.frozen_effect is not None
    ]
    same = sum((c.frozen_effect or 0.0) * c.effect > 0 for c in claims)
    return {
        "num_claims": len(claims),
        "same_sign": same / len(claims) if claims else None,
        "note": "claims of the examples that the decoder supports, tested on the frozen model",
    }


def _output(evaluation: dict[str, Any], explainer: Explainer) -> StageOutput:
    methods = evaluation["methods"]
    ours = methods.get("method_b", {})
    removal = evaluation["reconstruction"]["removal"]
    metrics = {
        "claim_precision": ours.get("precision"),
        "claim_precision_method_a": methods.get("method_a", {}).get("precision"),
        "claim_precision_attribution": methods.get("attribution_top_k", {}).get("precision"),
        "abstention": evaluation["abstention"],
        "reconstruction_mae_nats": removal["claims_mae_nats"],
        "strength_mae_nats": ours.get("strength_mae_nats"),
        "num_pairs": evaluation["num_pairs"],
        "num_parameters": sum(parameter.numel() for parameter in explainer.parameters()),
    }
    reasons = () if methods else ("no held-out prediction got any claim",)
    return StageOutput(metrics, reasons=reasons)
