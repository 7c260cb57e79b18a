"""What each stage takes: tokens, FLOPs, bytes on disk, bytes of memory.

FLOPs are those of matrix products (see `sizes`); a backward pass counts as two forward passes.
What hangs on results (dead latents that AuxK revives, long answers, retries) is counted as said
beside it. Disk is what the artifact keeps; scratch is what the stage holds beside it while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rldecoder.config.data import SplitTokens
from rldecoder.config.decoder import DistillConfig
from rldecoder.data.activations import row_bytes
from rldecoder.lm.sinks import SKIP_FIRST
from rldecoder.planning.sizing import (
    BASE_BYTES,
    CHECKPOINTS,
    FLOAT_BYTES,
    PAGE_BYTES,
    PART_TOKENS,
    ROLLOUT_TOKENS,
    Cost,
    Sizing,
    sae_bytes,
    sae_step_flops,
    sequences,
)  # fmt: skip


def stage_cost(name: str, sizing: Sizing) -> Cost:
    """What the stage called `name` takes in this run."""
    return _COSTS[name](sizing)


def _sync_tokenizer(s: Sizing) -> Cost:
    # The tokenizer's table: some 40 bytes an entry.
    table = 40 * s.model.constants.vocab_size
    probes = 4096
    return Cost(
        probes, probes * s.forward, s.model.weight_bytes + table, 0, BASE_BYTES + 2 * s.weights
    )


def _ingest(s: Sizing) -> Cost:
    counts = sequences(s.run.ingest.budget_tokens, s.length)
    tokens = sum(counts.values()) * s.length
    width = 2 if s.model.constants.vocab_size <= 1 << 16 else 4
    # A document of about 400 tokens has a row in the table of documents: 120 bytes there, 450 while
    # all rows are in memory. Tokens are written as they come.
    disk = tokens * width + tokens * 120 // 400
    return Cost(tokens, 0.0, disk, 0, BASE_BYTES + tokens * 450 // 400)


def _baselines(s: Sizing) -> Cost:
    config, c = s.run.baselines, s.model.constants
    layers = range(c.num_layers + 1) if config.lens_layers == "all" else config.lens_layers
    tokens = config.fit_tokens + config.validation_tokens + 2 * config.eval_tokens
    # The affine lens: the normal equations (D^2 a token). The Jacobian lens: D backward passes a
    # position through the blocks above the lowest layer, for their inputs alone (the attention in
    # its short contexts is not counted).
    lenses = 3 if config.jacobian_positions else 2
    fit = len(layers) * config.fit_tokens * 4.0 * s.d_model**2
    above = s.model.blocks_flops(c.num_layers - min(layers, default=0), 1)
    fit += config.jacobian_positions * s.d_model * above

    # Then an unembedding a lens and token measured.
    measured = 2 * config.eval_tokens * len(layers) * lenses * s.model.unembed_flops
    disk = len(layers) * FLOAT_BYTES * ((lenses - 1) * s.d_model**2 + s.d_model) + (1 << 16)
    rows = config.fit_tokens * s.d_model * FLOAT_BYTES * (len(layers) + 1)
    return Cost(tokens, tokens * s.forward + fit + measured, disk, 0, BASE_BYTES + s.weights + rows)


def _sweep_sae(s: Sizing) -> Cost:
    config = s.run.sweep_sae
    if not config.layers:
        return Cost()
    tokens, flops, disk = 0, 0.0, 0
    read = config.train_tokens + config.test_tokens
    for expansion in config.expansions:
        latents = round(expansion * s.d_model)
        for k in config.ks:
            trained = config.training.model_copy(update={"k": k})
            one = config.training.budget_tokens
            tokens += len(config.layers) * one
            flops += len(config.layers) * one * sae_step_flops(trained, s.d_model, latents)
            flops += len(config.layers) * config.splice_sequences * s.length * 2 * s.forward
            disk += len(config.layers) * sae_bytes(s.d_model, latents)
    rows = read * s.d_model * 2 * (len(config.layers) + 1)
    return Cost(
        tokens + read, flops + read * s.forward, disk + (1 << 16), 0, BASE_BYTES + s.weights + rows
    )


def _frontier(s: Sizing) -> Cost:
    config = s.run.frontier
    if not config.depths:
        return Cost()
    decoders = [
        depth
        for depth in config.depths
        for _ in config.layers or s.run.sweep_sae.layers
        for _ in config.ks or s.run.sweep_sae.ks
    ]
    read = config.train_tokens + config.test_tokens
    visits = _distill_tokens(config.training, config.train_tokens)
    flops = read * s.forward
    for depth in decoders:
        one = s.model.blocks_flops(depth, s.length) + s.model.unembed_flops
        flops += visits * (3 * one + s.model.unembed_flops + s.encode) + config.test_tokens * one
    rows = 2 * read * s.d_model * 2 * len(config.layers or s.run.sweep_sae.layers)
    return Cost(
        read + visits * len(decoders), flops, 1 << 16, 0, BASE_BYTES + s.weights + rows + s.logits
    )


def _cache_activations(s: Sizing) -> Cost:
    config = s.run.cache_activations
    # At most what there is: a split's whole sequences, less the first position of each.
    budget, text = config.budget_tokens, s.run.ingest.budget_tokens
    both = SplitTokens(
        **{
            name: min(getattr(budget, name), getattr(text, name))
            for name in SplitTokens.model_fields
        }
    )
    counts = sequences(both, s.length)
    tokens = sum(counts.values()) * s.length
    rows = sum(counts.values()) * (s.length - SKIP_FIRST)
    # Two shards in memory, one of them being written; and one micro-batch of residuals.
    shard = 2 * min(tokens, config.shard_tokens) * row_bytes(s.d_model)
    widest = s.model.constants.d_mlp + 4 * s.d_model
    batch = config.micro_batch_sequences * s.length * widest * FLOAT_BYTES
    return Cost(
        tokens,
        tokens * (s.forward - s.model.unembed_flops),
        rows * row_bytes(s.d_model),
        0,
        BASE_BYTES + s.weights + 2 * shard + batch,
    )


def _train_sae(s: Sizing) -> Cost:
    config = s.run.train_sae
    weights = sae_bytes(s.d_model, s.num_latents)
    if config.pretrained is not None:
        one = config.eval_tokens
        return Cost(one, one * s.encode, weights, 0, BASE_BYTES + 2 * weights)
    visits = config.budget_tokens
    flops = visits * sae_step_flops(config, s.d_model, s.num_latents)
    evaluations = 1 + visits // config.batch_tokens // config.eval_every_steps
    flops += evaluations * config.eval_tokens * s.encode
    memory = BASE_BYTES + 4 * weights + config.window_bytes
    memory += min(PART_TOKENS, config.batch_tokens) * s.num_latents * FLOAT_BYTES
    if config.source == "stream":
        flops += streamed_tokens(s) * s.trunk
        memory += s.weights
    # Weights, their best so far, and two moments of Adam.
    return Cost(visits, flops, weights, CHECKPOINTS * 4 * weights, memory)


def streamed_tokens(s: Sizing) -> int:
    """Tokens that the frozen model is run over while an SAE trains on a stream.

    Each epoch computes them again, unless all rows fit one window.
    """
    config = s.run.train_sae
    text = s.run.ingest.budget_tokens.train
    text = min(text, config.stream_tokens or text) // s.length * s.length
    if text * s.d_model * 2 <= config.window_bytes:
        return text
    return max(text, config.budget_tokens)


def _gate_sae(s: Sizing) -> Cost:
    config = s.run.gate_sae
    tokens = min(config.eval_tokens, s.run.cache_activations.budget_tokens.test)
    spliced = config.splice_sequences * s.length
    flops = tokens * s.encode * (2 if config.random_control else 1) + spliced * (
        2 * s.forward + s.encode
    )
    memory = BASE_BYTES + s.weights + sae_bytes(s.d_model, s.num_latents) + s.logits
    return Cost(tokens + spliced, flops, PAGE_BYTES, 0, memory)


def _train_decoder(s: Sizing) -> Cost:
    config = s.run.train_decoder
    kept = s.run.cache_activations.budget_tokens.train
    visits = _distill_tokens(config, kept)
    measured = config.epochs * (config.validation_tokens + config.ood_tokens)
    # The frozen logits of a cached row are one unembedding; the decoder's are trained.
    step = 3 * s.decode + s.model.unembed_flops + s.encode
    flops = visits * step + measured * (s.decode + s.model.unembed_flops + s.encode)
    lens = FLOAT_BYTES * (s.d_model**2 + s.d_model)
    memory = BASE_BYTES + s.weights + 4 * s.decoder_bytes + s.logits
    memory += sae_bytes(s.d_model, s.num_latents)
    return Cost(
        visits + measured, flops, s.decoder_bytes + lens, CHECKPOINTS * 4 * s.decoder_bytes, memory
    )


def _distill_tokens(config: DistillConfig, kept: int) -> int:
    """Token visits of a distillation."""
    whole = config.epochs * kept
    return whole if config.budget_tokens is None else min(whole, config.budget_tokens)


def _gate_decoder(s: Sizing) -> Cost:
    config = s.run.gate_decoder
    tokens = config.test_tokens + config.ood_tokens
    flops = tokens * (s.decode + s.model.unembed_flops + s.encode)
    return Cost(tokens, flops, PAGE_BYTES, 0, _with_decoder(s))


def _with_decoder(s: Sizing) -> int:
    """Memory of a stage that holds model, SAE and decoder."""
    parts = s.weights + sae_bytes(s.d_model, s.num_latents) + s.decoder_bytes
    return BASE_BYTES + parts + s.logits


def _ppo_training(s: Sizing) -> tuple[int, float]:
    """Tokens and FLOPs of one training."""
    config, ppo = s.run.train_ppo, s.run.train_ppo.ppo
    steps = sum(stage.steps for stage in config.stages)
    sampled = ppo.batch_size * ROLLOUT_TOKENS
    replayed = ppo.inner_epochs * ppo.minibatches * ppo.replay_tokens
    streamed = replay_stream_tokens(s, steps * replayed)
    # Sampling, scoring by the frozen model and the reference; then the inner epochs.
    roll = s.forward + 2 * (s.encode + s.decode)
    learn = 3 * s.decode + s.model.unembed_flops
    flops = steps * (sampled * (roll + ppo.inner_epochs * learn) + replayed * (learn + s.encode))
    flops += streamed * (s.forward - s.model.unembed_flops)
    rounds = 4 + steps // config.eval_every_steps
    tasks = len(config.tasks) + len(config.file_tasks)
    measured = rounds * (config.eval_tokens + config.eval_prompts * tasks * ROLLOUT_TOKENS)
    return steps * (sampled + replayed) + measured, flops + measured * (s.forward + s.decode)


def replay_stream_tokens(s: Sizing, visits: int) -> int:
    """Tokens that the frozen model is run over while a PPO training replays `visits` of a stream.

    Whole windows, a shard at least; a split that fits one is computed once.
    """
    ppo = s.run.train_ppo.ppo
    if ppo.replay_source == "cache" or visits == 0:
        return 0
    rows = ppo.replay_window_bytes // row_bytes(s.d_model)
    window = max(rows, s.run.cache_activations.shard_tokens)
    text = s.run.ingest.budget_tokens.train // s.length * s.length
    return text if text <= window else math.ceil(visits / window) * window


def _train_ppo(s: Sizing) -> Cost:
    config = s.run.train_ppo
    tokens, flops = _ppo_training(s)
    # The published decoder, one after each of three stages, and one a further seed.
    kept = (1 + len(config.stages)) + (config.seeds - 1)
    return Cost(
        config.seeds * tokens,
        config.seeds * flops,
        kept * s.decoder_bytes,
        CHECKPOINTS * 4 * s.decoder_bytes,
        _with_decoder(s) + 4 * s.decoder_bytes,
    )


def _control_ppo(s: Sizing) -> Cost:
    config = s.run.control_ppo
    tokens, flops = _ppo_training(s)
    # A random reward; and, where asked for, the KL loss on text and the losses without a reward.
    trainings = s.run.train_ppo.seeds * (3 if config.supervised_continuation else 1)
    systems = 5 + trainings
    measured = systems * (
        config.test_tokens + config.test_prompts * len(s.run.train_ppo.tasks) * ROLLOUT_TOKENS
    )
    return Cost(
        trainings * tokens + measured,
        trainings * flops + measured * (s.forward + s.decode),
        PAGE_BYTES,
        CHECKPOINTS * 4 * s.decoder_bytes,
        _with_decoder(s) + 4 * s.decoder_bytes,
    )


def _freeze_decoder(s: Sizing) -> Cost:
    return Cost(0, 0.0, s.decoder_bytes, 0, _with_decoder(s))


def _rank_features(s: Sizing) -> Cost:
    config = s.run.rank_features
    texts = [name for name in config.domains if name in SplitTokens.model_fields]
    tasks = len(config.domains) - len(texts)
    tokens = len(texts) * config.budget_tokens + tasks * config.num_prompts * ROLLOUT_TOKENS
    # A forward and a backward pass for attribution, and one more pair for each midpoint.
    passes = 3 * (1 + config.integrated_steps)
    each = {"decoder": s.decode, "frozen": s.tail}
    flops = tokens * s.trunk
    ablated = (config.validation_top + config.validation_others) * config.validation_tokens
    for target in config.targets:
        flops += (tokens * passes + ablated) * each[target]
    rows = s.num_latents * len(config.domains) * len(config.targets)
    memory = (
        _with_decoder(s)
        + 3
        * config.batch_sequences
        * s.length
        * (s.model.constants.num_layers - s.hook + 1)
        * (s.d_model + s.model.constants.d_mlp)
        * FLOAT_BYTES
    )
    return Cost(tokens + ablated * len(config.targets), flops, 40 * rows + (1 << 16), 0, memory)


def _label_features(s: Sizing) -> Cost:
    config, budget = s.run.label_features, s.run.cache_activations.budget_tokens
    examples = min(config.example_tokens or config.fit_tokens, budget.label)
    tokens = examples + min(config.score_tokens, budget.test)
    # The control's own random SAE reads its tokens twice; output labels run the tail.
    control = 2 * config.control_tokens
    # With the latent, without it, without another one; of two kinds of control as of the labels.
    latents = config.num_features + 2 * config.control_features
    places = 4 * config.output_places * latents
    flops = (tokens + control) * s.encode + 3 * places * (s.tail + s.model.unembed_flops)
    windows = config.num_top + config.num_quantile + 2 * config.num_negative
    disk = config.num_features * (windows * config.window_tokens * 6 + 12_000)
    fitted = min(config.fit_tokens, budget.label) * s.run.train_sae.k * 12
    return Cost(tokens + control + places, flops, disk, 0, _with_decoder(s) + fitted)


def _cluster_features(s: Sizing) -> Cost:
    config = s.run.cluster_features
    tokens = min(config.tokens, s.run.cache_activations.budget_tokens.test)
    labelled = s.run.label_features.num_features
    ablated = labelled * config.fingerprint_tokens_per_latent
    flops = tokens * s.encode + 2.0 * labelled**2 * s.d_model + ablated * s.decode
    return Cost(tokens + ablated, flops, PAGE_BYTES, 0, _with_decoder(s))


def _train_explainer(s: Sizing) -> Cost:
    config = s.run.train_explainer
    positions = config.num_pairs + config.num_test_positions
    # Every candidate at a position is ablated: the blocks above the hook layer run again.
    runs = positions * config.max_candidates
    runs += config.num_test_positions * 4 * config.interventions_per_position
    flops = runs * (s.tail + s.decode) + config.scale_tokens * s.encode
    width = 8.0 * config.num_layers * config.width**2 * config.max_candidates
    flops += config.steps * config.batch_size * 3 * width
    disk = positions * config.max_candidates * 24 + 16 * config.width**2 * FLOAT_BYTES
    return Cost(runs + config.scale_tokens, flops, disk + (1 << 16), 0, _with_decoder(s))


def _evaluate(s: Sizing) -> Cost:
    config = s.run.evaluate
    tasks = len(config.tasks) + len(config.file_tasks)
    # How many documents the harness has is known to it alone: taken as many as our own, of which
    # the spliced model reads each from its beginning for every token.
    asked = 3 * tasks
    if config.harness is not None:
        asked += len(config.harness.tasks) * (3 + config.harness.spliced * ROLLOUT_TOKENS // 2)
    tokens = 2 * config.num_tokens + config.num_prompts * asked * ROLLOUT_TOKENS
    deleted = config.deletion_positions * s.run.train_sae.k
    flops = tokens * (s.forward + 2 * s.decode) + deleted * s.decode
    return Cost(tokens + deleted, flops, PAGE_BYTES, 0, _with_decoder(s))


def _report(s: Sizing) -> Cost:
    cards = min(s.run.report.max_feature_cards, s.run.label_features.num_features)
    return Cost(0, 0.0, PAGE_BYTES + 20_000 * cards)


_COSTS: dict[str, Callable[[Sizing], Cost]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _sync_tokenizer, _ingest, _baselines, _sweep_sae, _frontier, _cache_activations,
        _train_sae, _gate_sae, _train_decoder, _gate_decoder, _train_ppo, _control_ppo,
        _freeze_decoder, _rank_features, _label_features, _cluster_features, _train_explainer,
        _evaluate, _report,
    )
}  # fmt: skip
