"""Planted latents that fire on named tokens, that raise named tokens, both, or neither.

The model is a small Llama whose last block hardly moves what it is given, so that a direction of
the unembedding at the hook layer raises its tokens. Residuals are made, not read: a base, and each
active latent's direction times its activation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rldecoder.config.interp import PredicateSettings
from rldecoder.data.activations import ActivationMeta, ActivationWriter
from rldecoder.executors.jobs import whole_ends
from rldecoder.executors.local import LocalExecutor
from rldecoder.executors.stage_shards import StageShards
from rldecoder.interp import ablation_shards
from rldecoder.interp.ablation_pass import Ablations, choose_places
from rldecoder.interp.ablation_shards import AblationCrew, AblationWorker
from rldecoder.interp.calibration import NUM_ROTATIONS, Acceptance
from rldecoder.interp.control_latents import SplitSource, draw_latents
from rldecoder.interp.corpus import SplitFirings, document_folds
from rldecoder.interp.imported_outputs import OutputTrials, Said
from rldecoder.interp.kind_confidence import output_confidences, pick
from rldecoder.interp.kinds import BothKinds, coverages, passing
from rldecoder.interp.labelers import PredicateLabeler
from rldecoder.interp.labelling import (
    calibrate,
    label_and_score,
    random_sae,
    score_weak,
    shuffled_control,
)
from rldecoder.interp.output_labels import OutputLabeler
from rldecoder.interp.output_sets import SetGroup
from rldecoder.interp.predicate import TokenIn
from rldecoder.interp.strong import at_least, usual_highs
from rldecoder.interp.vocabulary import Vocabulary
from rldecoder.lm.frozen import FrozenLM
from rldecoder.reporting import SilentReporter
from rldecoder.sae.model import Sae, SaeSpec
from tests.stages.interp_inputs import write_tokens

KINDS = ("input",) * 10 + ("output",) * 10 + ("both",) * 5 + ("none",) * 5
NUM, VOCABULARY, SEEN = len(KINDS), 512, 48
"""Latents; tokens; the first dimensions, which the unembedding reads."""
WIDTH = 96
HOOK, SEQUENCES, LENGTH = 2, 100, 40
BARS = Acceptance(detection=0.8, precision=0.5, auroc=0.95)


class World(NamedTuple):
    lm: FrozenLM
    sae: Sae
    source: SplitSource
    fit: SplitFirings
    scored: SplitFirings
    fires_on: list[tuple[int, ...]]
    raises: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path) -> World:
    folder = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        head = torch.randn(VOCABULARY, WIDTH) * 0.3
        head[:, SEEN:] = 0
        model.lm_head.weight.copy_(head)
        model.model.layers[HOOK].mlp.down_proj.weight.mul_(0.2)
    lm = FrozenLM(model, AutoTokenizer.from_pretrained(tiny_lm_dir), tiny_lm_dir)

    # A latent is read off in a dimension of its own; what it raises lies in those that are seen.
    tokens = np.random.default_rng(0).permutation(VOCABULARY)
    fires_on = [tuple(sorted(tokens[3 * i : 3 * i + 3].tolist())) for i in range(NUM)]
    raises = [tuple(sorted(tokens[200 + 4 * i : 204 + 4 * i].tolist())) for i in range(NUM)]
    sae = Sae(SaeSpec(architecture="relu", d_model=WIDTH, num_latents=NUM, hook_layer=HOOK))
    with torch.no_grad():
        for latent, kind in enumerate(KINDS):
            row = torch.zeros(WIDTH)
            if kind in ("output", "both"):
                row = torch.nn.functional.normalize(head[list(raises[latent])].mean(0), dim=0)
            row[SEEN + latent] = 0.5 if bool(row.any()) else 1.0
            sae.W_dec[latent] = torch.nn.functional.normalize(row, dim=0)
            sae.W_enc[SEEN + latent, latent] = 1 / sae.W_dec[latent, SEEN + latent]
    sae.requires_grad_(False)

    meta = ActivationMeta(
        model_name="planted", hook_layer=HOOK, num_layers=3, d_model=WIDTH, vocab_size=VOCABULARY,
        context_length=LENGTH,
    )  # fmt: skip
    source = SplitSource(folder / "activations", folder / "tokens", 1000)
    for number, split in enumerate(("label", "test")):
        rng = np.random.default_rng(number)
        text = rng.integers(0, VOCABULARY, (SEQUENCES, LENGTH))
        fires = rng.random((SEQUENCES, LENGTH, NUM)) < 0.012
        for latent, kind in enumerate(KINDS):
            if kind in ("input", "both"):
                fires[..., latent] = np.isin(text, fires_on[latent])
        # Weak firings anywhere: what labels of strong firing must not mind.
        acts = np.where(fires, rng.uniform(5, 8, fires.shape), 0)
        weak = (rng.random(fires.shape) < 0.03) & ~fires
        acts = np.where(weak, rng.uniform(0.1, 0.8, fires.shape), acts)
        base = np.zeros((SEQUENCES, LENGTH, WIDTH))
        base[..., :SEEN] = rng.normal(size=(SEQUENCES, LENGTH, SEEN))
        resid = torch.from_numpy(base + acts @ sae.W_dec.double().numpy()).bfloat16()
        docs = np.broadcast_to(np.arange(SEQUENCES)[:, None] + 1000 * number, text.shape)
        write_tokens(source.tokens, split, text, docs, VOCABULARY)
        with ActivationWriter(source.activations, split, meta, shard_rows=1500) as writer:
            for row in range(SEQUENCES):
                writer.add(
                    torch.full((LENGTH - 1,), row), torch.arange(1, LENGTH),
                    torch.from_numpy(text[row, 1:]), resid[row, 1:], resid[row, 1:],
                )  # fmt: skip
    # Rounding of residuals gives tiny activations everywhere: no real SAE has them.
    splits = []
    for split in ("label", "test"):
        found = source.firings(sae, split, None, 10**6)
        splits.append(found._replace(firings=at_least(found.firings, np.full(NUM, 0.05))))
    return World(lm, sae, source, *splits, fires_on, raises)


def labeler(world: World, folder: Path, crew: AblationCrew | None = None) -> OutputLabeler:
    return OutputLabeler(
        world.lm, world.source, share=0.5, count=16, seed=0, report=SilentReporter(),
        progress=folder, owner="", crew=crew,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(world: World, tmp_path_factory: pytest.TempPathFactory) -> BothKinds:
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary([f" w{i}" for i in range(VOCABULARY)])
    strong = [
        split._replace(firings=strong_of(world, split)) for split in (world.fit, world.scored)
    ]
    inputs = label_and_score(
        PredicateLabeler(PredicateSettings(min_firings=4)), *strong, vocabulary, 16, rng
    )
    weak = score_weak(inputs, world.scored, vocabulary, 16, rng)
    outputs = labeler(world, tmp_path_factory.mktemp("progress")).label(
        "label", world.sae, world.fit, world.scored, rotate=True
    )
    return BothKinds(world.fit.firings.latents, inputs, weak, outputs)


def strong_of(world: World, split: SplitFirings):  # type: ignore[no-untyped-def]
    return at_least(split.firings, 0.3 * usual_highs(world.fit.firings))


def test_planted_kinds_are_recovered(world: World, found: BothKinds) -> None:
    passed = passing(found, BARS)
    right = [kind == planted for kind, planted in zip(passed.kinds(), KINDS, strict=True)]
    assert np.mean(right) >= 0.95, list(zip(passed.kinds(), KINDS, strict=True))
    recovered: list[float] = []
    for latent, kind in enumerate(KINDS):
        if passed.outputs[latent] and kind in ("output", "both"):
            tokens = found.outputs.sets[latent].tokens
            assert tokens[0] in world.raises[latent]
            recovered.append(len(set(world.raises[latent]) & set(tokens)) / 4)
        if passed.inputs[latent] and kind in ("input", "both"):
            predicate = found.inputs.drafts[latent].predicate
            assert isinstance(predicate, TokenIn)
            assert predicate.tokens == world.fires_on[latent]
    assert np.mean(recovered) > 0.7
    # Weak firings blur what the same labels say of any firing.
    named = [i for i, kind in enumerate(KINDS) if kind == "input"]
    strong, weak = ([s[i].recall for i in named] for s in (found.inputs.scores, found.weak))
    assert np.mean(strong) > 0.95 > np.mean(weak)


def test_controls_are_at_chance(world: World, found: BothKinds) -> None:
    rng = np.random.default_rng(1)
    vocabulary = Vocabulary([f" w{i}" for i in range(VOCABULARY)])
    scored = world.scored._replace(firings=strong_of(world, world.scored))
    shuffled = passing(found, BARS, shuffled_control(found.inputs, scored, vocabulary, 16, rng))
    assert shuffled.either.mean() <= 0.05
    both = coverages({"label": passing(found, BARS), "shuffled": shuffled,
                      "random_sae": shuffled, "drawn": passing(found, BARS)})  # fmt: skip
    gap = both.gaps["label_shuffled"]
    assert gap.low > 0.5
    own = both.methods["label"]
    assert own.input + own.output + own.both + own.none == own.latents == NUM
    assert both.headline["coverage_gap_drawn_random_sae"] == gap.difference


def test_sets_of_others_are_scored_as_ours_are(
    world: World, found: BothKinds, tmp_path: Path
) -> None:
    fitted = [held.tokens for held in found.outputs.sets]
    untrained_sae = random_sae(world.sae, world.source.reader("label"), 1000, 0)
    untrained = draw_latents(
        world.source, untrained_sae, count=10, max_tokens=10**6, min_firings=4,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    trials = OutputTrials(
        labeler(world, tmp_path), world.sae, world.fit, world.scored, fitted, untrained_sae,
        untrained,
    )  # fmt: skip
    rows = [row for row, tokens in enumerate(fitted) if tokens]
    raising = [i for i, kind in enumerate(KINDS) if kind in ("output", "both")]
    said = [Said(i, fitted[i]) for i in rows]
    said += [Said(i, world.raises[i]) for i in raising]
    # A wrong one of the same latents, which none of them raises.
    idle = [i for i in range(NUM) if i not in raising]
    said += [Said(i, world.raises[other]) for i, other in zip(raising, idle, strict=True)]
    scores = trials.score(said, np.random.default_rng(0))
    assert {len(scores["imported"]), len(scores["random_sae"])} == {len(said)}

    # Our own sets get the numbers that they have: the same places, the same rivals.
    for row, got in zip(rows, scores["imported"], strict=False):
        assert got.model_dump() == pytest.approx(found.outputs.scores[row].model_dump(), abs=1e-3)
    passed = {
        name: np.array([BARS.accepts_output(got) for got in values])
        for name, values in scores.items()
    }
    right, wrong = np.split(passed["imported"][len(rows) :], 2)
    assert right.mean() > 0.9
    # A wrong set passes only where the latent's row happens to lie along its tokens (one of 15).
    raised = world.sae.W_dec[raising].float() @ world.lm.unembedding.float().T
    raised = (raised - raised.mean(1, keepdim=True)) / raised.std(1, keepdim=True)
    planted = [list(world.raises[i]) for i in idle]
    by_chance = [
        float(raised[row, tokens].mean()) for row, tokens in enumerate(planted[: len(raising)])
    ]
    assert wrong.sum() <= 1
    assert not wrong[np.array(by_chance) < 0.8].any()
    for name in ("shuffled", "random_sae"):
        assert passed[name].mean() <= 0.05
        assert 0.3 < np.mean([got.auroc for got in scores[name]]) < 0.7, name


def test_confidence_tells_the_kinds_apart(world: World, found: BothKinds) -> None:
    outputs = output_confidences(found.outputs, BARS, seed=0)
    raises = np.array([kind in ("output", "both") for kind in KINDS])
    assert np.median(outputs.p[raises]) > 0.9
    assert outputs.p[raises].mean() > 0.8 > 0.4 > outputs.p[~raises].max()
    strong = world.fit._replace(firings=strong_of(world, world.fit))
    vocabulary = Vocabulary([f" w{i}" for i in range(VOCABULARY)])
    labeler = PredicateLabeler(PredicateSettings(min_firings=4))
    inputs = calibrate(labeler, strong, found.inputs.drafts, vocabulary, 16, BARS, seed=0)
    picked = pick(inputs, outputs, list(range(NUM)))
    assert (picked.p == np.maximum(inputs.p, outputs.p)).all()
    only = [planted for planted, output in zip(KINDS, picked.output, strict=True) if output]
    assert only.count("output") >= 8
    assert "input" not in only
    assert picked.p[[kind == "none" for kind in KINDS]].max() < 0.4
    assert picked.levels[-1].latents >= NUM - 5


def test_a_killed_pass_goes_on_to_the_same_numbers(
    world: World, found: BothKinds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rldecoder.interp.output_labels.CHECKPOINT_SECONDS", 0.0)
    run = Ablations.run
    seen: list[int] = []

    def dying(self, places, *, others, first=0):  # type: ignore[no-untyped-def]
        for number, part in enumerate(run(self, places, others=others, first=first)):
            if number == 20 and len(seen) < 2:
                seen.append(first)
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(Ablations, "run", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            labeler(world, tmp_path).label("a", world.sae, world.fit, world.scored, rotate=True)
    assert seen[1] > seen[0] == 0
    again = labeler(world, tmp_path).label("a", world.sae, world.fit, world.scored, rotate=True)
    assert again == found.outputs


@pytest.fixture
def crew(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AblationCrew:
    """A worker in this process, which has the model from disk."""
    monkeypatch.setattr(ablation_shards, "PLACES", 100)
    model = tmp_path / "model"
    world.lm.model.save_pretrained(model)
    world.lm.tokenizer.save_pretrained(model)
    shards = StageShards(
        LocalExecutor(), tmp_path / "shards", "test/0123", torch.device("cpu"), SilentReporter()
    )
    return AblationCrew(
        shards, model, tmp_path / "none", world.source.activations, world.source.tokens, ()
    )


def test_shards_say_what_one_pass_says(
    world: World, found: BothKinds, crew: AblationCrew, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit; a run that was killed between two shards does the others alone."""
    compute = AblationWorker.compute
    done: list[int] = []

    def dying(self: AblationWorker, number: int, advance: Callable[[float], None]) -> object:
        if number == 5 and done.count(5) == 0:
            done.append(5)
            raise KeyboardInterrupt
        done.append(number)
        return compute(self, number, advance)

    monkeypatch.setattr(AblationWorker, "compute", dying)
    with pytest.raises(KeyboardInterrupt):
        labeler(world, tmp_path, crew).label("a", world.sae, world.fit, world.scored, rotate=True)
    again = labeler(world, tmp_path, crew).label(
        "a", world.sae, world.fit, world.scored, rotate=True
    )
    assert done[:8] == [0, 1, 2, 3, 4, 5, 5, 6]
    assert again == found.outputs
    assert not [path for path in (tmp_path / "shards").rglob("*") if path.is_file()]
    # What was joined is kept: another run asks nobody.
    size = len(done)
    assert labeler(world, tmp_path, crew).label(
        "a", world.sae, world.fit, world.scored, rotate=True
    ) == again  # fmt: skip
    assert len(done) == size


