"""Answers in shards are those of one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rldecoder.decoder.loading import save_decoder
from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.evals import answer_shards
from rldecoder.evals.answer_shards import AnswerSettings, AnswerWorker, Asked
from rldecoder.evals.generation import prefix_generate
from rldecoder.evals.prompts import TaskPrompt, make_prompts
from rldecoder.evals.tasks import TaskRow, run_task
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.stages.context import StageContext

BATCH = 2


@pytest.fixture(scope="module")
def lm(tiny_lm_dir: Path) -> FrozenLM:
    return FrozenLM.load(tiny_lm_dir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the decoder and its SAE."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def decoder(lm: FrozenLM, folder: Path) -> SaeDecoderForCausalLM:
    sae = Sae.random_init(SaeSpec(d_model=lm.d_model, num_latents=96, k=16, hook_layer=2), seed=0)
    made = new_decoder(lm, sae)
    with torch.no_grad():
        made.W.copy_(sae.W_dec)
    sae.save(folder / "sae")
    save_decoder(made, folder / "decoder")
    return made


@pytest.fixture(scope="module")
def prompts() -> list[TaskPrompt]:
    """Of one task more than a shard holds, and no whole number of batches."""
    return [*make_prompts("addition", "test", 7, 0), *make_prompts("cloze", "test", 3, 0)]


@pytest.fixture
def settings(
    decoder: SaeDecoderForCausalLM, folder: Path, prompts: list[TaskPrompt], tiny_lm_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AnswerSettings:  # fmt: skip
    """Of the decoder, which is saved by now."""
    monkeypatch.setattr(answer_shards, "SHARD_PROMPTS", 5)
    return AnswerSettings(
        model=tiny_lm_dir, record=folder / "none", sae=folder / "sae",
        decoders={"rl": folder / "decoder"}, prompts=tuple(prompts), batch_size=BATCH,
    )  # fmt: skip


def test_shards_end_with_batches_and_tasks(settings: AnswerSettings) -> None:
    runs = [(0, 4), (4, 7), (7, 10)]
    assert settings.asked() == [Asked(name, *run) for name in ("frozen", "rl") for run in runs]
    assert [file.size for file in settings.shards()] == [4, 3, 3] * 2
    large = settings.model_copy(update={"batch_size": 8})
    assert large.asked()[:2] == [Asked("frozen", 0, 7), Asked("frozen", 7, 10)]
    assert large.batching() != settings.batching()


def test_shards_answer_what_one_pass_answers(
    settings: AnswerSettings, decoder: SaeDecoderForCausalLM, lm: FrozenLM,
    prompts: list[TaskPrompt], context: Callable[..., StageContext],
) -> None:  # fmt: skip
    found: dict[str, list[TaskRow]] = {"frozen": [], "rl": []}
    parts = context().shards.results(AnswerWorker, settings, [], "answers", "tasks")
    for asked, rows in zip(settings.asked(), parts, strict=True):
        found[asked.system] += rows
    for name, model in (("frozen", lm.model), ("rl", decoder)):
        expected = run_task(
            prefix_generate(model), prompts, lm.tokenizer, batch_size=BATCH,
            end_ids=lm.end_token_ids,
        ).rows  # fmt: skip
        assert found[name] == expected
    said = {name: [row.completion for row in rows] for name, rows in found.items()}
    assert said["frozen"] != said["rl"]
    assert any(said["rl"])


def test_settings_survive_their_json(settings: AnswerSettings) -> None:
    """As they reach a worker, prompts of files with passages and several answers among them."""
    asked = TaskPrompt(
        "mine", "test", 0, "Wer fragt?\n\x00\u2028é", "a", "f1", 3, ("a", "b"), "passage 1"
    )
    whole = settings.model_copy(update={"prompts": (*settings.prompts, asked)})
    assert AnswerSettings.model_validate_json(whole.model_dump_json()) == whole
