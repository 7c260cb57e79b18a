"""Specs: all load, and their constants rebuild models of exactly the stated size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Phi3Config

from rldecoder.errors import BadInputError
from rldecoder.lm.specs import (
    SPEC_FOLDER,
    check_constants,
    list_model_specs,
    load_model_spec,
    read_constants,
    stated_context_length,
)

NAMES = [
    "Llama-3.1-8B", "Llama-3.2-1B", "Meta-Llama-3-8B", "gemma-2-2b", "gemma-2-9b", "gemma-2b",
    "gemma-3-1b-pt", "gemma-3-270m", "gemma-3-4b-pt", "gpt2-medium", "gpt2_phase1", "phi-2",
    "pythia-1.4b", "pythia-160m", "qwen3-0.6b", "qwen3-4b", "smollm2-135m-instruct",
]  # fmt: skip


def test_all_models_of_the_plan_are_there() -> None:
    assert list_model_specs() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_constants_make_a_model_of_the_stated_size(name: str) -> None:
    stated = load_model_spec(name).architecture
    settings: dict[str, Any] = {
        "hidden_size": stated.d_model,
        "num_hidden_layers": stated.num_layers,
        "num_attention_heads": stated.num_heads,
        "vocab_size": stated.vocab_size,
        "max_position_embeddings": stated.context_length,
        "tie_word_embeddings": stated.tied_embeddings,
    }
    if stated.model_type not in ("gpt2", "gpt_neox", "phi"):
        settings |= {"num_key_value_heads": stated.num_kv_heads, "head_dim": stated.head_dim}
    if stated.model_type != "gpt2":
        settings["intermediate_size"] = stated.d_mlp
    config = AutoConfig.for_model(stated.model_type, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == stated.parameters
    check_constants(load_model_spec(name), read_constants(config, parameters), "here")


@pytest.mark.parametrize("name", NAMES)
def test_every_source_is_pinned(name: str) -> None:
    spec = load_model_spec(name)
    assert spec.sources[0].kind == "local"
    for source in spec.sources[1:]:
        if source.kind == "wheel":
            assert len(source.sha256) == len(source.member_sha256) == 64
        else:
            assert source.kind in ("hf_cache", "hub")
            assert len(source.revision) == 40
    assert spec.licence


def test_the_plans_first_model_has_the_plans_numbers() -> None:
    spec = load_model_spec("gpt2_phase1")
    found = spec.architecture
    assert (found.num_layers, found.d_model, found.num_heads) == (12, 768, 12)
    assert (found.vocab_size, spec.hook_layer) == (50257, 6)


def test_mismatches_are_all_named() -> None:
    spec = load_model_spec("gpt2_phase1")
    small = GPT2Config(n_layer=6, n_embd=768, n_head=12, vocab_size=50000)
    with pytest.raises(BadInputError, match=r"num_layers is 6, not 12; vocab_size is 50000"):
        check_constants(spec, read_constants(small, spec.architecture.parameters), "here")


def test_a_context_ends_where_positions_are_told_apart_in_a_second_way() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"type": "longrope", **factors}
    config = Phi3Config(
        num_attention_heads=4, hidden_size=32, max_position_embeddings=128, rope_parameters=rope,
        original_max_position_embeddings=16,
    )  # fmt: skip
    assert stated_context_length(config) == 16
    # As in a config.json, of old and new form, and by kind of block.
    for said in (
        {"rope_scaling": rope, "original_max_position_embeddings": 16},
        {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 16}},
        {"rope_parameters": {"full_attention": rope | {"original_max_position_embeddings": 16}}},
    ):
        assert stated_context_length(SimpleNamespace(max_position_embeddings=128, **said)) == 16
    one_way = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    plain = SimpleNamespace(max_position_embeddings=128, rope_parameters=one_way)
    assert stated_context_length(plain) == 128
    assert stated_context_length(SimpleNamespace()) is None


def test_a_spec_of_ones_own_is_read_by_path(tmp_path: Path) -> None:
    values = yaml.safe_load((SPEC_FOLDER / "gpt2-medium.yaml").read_text())
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values | {"name": "mine", "hook_layer": 3}))
    assert load_model_spec(str(path)).hook_layer == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hook_layer": 25}, "Hook layer 25 .* out of range"),
        ({"name": "other"}, "calls itself 'other'"),
        ({"colour": "blue"}, "colour"),
        ({"sources": []}, "sources"),
        ({"sources": [{"kind": "torrent"}]}, "torrent"),
        ({"file_sha256": {"vocab.json": "abc"}}, "file_sha256"),
    ],
)
def test_bad_specs_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = yaml.safe_load((SPEC_FOLDER / "gpt2-medium.yaml").read_text())
    (tmp_path / "gpt2-medium.yaml").write_text(yaml.safe_dump(values | change))
    with pytest.raises(BadInputError, match=message):
        load_model_spec("gpt2-medium", tmp_path)


def test_unknown_names_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"Known models: .*smollm2-135m-instruct"):
        load_model_spec("gpt5")
    with pytest.raises(BadInputError, match="No model specs"):
        list_model_specs(tmp_path / "nowhere")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(BadInputError, match="not valid"):
        load_model_spec(str(tmp_path / "broken.yaml"))
