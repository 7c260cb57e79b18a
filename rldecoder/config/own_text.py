"""The config of a run over one's own text: budgets fitted to it, every one explained.

`rldecoder init` writes it; configs/own_text.yaml is what it writes for the prose that comes with
the project.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from rldecoder.config.base import Config

LENGTH = 256
"""Tokens per sequence."""
SPLITS = ("train", "validation", "label", "test")
LEAST_SEQUENCES = {"train": 32, "validation": 4, "label": 8, "test": 8}
"""Of each split, below which no stage can say anything."""
LEAST_TRAIN = 40_000
"""Training tokens below which more time is worth more than less text."""
MOST_HELD_OUT = {"validation": 8_192, "label": 32_768, "test": 12_288}
"""Tokens: more of them sharpens intervals, and costs time at each measurement."""
OOD_TOKENS = 8_192
TASK_TOKENS = 8_192
"""Of the solved task prompts, which come on top of the text."""
SAE_VISITS = (8, 900_000)
"""Times that each training token is read at most, and visits in all at most."""
DECODER_SHARE, DECODER_LEAST = 4, 16_384
"""One in so many training tokens teaches the decoder; at least so many where there are."""


class OwnText(Config):
    """What a config of one's own text is made from."""

    name: str
    """The run's."""
    command: str
    """That wrote it; a comment."""
    model: str
    """As `sync_tokenizer.model` takes it."""
    model_path: str | None = None
    """Of `model: folder`."""
    num_layers: int
    hook_layer: int
    sources: tuple[dict[str, object], ...]
    """`ingest.sources`, as YAML takes them."""
    ood_sources: tuple[dict[str, object], ...]
    ood_said: str
    """What the out-of-domain text is; a comment."""
    text_said: tuple[str, ...]
    """What was counted; comments, a line each."""
    tokens: dict[str, int]
    """That there are of each split of SPLITS."""
    time_said: str = "not estimated"
    """How long it takes; a comment."""


class Budgets(NamedTuple):
    """Tokens of everything that follows the text."""

    splits: dict[str, int]
    sae_visits: int
    decoder: int
    fit: int
    """For lenses and the decoder's start."""
    expansion: int
    """Latents per residual dimension."""


def few_blocks(num_layers: int) -> int:
    """The hook layer with few blocks above it: what reads it is quick, and near the output.

    A tenth of the blocks, at least two, remain.
    """
    return max(1, num_layers - max(2, round(num_layers / 10)))