def test_shards_take_sets_of_others(world: World, found: BothKinds, crew: AblationCrew) -> None:
    """Sets with rivals of their own come back from the file as they were."""
    fitted = [held.tokens for held in found.outputs.sets]
    rivals = np.random.default_rng(0).random((NUM, NUM)) < 0.5
    groups = [SetGroup(fitted, np.arange(NUM)), SetGroup(fitted[::-1], np.arange(NUM), rivals)]
    folder = crew.shards.folder.parent
    scores = [
        labeler(world, folder / name, who).score(
            "a", world.sae, world.fit, world.scored, groups
        )
        for name, who in (("here", None), ("there", crew))
    ]  # fmt: skip
    assert scores[0] == scores[1]
    assert scores[0][1] != scores[0][0]


def test_shards_end_with_sequences() -> None:
    assert whole_ends([0, 0, 1, 1, 1, 1, 4, 5, 5, 9], 3) == (6, 9, 10)
    assert whole_ends([7] * 9, 3) == (9,)
    assert whole_ends([], 3) == ()


def test_a_text_so_short_that_folds_hold_no_place_fails_no_run(
    world: World, tmp_path: Path
) -> None:
    some = np.array([0, 10, 20])
    fit, scored = (
        split._replace(firings=split.firings.select(some)) for split in (world.fit, world.scored)
    )
    first = document_folds(fit.grid, NUM_ROTATIONS) == 0
    fit = fit._replace(grid=fit.grid.restricted(first))
    rotations = labeler(world, tmp_path).label("few", world.sae, fit, scored, rotate=True).rotations
    assert [[s.places > 0 for s in rotation.held_out] for rotation in rotations] == [
        [False] * 3, [False] * 3, [False] * 3,
    ]  # fmt: skip
    assert all(found.tokens for found in rotations[0].sets[1:])
    assert not any(found.tokens for rotation in rotations[1:] for found in rotation.sets)


def test_places_come_from_many_documents(world: World) -> None:
    least = 0.5 * usual_highs(world.fit.firings)
    places = choose_places(world.fit, least, 16, seed=0)
    assert (places.act >= least[places.row]).all()
    for latent in range(NUM):
        mine = places.row == latent
        cells, acts = world.fit.firings.row(latent)
        strong = cells[acts >= least[latent]]
        documents = np.unique(world.fit.grid.docs.reshape(-1)[strong]).size
        assert mine.sum() == min(16, strong.size)
        assert np.unique(places.document[mine]).size == min(documents, mine.sum())
    order = places.seq_id * LENGTH + places.position
    assert (np.diff(order) >= 0).all()
    # Another selection of latents has the same places.
    some = world.fit._replace(firings=world.fit.firings.select(np.array([7, 3])))
    fewer = choose_places(some, least[[7, 3]], 16, seed=0)
    assert set(fewer.position[fewer.latent == 3]) == set(places.position[places.row == 3])
