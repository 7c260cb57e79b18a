"""Positions come from where they say, pairs are written without padding and taken up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rldecoder.artifacts.catalogue import TrainedExplainer
from rldecoder.data.activation_reader import ActivationReader
from rldecoder.data.activations import ActivationWriter
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
from rldecoder.executors.local import LocalExecutor
from rldecoder.executors.stage_shards import StageShards
from rldecoder.explain.pair_shards import Drawing, PairShardSettings, PairWorker
from rldecoder.explain.pairs import (
    PAIRS,
    PairParts,
    Pairs,
    ends_of_texts,
    held_out_latents,
    join_pairs,
    make_pairs,
    pair_columns,
)
from rldecoder.explain.positions import (
    join_positions,
    positions_from_cache,
    positions_from_prompts,
)
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import SilentReporter
from rldecoder.seeds import torch_generator
from tests.explain.conftest import HOOK_LAYER, SETTINGS, split_tokens, text_positions
from tests.stages.published import published
from tests.tiny_models import cache_meta

CPU = torch.device("cpu")


def test_cached_positions_are_distinct_and_repeatable(
    decoder: SaeDecoderForCausalLM, cache: Path
) -> None:
    reader = ActivationReader(cache, "label")
    first, again = (positions_from_cache(reader, decoder, 50, seed=3) for _ in range(2))
    places = list(zip(first.seq_id.tolist(), first.pos.tolist(), strict=True))
    assert len(set(places)) == 50
    assert places == sorted(places)
    assert first.pos.tolist() == again.pos.tolist()
    other = positions_from_cache(reader, decoder, 50, seed=4)
    assert places != list(zip(other.seq_id.tolist(), other.pos.tolist(), strict=True))
    assert len(positions_from_cache(reader, decoder, 10_000, seed=3).source) == reader.num_tokens
    assert first.texts is None


def test_positions_of_few_texts_share_what_came_before(
    decoder: SaeDecoderForCausalLM, cache: Path
) -> None:
    reader = ActivationReader(cache, "label")
    found = positions_from_cache(
        reader, decoder, 20, seed=3, per_text=10, tokens=split_tokens("label").numpy()
    )
    assert len(found.seq_id.unique()) == 2
    assert found.texts is not None
    assert len(found.texts.resid) == 2
    assert found.texts.position.tolist() == found.pos.tolist()
    # A text cannot have more positions than it is long.
    crowded = positions_from_cache(reader, decoder, 40, seed=3, per_text=1000)
    assert len(crowded.source) == 40


def test_sinks_that_the_cache_leaves_out_are_made_again(
    decoder: SaeDecoderForCausalLM, lm: FrozenLM, tmp_path: Path
) -> None:
    ids = split_tokens("label")[:2]
    resid, final = lm.resid_and_final(ids, HOOK_LAYER)
    meta = cache_meta(lm, HOOK_LAYER, 24)
    with ActivationWriter(tmp_path, "label", meta, shard_rows=1000) as writer:
        for row in range(2):
            kept = torch.tensor([place for place in range(1, 24) if (row, place) != (1, 5)])
            writer.add(
                torch.full_like(kept, row), kept, ids[row, kept], resid[row, kept], final[row, kept]
            )
    found = positions_from_cache(
        ActivationReader(tmp_path, "label"), decoder, 45, seed=0, per_text=23, tokens=ids.numpy()
    )
    assert found.texts is not None
    for row in range(2):
        torch.testing.assert_close(found.texts.resid[row], resid[row], atol=0.02, rtol=0.01)
    torch.testing.assert_close(found.texts.resid[1][5], resid[1, 5])
    torch.testing.assert_close(found.texts.resid[0][0], resid[0, 0])


def test_prompts_in_a_batch_equal_prompts_alone(decoder: SaeDecoderForCausalLM) -> None:
    prompts = ["for x in range(10):", "a", "import os\nimport sys and more words here"]
    together = positions_from_prompts(decoder, prompts, "addition")
    assert together.source == ["addition"] * 3
    assert together.texts is not None
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
        assert alone.texts is not None
        torch.testing.assert_close(
            alone.texts.resid[0], together.texts.resid[row], atol=1e-4, rtol=1e-3
        )


def same(first: Pairs, second: Pairs) -> bool:
    """To the last bit."""
    columns = (*first.candidates, *first.measured, first.removals)
    others = (*second.candidates, *second.measured, second.removals)
    return all(map(torch.equal, columns, others))


def test_pairs_on_disk(decoder: SaeDecoderForCausalLM, cache: Path, tmp_path: Path) -> None:
    positions = join_positions(
        [
            text_positions(decoder, cache, "label", 5),
            positions_from_prompts(decoder, ["one two"], "cloze"),
        ]
    )
    made = make_pairs(decoder, positions, SETTINGS._replace(candidates=4))
    for column in (made.candidates.acts, made.measured.single):
        column[2, 3] = 0  # padding, as a ReLU SAE would have
    TrainedExplainer.pairs.save(tmp_path, pair_columns(made))
    table = published(TrainedExplainer, tmp_path).pairs
    assert table.schema == PAIRS
    rows = table.to_pylist()
    assert [row["source"] for row in rows] == ["text"] * 5 + ["cloze"]
    assert rows[5]["seq_id"] == rows[5]["pos"] == -1
    assert [len(row["effects"]) for row in rows] == [4, 4, 3, 4, 4, 4]
    assert [len(row["removals"][2]) for row in rows] == [4, 4, 3, 4, 4, 4]
    for row in rows:
        strongest = row["latents"][int(np.abs(row["effects"]).argmax())]
        assert row["rationale"][0] == strongest


class Dying(PairWorker):
    """Remembers what it did, and may die at a shard."""

    def __init__(self, *known: Any, dies_at: int | None) -> None:
        super().__init__(*known)
        self.dies_at, self.done = dies_at, list[int]()

    def compute(self, number: int, advance: Callable[[float], None]) -> PairParts:
        if number == self.dies_at:
            raise KeyboardInterrupt
        self.done.append(number)
        return super().compute(number, advance)


def test_an_interrupted_run_takes_its_pairs_up_to_the_last_bit(
    decoder: SaeDecoderForCausalLM, cache: Path, tmp_path: Path
) -> None:
    positions = text_positions(decoder, cache, "label", 40)
    held_out = held_out_latents(160, 0.5, torch_generator(2))  # so that there is padding
    nowhere = dict.fromkeys(("model", "record", "sae", "decoder", "cache", "corpus"), tmp_path)
    settings = PairShardSettings(
        **nowhere, name="pairs", ends=ends_of_texts(positions, 10), drawing=Drawing("train", 40, 0),
        how=SETTINGS, excluded=tuple(held_out.nonzero()[:, 0].tolist()),
    )  # fmt: skip
    report = SilentReporter()

    def make(folder: str, dies_at: int | None = None, owner: str = "me") -> tuple[Pairs, list[int]]:
        here = Dying(settings, CPU, report.note, (decoder, positions), dies_at=dies_at)
        shards = StageShards(LocalExecutor(), tmp_path / folder, owner, CPU, report)
        parts = shards.results(PairWorker, settings, (), "pairs", "ablations", here=here)
        return join_pairs(positions, parts), here.done

    whole, done = make("whole")
    everything = list(range(len(settings.ends)))
    assert done == everything
    assert len(everything) >= 3
    assert bool((whole.candidates.acts == 0).any())

    # What was finished before the kill is not measured again, and nothing is once all is there.
    with pytest.raises(KeyboardInterrupt):
        make("killed", dies_at=2)
    for rest in ([2, *everything[3:]], []):
        again, done = make("killed")
        assert same(again, whole)
        assert done == rest

    # One is missing, one is damaged, or all are another's: those are made again.
    files = sorted((tmp_path / "killed").rglob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-7] + b"garbage")
    again, done = make("killed")
    assert same(again, whole)
    assert done == [0, 1]
    assert any("cannot be trusted" in note for note in report.notes)
    assert make("killed", owner="another")[1] == everything


def test_held_out_latents_are_in_no_pair(
    decoder: SaeDecoderForCausalLM, pairs: dict[str, Pairs]
) -> None:
    held_out = held_out_latents(160, 0.3, torch_generator(2))
    assert int(held_out.sum()) == 48
    assert torch.equal(held_out, held_out_latents(160, 0.3, torch_generator(2)))
    positions = pairs["label"].positions
    made = make_pairs(decoder, positions, SETTINGS, excluded=held_out)
    padding = made.candidates.acts == 0
    assert bool(padding.any()), "positions of few other features are padded"
    assert not bool(held_out[made.candidates.indices[~padding]].any())
    for column in (
        made.candidates.attributions, made.candidates.contributions, made.measured.single,
        made.removals.sum(1),
    ):  # fmt: skip
        assert float(column[padding].abs().max()) == 0
    for latents, rationale in zip(
        *(pair_columns(made)[name] for name in ("latents", "rationale")), strict=True
    ):
        assert not bool(held_out[torch.tensor([*latents, *rationale])].any())
    # What is left is what the position has without them, in the same order.
    free = make_pairs(decoder, positions, SETTINGS._replace(candidates=12))
    for row in range(60):
        expected = [i for i in free.candidates.indices[row].tolist() if not held_out[i]][:8]
        kept = made.candidates.indices[row][made.candidates.acts[row] > 0].tolist()
        assert kept == expected
