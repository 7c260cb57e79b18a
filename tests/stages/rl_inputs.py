"""Inputs of the RL stages: the decoder stages' tiny artifacts and an untrained decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rldecoder.config.rl import PpoSettings, PpoStage, TrainPpoConfig
from rldecoder.decoder.loading import decoder_from_lens, read_affine_lens, save_decoder
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae
from rldecoder.stages.context import InputArtifact, StageOutput
from tests.stages.decoder_inputs import HOOK_LAYER, artifact, make_inputs


def small_config(**changes: Any) -> TrainPpoConfig:
    """Three PPO steps, one a stage."""
    stages = tuple(
        PpoStage(steps=1, faithfulness=f, monosemanticity=m, task=t)
        for f, m, t in ((0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.3, 0.2, 0.5))
    )
    ppo = PpoSettings(batch_size=4, inner_epochs=2, replay_tokens=16, critic_width=8, lr=1e-3)
    defaults = {"eval_prompts": 2, "eval_tokens": 60, "checkpoint_every_steps": 1}
    return TrainPpoConfig(**{"stages": stages, "ppo": ppo, **defaults, **changes})


def make_rl_inputs(
    folder: Path, model_folder: Path, blocks: Sequence[int] = ()
) -> dict[str, InputArtifact]:
    """Artifacts that `train_ppo` reads; the decoder has these blocks of the frozen model."""
    inputs = make_inputs(folder, model_folder)
    lm = FrozenLM.load(folder / "sync_tokenizer" / "model")
    sae = Sae.load(folder / "train_sae" / "sae")
    lens = read_affine_lens(folder / "baselines" / "affine_lens.safetensors", HOOK_LAYER)
    decoder = decoder_from_lens(lm, sae, lens)
    if blocks:
        decoder = new_decoder(lm, sae, blocks)
        decoder.blocks.copy_from(lm.base)
    save_decoder(decoder, folder / "train_decoder" / "decoder")
    return inputs | {name: artifact(folder, name) for name in ("train_decoder", "gate_decoder")}


def as_input(
    name: str, path: Path, output: StageOutput, config: Mapping[str, Any]
) -> InputArtifact:
    """A stage's published folder as the next stage's input."""
    return InputArtifact(name, name, "0" * 16, path, output.metrics, config, output.verdict)