def fit_budgets(tokens: Mapping[str, int], most_train: int) -> Budgets:
    """Budgets for so much text.

    Args:
        tokens: that there are of each split.
        most_train: training tokens that there is time for.
    """
    most = {"train": max(most_train, LEAST_TRAIN), **MOST_HELD_OUT}
    splits = {name: min(tokens[name], most[name]) // LENGTH * LENGTH for name in SPLITS}
    if splits["train"] >= tokens["train"] // LENGTH * LENGTH:
        splits["train"] += TASK_TOKENS  # all of the text is used: the prompts push none of it out
    train = splits["train"]
    times, visits = SAE_VISITS
    return Budgets(
        splits={**splits, "ood": OOD_TOKENS},
        sae_visits=min(times * train, visits),
        decoder=min(train, max(train // DECODER_SHARE, DECODER_LEAST)),
        fit=min(train, 16_384),
        # A dictionary that is large for its text has latents that never fire.
        expansion=10 if train >= 100_000 else 6,
    )


def own_text_yaml(text: OwnText, budgets: Budgets) -> str:
    """The config, complete and commented."""
    splits = budgets.splits
    layers = sorted({max(1, text.num_layers // 2), text.hook_layer})
    model = f"model: {_flow(text.model)}"
    if text.model_path is not None:
        model += f"\n  path: {_flow(text.model_path)}"
    said = "\n".join(f"  # {line}" for line in text.text_said)
    sources = "\n".join(f"    - {_flow(source)}" for source in text.sources)
    ood = "\n".join(f"    - {_flow(source)}" for source in text.ood_sources)
    above = text.num_layers - text.hook_layer
    train, validation = splits["train"], splits["validation"]
    label, test = splits["label"], splits["test"]
    times = round(budgets.sae_visits / train)
    about = f"own text, {text.model}, layer {text.hook_layer} of {text.num_layers}"
    return f"""\
# A run over your own text, written by
#   {" ".join(text.command.splitlines())}
# Time: {text.time_said}.
# `rldecoder settings STAGE` lists every setting with its meaning, unit and default.
name: {_flow(text.name)}
description: {_flow(about)}
seed: 0

sync_tokenizer:
  {model}
  compute_dtype: bfloat16  # a CPU that is not faster with it takes float32

ingest:
{said}
  sources:
{sources}
    # Solved training prompts of the two tasks that PPO asks. Without them it cannot learn them.
    - {{type: tasks}}
  # Out of domain, for evaluation only: {" ".join(text.ood_said.splitlines())}
  ood_sources:
{ood}
  context_length: {LENGTH}  # tokens a sequence
  max_document_chars: null  # documents are never cut; a number cuts them, under a caveat
  # Tokens. `train` fits SAE and decoder, `validation` chooses checkpoints, labels are fitted on
  # `label`, and every reported number is of `test` and `ood`. More text: raise `train`.
  budget_tokens: &budget
    {{train: {train}, validation: {validation}, label: {label}, test: {test}, ood: {splits["ood"]}}}

baselines:
  lens_layers: {layers}  # the hook layer must be among them
  fit_tokens: {budgets.fit}  # of train; the lens is a linear map and needs no more
  validation_tokens: {min(2048, validation)}
  eval_tokens: {min(1536, test)}
  num_task_prompts: 24

cache_activations:
  # Few blocks remain above this layer ({above} of {text.num_layers}): the decoder copies all of
  # them and is faithful at once, and exact tests are quick. Below it features are less finished,
  # and all takes longer.
  hook_layer: {text.hook_layer}
  budget_tokens: *budget

train_sae:
  architecture: topk
  expansion: {budgets.expansion}  # latents per residual dimension; 10 wants 100,000 tokens or more
  k: 96  # active latents a token
  # Token visits: each training token is read {times} times. More text helps more than more visits.
  budget_tokens: {budgets.sae_visits}

gate_sae:
  on_fail: warn  # `stop` would end the run where the SAE misses the plan's targets
  splice_sequences: {min(16, test // LENGTH)}

train_decoder:
  # All blocks above the hook layer, copied. That start is good, so the rates are small.
  depth: {above}
  epochs: 1
  # One in {DECODER_SHARE} training tokens, at least {DECODER_LEAST:,}.
  budget_tokens: {budgets.decoder}
  fit_tokens: {budgets.fit}
  validation_tokens: {min(4096, validation)}
  lr: 2.0e-5
  blocks_lr: 6.0e-5

gate_decoder:
  test_tokens: {min(4096, test)}
  on_fail: warn

train_ppo:
  # The quickstart's: what the layer knows and a small model does not say. The reward alone teaches.
  tasks: [kind]
  stages:
    - {{steps: 2, faithfulness: 0.5, monosemanticity: 0.3, task: 0.2}}
    - {{steps: 4, faithfulness: 0.4, monosemanticity: 0.3, task: 0.3}}
    - {{steps: 18, faithfulness: 0.3, monosemanticity: 0.2, task: 0.5}}
  ppo:
    {{inner_epochs: 1, policy_coef: 3, lr: 2.0e-4, blocks_lr: 2.0e-5, adam_eps: 1.0e-6,
      replay_tokens: 256, response_kl_factors: {{kind: 0}},
      interpolation: [1.0, 0.8, 0.6, 0.4], interpolation_max_kl: 0.01}}
  eval_every_steps: 24
  eval_prompts: 16
  checkpoint_every_steps: 12

control_ppo:
  test_prompts: 56
  test_tokens: {min(1024, test)}
  checkpoint_every_steps: 24
  on_fail: warn

rank_features:
  budget_tokens: 1024  # tokens of each domain
  num_prompts: 6
  validation_top: 25
  validation_others: 25

label_features:
  num_features: 150  # the most important latents get labels, each scored on text of `test`
  control_features: 75

train_explainer:
  num_pairs: 2500  # positions with exact ablations; most of this stage's time
  num_test_positions: {max(16, min(300, test // 16))}
  max_candidates: 10

evaluate:
  tasks: [addition, cloze, kind]
  num_prompts: 48  # of each task
  num_tokens: {min(6144, test)}  # of test and of ood
"""


def _flow(value: object) -> str:
    """A value as YAML's flow style, which JSON is."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    plain = isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum()
    if plain and isinstance(value, str) and value[0].isalpha() and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


_WORDS = ("true", "false", "null", "yes", "no", "on", "off")
