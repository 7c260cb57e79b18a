"""Near-duplicates among the labelled latents, merged where ablation confirms; latents that absorb
what others mean; flags of bad ones; and the order in which people should review the labels, one of
each cluster first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rldecoder.artifacts.catalogue import Clusters
from rldecoder.config.interp import ClusterFeaturesConfig
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.interp.absorption import Link, absorption_links
from rldecoder.interp.cluster_record import cluster_record
from rldecoder.interp.clusters import (
    HeldOutRows,
    Likeness,
    fingerprint_cosine,
    fingerprints,
    likeness,
    merge,
)
from rldecoder.interp.corpus import SplitFirings, read_firings
from rldecoder.interp.label_embedding import label_vectors
from rldecoder.interp.predicate import evaluate
from rldecoder.interp.records import FeatureLabel, FeatureLabels
from rldecoder.interp.review_queue import make_queue
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.json_records import Row
from rldecoder.sae.model import Sae
from rldecoder.sae.selection import join_latents
from rldecoder.seeds import derive_seed, seed_everything
from rldecoder.stages.context import Output, StageContext
from rldecoder.stages.inputs import ClusterInputs

BoolArray = NDArray[np.bool_]


class Tested(NamedTuple):
    """Pairs with at least one vote, as rows of PAIRS without `merged`, and those that agree under
    ablation."""

    rows: list[Row]
    agreeing: set[frozenset[int]]
    fingerprint_of: dict[int, NDArray[np.float64]]
    """Of the latents of tested pairs and of absorption links."""


def run(inputs: ClusterInputs, config: ClusterFeaturesConfig, ctx: StageContext) -> Output:
    """Compare, ablate, merge, flag, and put the labels in order for people."""
    seed_everything(ctx.seed)
    labels = inputs.labels.labels
    latents = np.array([feature.latent for feature in labels.features], np.int64)
    lm, sae = inputs.model.load(ctx.device), inputs.sae.load(ctx.device)
    decoder = inputs.final.load(lm, sae)
    vocabulary = Vocabulary.from_tokenizer(lm.tokenizer, lm.vocab_size)
    reader = inputs.cache.reader("test")

    with ctx.report.track("clusters", 3, "step") as bar:
        split = read_firings(
            reader, sae, split="test", max_tokens=config.tokens, batch_tokens=config.batch_tokens
        )
        bar.advance(note="text read")
        held = _where_predicates_hold(labels, split, vocabulary)
        alike = _compare(labels, split, sae, held, config)
        links = _absorption(labels, split, sae, held, config)
        bar.advance(note="compared")
        tested = _test_pairs(latents, alike, links, config, decoder, split, reader, ctx.seed)
        bar.advance(note="ablated")

    # Only pairs that ablation confirms are merged, however alike the rest are.
    clusters = merge(latents.tolist(), tested.agreeing)
    representative = {m: rep for rep, members in clusters.items() for m in members}
    for row in tested.rows:
        row["merged"] = representative[row["latent_a"]] == representative[row["latent_b"]]
    Clusters.pairs.save_rows(ctx.out, tested.rows)
    prints = tested.fingerprint_of
    Clusters.absorption.save_rows(
        ctx.out,
        [
            {
                **link._asdict(),
                "fingerprint_cosine": fingerprint_cosine(
                    prints.get(link.general), prints.get(link.special)
                ),
            }
            for link in links
        ],
    )
    record = cluster_record(
        labels,
        clusters,
        links,
        split,
        ultra_dense=config.ultra_dense,
        thresholds=config.digest_fields(),
    )
    Clusters.clusters.save(ctx.out, record)
    queue = make_queue(labels, representative, derive_seed(ctx.seed, "audit"))
    Clusters.queue.save(ctx.out, queue)
    return Output(
        {
            **record.headline,
            "pairs_with_votes": len(tested.rows),
            "pairs_tested": sum(row["fingerprint_cosine"] is not None for row in tested.rows),
            "pairs_agreeing": len(tested.agreeing),
        }
    )


def _where_predicates_hold(
    labels: FeatureLabels, split: SplitFirings, vocabulary: Vocabulary
) -> list[BoolArray | None]:
    """For each labelled latent the valid cells [cells] where its predicate holds, if it has one."""
    valid = split.grid.valid.reshape(-1)
    held: list[BoolArray | None] = []
    for feature in labels.features:
        cells = None
        predicate = feature.input_predicate
        if predicate is not None:
            cells = evaluate(predicate, split.grid.tokens, vocabulary).reshape(-1) & valid
        held.append(cells)
    return held


def _absorption(
    labels: FeatureLabels,
    split: SplitFirings,
    sae: Sae,
    held: list[BoolArray | None],
    config: ClusterFeaturesConfig,
) -> list[Link]:
    """Which latents absorb what the labelled ones mean, on the valid cells."""
    labelled = [
        (feature.latent, cells)
        for feature, cells in zip(labels.features, held, strict=True)
        if cells is not None
    ]
    directions = sae.W_dec.detach().double().cpu().numpy()
    return absorption_links(labelled, split.firings.matrix, directions, config)


def _compare(
    labels: FeatureLabels,
    split: SplitFirings,
    sae: Sae,
    held: list[BoolArray | None],
    config: ClusterFeaturesConfig,
) -> Likeness:
    """Likeness of all pairs of labelled latents on the valid cells."""
    latents = np.array([feature.latent for feature in labels.features], np.int64)
    directions = sae.W_dec[torch.as_tensor(latents)].double().cpu().numpy()
    # `split` keeps all latents, so a latent's row is its id.
    acts = split.firings.matrix[latents]
    embedded = None if config.label_embedding == "none" else _embedded(labels)
    outputs = [_raised(feature) for feature in labels.features]
    return likeness(directions, acts, int(split.grid.valid.sum()), held, embedded, outputs)


def _raised(feature: FeatureLabel) -> dict[int, float]:
    """Gains of the tokens that a latent raises."""
    output = feature.output
    return {} if output is None else {gain.token_id: gain.gain for gain in output.raised}


def _embedded(labels: FeatureLabels) -> NDArray[np.float64]:
    """[K, E] embeddings of the labels; NaN without one.

    Words say more than the stock phrases of a predicate: where a trusted judge scored a label in
    words, that is taken.
    """
    texts = []
    for feature in labels.features:
        words = [o.label for o in feature.other_labels if o.label is not None and o.judge_trusted]
        own = feature.label
        texts.append(words[0] if words and not feature.by_person else own)
    known = [i for i, text in enumerate(texts) if text is not None]
    vectors = label_vectors([text for text in texts if text is not None])
    out = np.full((len(texts), vectors.shape[1]), np.nan)
    out[known] = vectors
    return out


def _test_pairs(
    latents: NDArray[np.int64],
    alike: Likeness,
    links: list[Link],
    config: ClusterFeaturesConfig,
    decoder: SaeDecoderForCausalLM,
    split: SplitFirings,
    reader: ActivationReader,
    seed: int,
) -> Tested:
    """Ablate the latents of pairs with enough votes, and of links, and compare what happens."""
    votes = np.triu(alike.votes(config), k=1)
    first, second = np.nonzero(votes)
    enough = votes[first, second] >= config.min_votes
    wanted = set(latents[np.concatenate([first[enough], second[enough]])].tolist())
    wanted |= {latent for link in links for latent in (link.general, link.special)}

    probes = _probes(split, decoder.config.vocab_size, config.num_probe_tokens, seed)
    found: dict[int, NDArray[np.float64]] = {}
    if wanted:
        found = fingerprints(
            decoder,
            _encode(reader, decoder.frozen.sae, config),
            sorted(wanted),
            probes.to(decoder.W.device),
            config.fingerprint_tokens_per_latent,
        )

    rows, agreeing = [], set()
    for i, j, ready in zip(first.tolist(), second.tolist(), enough.tolist(), strict=True):
        a, b = int(latents[i]), int(latents[j])
        cosine = fingerprint_cosine(found.get(a), found.get(b)) if ready else None
        agree = cosine is not None and cosine >= config.fingerprint_cosine
        if agree:
            agreeing.add(frozenset((a, b)))
        rows.append({
            "latent_a": a,
            "latent_b": b,
            **alike.of(i, j),
            "votes": int(votes[i, j]),
            "fingerprint_cosine": cosine,
            "agree": agree,
        })  # fmt: skip
    return Tested(rows, agreeing, found)


@torch.no_grad()
def _encode(reader: ActivationReader, sae: Sae, config: ClusterFeaturesConfig) -> HeldOutRows:
    """The first tokens of the split, their active latents padded to one width."""
    parts, sequences, places = [], [], []
    device = sae.W_enc.device
    for batch in reader.ordered(
        config.batch_tokens, columns=("resid",), max_tokens=config.fingerprint_tokens
    ):
        assert batch.resid is not None
        parts.append(sae.encode(batch.resid.to(device).float()))
        sequences.append(batch.seq_id.to(device))
        places.append(batch.pos.to(device))
    return HeldOutRows(join_latents(parts), torch.cat(sequences), torch.cat(places))


def _probes(split: SplitFirings, vocab_size: int, count: int, seed: int) -> Tensor:
    """Probe token ids: half the most frequent of the text, half drawn from the other tokens."""
    tokens = split.grid.tokens[split.grid.valid]
    frequent = np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")
    count = min(count, vocab_size)
    half = count // 2
    rng = np.random.default_rng(derive_seed(seed, "probes"))
    drawn = rng.choice(frequent[half:], count - half, replace=False)
    return torch.from_numpy(np.sort(np.concatenate([frequent[:half], drawn])))
