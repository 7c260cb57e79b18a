"""Inputs of the RL stages: the decoder stages' tiny artifacts and an untrained decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rldecoder.artifacts.catalogue import Policy, SupervisedDecoder
from rldecoder.config.rl import PpoSettings, PpoStage, TrainPpoConfig
from rldecoder.decoder.loading import decoder_from_lens, read_affine_lens, save_decoder
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.stages.inputs import ControlInputs, PpoInputs
from tests.stages.decoder_inputs import HOOK_LAYER, make_inputs
from tests.stages.published import inputs_in


def small_config(**changes: Any) -> TrainPpoConfig:
    """Three PPO steps, one a stage."""
    stages = tuple(
        PpoStage(steps=1, faithfulness=f, monosemanticity=m, task=t)
        for f, m, t in ((0.5, 0.3, 0.2), (0.4, 0.3, 0.3), (0.3, 0.2, 0.5))
    )
    ppo = PpoSettings(batch_size=4, inner_epochs=2, replay_tokens=16, critic_width=8, lr=1e-3)
    defaults = {"eval_prompts": 2, "eval_tokens": 60, "checkpoint_every_steps": 1}
    return TrainPpoConfig(**{"stages": stages, "ppo": ppo, **defaults, **changes})


def make_rl_inputs(folder: Path, model_folder: Path, blocks: Sequence[int] = ()) -> PpoInputs:
    """Artifacts that `train_ppo` reads; the decoder has these blocks of the frozen model."""
    made = make_inputs(folder, model_folder)
    lm, sae = made.model.load(), made.sae.load()
    decoder = decoder_from_lens(lm, sae, read_affine_lens(made.baselines.affine_lens, HOOK_LAYER))
    if blocks:
        decoder = new_decoder(lm, sae, blocks)
        decoder.blocks.copy_from(lm.base)
    save_decoder(decoder, SupervisedDecoder.decoder.path(folder / SupervisedDecoder.stage))
    return inputs_in(PpoInputs, folder)


def with_policy(inputs: PpoInputs, policy: Policy) -> ControlInputs:
    """The same beside a trained policy."""
    return ControlInputs(**inputs._asdict(), policy=policy)
