"""Residuals and ablations of cached text beside the frozen model run on the text itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rldecoder.data.activations import ActivationWriter
from rldecoder.data.shards import read_token_table
from rldecoder.interp.ablation_pass import Ablations, Texts, choose_places
from rldecoder.interp.control_latents import SplitSource
from rldecoder.interp.output_sets import Gains, SetGroup, Trier
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from tests.stages.interp_inputs import write_tokens
from tests.tiny_models import cache_meta

HOOK, SEQUENCES, LENGTH = 2, 5, 20


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path
) -> tuple[FrozenLM, Sae, SplitSource, torch.Tensor]:
    """A cache in which a position in the middle is missing, as a sink would be."""
    folder = tmp_path_factory.mktemp("pass")
    lm = FrozenLM.load(tiny_llama_dir, dtype=torch.float32)
    ids = torch.randint(1, 500, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    docs = np.broadcast_to(np.arange(SEQUENCES)[:, None], ids.shape)
    source = SplitSource(folder / "activations", folder / "tokens", 64)
    write_tokens(source.tokens, "label", ids.numpy(), docs, lm.vocab_size)
    resid = lm.trunk(ids, HOOK).resid
    meta = cache_meta(lm, HOOK, LENGTH)
    with ActivationWriter(source.activations, "label", meta, shard_rows=40) as writer:
        for row in range(SEQUENCES):
            at = torch.tensor([n for n in range(1, LENGTH) if (row, n) != (2, 7)])
            writer.add(torch.full_like(at, row), at, ids[row, at], resid[row, at], resid[row, at])
    spec = SaeSpec(d_model=lm.d_model, num_latents=40, k=6, hook_layer=HOOK)
    return lm, Sae.random_init(spec, seed=1).requires_grad_(False), source, ids


@pytest.mark.parametrize("first", [0, 11])
def test_places_are_those_of_the_whole_text(
    world: tuple[FrozenLM, Sae, SplitSource, torch.Tensor], first: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lm, sae, source, ids = world
    monkeypatch.setattr("rldecoder.interp.ablation_pass.ROWS_AT_ONCE", 33)
    monkeypatch.setattr("rldecoder.interp.ablation_pass.LOGITS_AT_ONCE", 15 * lm.vocab_size)
    split = source.firings(sae, "label", None, 10**6)
    places = choose_places(split, np.zeros(40), 3, seed=0)
    table = read_token_table(source.tokens, "label")
    ablations = Ablations(Texts(lm, HOOK, source.reader("label"), table), sae)
    seen = []
    for part in ablations.run(places, others=True, first=first):
        assert len(part.places) <= 5
        for row, place in enumerate(part.places.tolist()):
            seen.append(place)
            sequence, at = int(places.seq_id[place]), int(places.position[place])
            taken = float(places.act[place]) * sae.W_dec[places.latent[place]]
            text = ids[sequence : sequence + 1]

            def spliced(removed: torch.Tensor, text=text, at=at) -> torch.Tensor:  # type: ignore[no-untyped-def]
                def change(resid: torch.Tensor) -> torch.Tensor:
                    resid = resid.clone()
                    resid[0, at] -= removed
                    return resid

                return lm.unembed(lm.splice(text, HOOK, change))[0, at].log_softmax(-1)

            # The cache keeps bfloat16.
            near = {"atol": 0.05, "rtol": 0.02}
            torch.testing.assert_close(part.before[part.spot[row]], spliced(0 * taken), **near)
            torch.testing.assert_close(part.without[row], spliced(taken), **near)
            # Another latent that is active there, at the same length.
            acts, indices = sae.encode(lm.trunk(text, HOOK).resid[0, at].bfloat16().float())
            others = [int(i) for i, a in zip(indices, acts, strict=True) if a > 0]
            others.remove(int(places.latent[place]))
            wanted = [taken.norm() * sae.W_dec[i] / sae.W_dec[i].norm() for i in others]
            errors = [float((part.other[row] - spliced(w)).abs().max()) for w in wanted]
            assert min(errors) < 0.1
    assert seen == list(range(first, len(places.row)))
    assert ablations.texts.blocks.slow_because is None


def test_sets_tried_again_say_what_they_say_in_the_pass(
    world: tuple[FrozenLM, Sae, SplitSource, torch.Tensor],
) -> None:
    lm, sae, source, _ = world
    split = source.firings(sae, "label", None, 10**6)
    places = choose_places(split, np.zeros(40), 3, seed=0)
    table = read_token_table(source.tokens, "label")
    ablations = Ablations(Texts(lm, HOOK, source.reader("label"), table), sae)
    sets = [(i, i + 100) for i in range(40)]
    groups = [SetGroup(sets, np.arange(40)), SetGroup(sets[::-1], np.arange(40))]
    trier = Trier(groups, places.row, lm.device)
    gains = Gains.empty(len(places.row), lm.vocab_size, lm.d_model)
    tried = []
    for part in ablations.run(places, others=True):
        tried.append(trier.of(part))
        gains.put(part.places, Gains.of(part))
        fallen = (part.before[part.spot].exp() - part.without.exp()).clamp_min(0).sum(-1)
        np.testing.assert_allclose(gains.lost[part.places], fallen.numpy(), rtol=1e-5)
    again = trier.again(np.arange(len(places.row)), gains, lm)
    for name, column in again._asdict().items():
        whole = np.concatenate([getattr(part, name) for part in tried])
        np.testing.assert_allclose(column, whole, atol=1e-5, rtol=1e-4, err_msg=name)
    assert np.abs(again.drop).max() > 1e-3
