"""Positions come from where they say, and pairs are written without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rldecoder.artifacts.catalogue import TrainedExplainer
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.explain.pairs import (
    PAIRS,
    Pairs,
    held_out_latents,
    join_latents,
    join_positions,
    make_pairs,
    pair_columns,
    positions_from_cache,
    positions_from_prompts,
)
from rldecoder.sae.model import SparseLatents
from rldecoder.seeds import torch_generator
from tests.stages.published import published


def test_cached_positions_are_distinct_and_repeatable(
    decoder: SaeDecoderForCausalLM, cache: Path
) -> None:
    reader = ActivationReader(cache, "label")
    first, again = (positions_from_cache(reader, decoder, 50, seed=3) for _ in range(2))
    places = list(zip(first.seq_id.tolist(), first.pos.tolist(), strict=True))
    assert len(set(places)) == 50
    assert first.pos.tolist() == again.pos.tolist()
    assert len(positions_from_cache(reader, decoder, 10_000, seed=3).source) == reader.num_tokens


def test_prompts_in_a_batch_equal_prompts_alone(decoder: SaeDecoderForCausalLM) -> None:
    prompts = ["for x in range(10):", "a", "import os\nimport sys and more words here"]
    together = positions_from_prompts(decoder, prompts, "addition")
    assert together.source == ["addition"] * 3
    for row, prompt in enumerate(prompts):
        alone = positions_from_prompts(decoder, [prompt], "addition")
        assert set(alone.latents.indices[0].tolist()) == set(together.latents.indices[row].tolist())
        torch.testing.assert_close(
            alone.latents.acts[0].sort().values,
            together.latents.acts[row].sort().values,
            atol=1e-3,
            rtol=1e-3,
        )
        assert int(together.context_token[row]) == int(alone.context_token[0])


def test_batches_of_different_width_are_padded_with_inactive_latents() -> None:
    narrow = SparseLatents(torch.ones(2, 1), torch.full((2, 1), 5))
    wide = SparseLatents(torch.full((1, 3), 2.0), torch.full((1, 3), 6))
    joined = join_latents([narrow, wide])
    assert joined.acts.tolist() == [[1, 0, 0], [1, 0, 0], [2, 2, 2]]
    assert joined.indices.shape == (3, 3)


def test_pairs_on_disk(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs], cache: Path, tmp_path: Path
) -> None:
    positions = join_positions(
        [
            positions_from_cache(ActivationReader(cache, "label"), decoder, 5, seed=0),
            positions_from_prompts(decoder, ["one two"], "cloze"),
        ]
    )
    made = make_pairs(
        decoder, positions, max_candidates=4, interventions=2, generator=torch_generator(0)
    )
    made.candidates.acts[2, 3] = 0  # padding, as a ReLU SAE would have
    TrainedExplainer.pairs.save(tmp_path, pair_columns(made))
    table = published(TrainedExplainer, tmp_path).pairs
    assert table.schema == PAIRS
    rows = table.to_pylist()
    assert [row["source"] for row in rows] == ["text"] * 5 + ["cloze"]
    assert rows[5]["seq_id"] == rows[5]["pos"] == -1
    assert [len(row["effects"]) for row in rows] == [4, 4, 3, 4, 4, 4]
    for row in rows:
        strongest = row["latents"][int(np.abs(row["effects"]).argmax())]
        assert row["rationale"][0] == strongest


def test_held_out_latents_are_in_no_pair(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    held_out = held_out_latents(160, 0.3, torch_generator(2))
    assert int(held_out.sum()) == 48
    assert torch.equal(held_out, held_out_latents(160, 0.3, torch_generator(2)))
    positions = pairs["label"].positions
    made = make_pairs(
        decoder, positions, max_candidates=8, interventions=2, generator=torch_generator(0),
        excluded=held_out,
    )  # fmt: skip
    named = held_out[made.candidates.indices]
    assert bool(named.any()), "positions of few other features are padded"
    for column in (
        made.candidates.acts, made.candidates.attributions, made.candidates.contributions,
        made.measured.single, made.removals.sum(1),
    ):  # fmt: skip
        assert float(column[named].abs().max()) < 1e-5
    for latents, rationale in zip(
        *(pair_columns(made)[name] for name in ("latents", "rationale")), strict=True
    ):
        assert not bool(held_out[torch.tensor([*latents, *rationale])].any())
    # What is left is what the position has without them, in the same order.
    free = make_pairs(
        decoder, positions, max_candidates=12, interventions=1, generator=torch_generator(0)
    )
    for row in range(60):
        expected = [i for i in free.candidates.indices[row].tolist() if not held_out[i]][:8]
        kept = made.candidates.indices[row][made.candidates.acts[row] > 0].tolist()
        assert kept == expected
