"""A model known by hashes: found where it can be, refused where it is another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rldecoder.config.model import RandomModelConfig
from rldecoder.errors import BadInputError
from rldecoder.lm import pins
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.model_sources import Located, SourceUnavailableError
from rldecoder.lm.pins import ModelPin, RandomSource, find_model, pin_model
from rldecoder.lm.random_model import make_random_model
from rldecoder.lm.specs import (
    HfCacheSource,
    HubSource,
    LocalSource,
    ModelRecord,
    WheelSource,
    load_model_spec,
    read_constants,
)
from rldecoder.lm.user_cache import sha256_file

SIZES = RandomModelConfig(n_layer=1, d_model=8, n_head=2, vocab_size=260, n_positions=16)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_model(tmp_path_factory.mktemp("model") / "m", seed=3, **SIZES.model_dump())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLDECODER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def record_of(folder: Path, source: dict[str, str]) -> ModelRecord:
    lm = FrozenLM.load(folder)
    weights = {path.name: sha256_file(path) for path in folder.glob("model*.safetensors")}
    parameters = sum(parameter.numel() for parameter in lm.model.parameters())
    return ModelRecord(
        name="toy", title="Toy", licence="MIT", hook_layer=None, compute_dtype="float32",
        source=source, weights_sha256="0" * 64, weight_files=weights,
        **read_constants(lm.model.config, parameters).model_dump(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pin(folder: Path) -> ModelPin:
    source = RandomSource(seed=3, sizes=SIZES)
    return pin_model(folder, record_of(folder, {"kind": "random"}), [source])


def silent(text: str) -> None:
    pass


def test_a_random_model_is_made_again_and_kept(pin: ModelPin, folder: Path) -> None:
    made = find_model(pin, silent)
    assert made != folder
    weights = made / "model.safetensors"
    assert weights.read_bytes() == (folder / "model.safetensors").read_bytes()
    before = weights.stat()
    assert find_model(pin, silent) == made
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # in the cache: made once more
    assert find_model(pin, silent) == made
    assert sha256_file(weights) == pin.weights["model.safetensors"]


def test_another_seed_is_refused(pin: ModelPin) -> None:
    other = pin.model_copy(update={"sources": (RandomSource(seed=4, sizes=SIZES),)})
    with pytest.raises(BadInputError, match=r"toy was not found.*another one here.*SHA-256"):
        find_model(other, silent)


def test_where_a_pin_looks(folder: Path) -> None:
    """The commit that was read, whatever the config says; the wheel that was; no folder."""
    spec = load_model_spec("smollm2-135m-instruct")
    (wheel,) = (source for source in spec.sources if isinstance(source, WheelSource))
    other = wheel.model_copy(update={"member_sha256": "1" * 64})
    given = [LocalSource(path="/models/x"), wheel, other, HubSource(repo="a/b")]
    hub = pin_model(folder, record_of(folder, {"kind": "hub", "hub": f"o/n@{COMMIT}"}), given)
    assert hub.sources == (
        HfCacheSource(repo="o/n", revision=COMMIT),
        HubSource(repo="o/n", revision=COMMIT),
    )
    converted = record_of(folder, {"kind": "wheel", "gguf": wheel.member_sha256})
    assert pin_model(folder, converted, given).sources == (wheel, HubSource(repo="a/b"))
    assert pin_model(folder, record_of(folder, {"kind": "local"}), given[:1]).sources == ()


def test_a_given_folder_is_compared_in_every_file(
    pin: ModelPin, folder: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    assert find_model(pin, silent, own) == own
    config = own / "config.json"
    settings = json.loads(config.read_text())

    # Who saved it where makes no other model; what it says does.
    config.write_text(json.dumps({**settings, "transformers_version": "9", "_name_or_path": "/x"}))
    assert find_model(pin, silent, own) == own
    (own / "README.md").write_text("anything")
    (own / "generation_config.json").unlink()  # made from config.json where it is absent
    assert find_model(pin, silent, own) == own

    def refused(why: str) -> None:
        with pytest.raises(BadInputError, match=rf"is not toy, .*The difference: {why}"):
            find_model(pin, silent, own)

    config.write_text(json.dumps({**settings, "n_head": 1}))
    refused("config.json says something else")
    config.write_text(json.dumps(settings))
    (own / "added_tokens.json").write_text("{}")
    refused("added_tokens.json is not pinned")
    (own / "added_tokens.json").unlink()
    (own / "tokenizer_config.json").rename(own / "moved")
    refused("tokenizer_config.json is missing")
    (own / "moved").rename(own / "tokenizer_config.json")
    shutil.copy(own / "model.safetensors", own / "model-2.safetensors")
    refused("model-2.safetensors is not pinned")
    (own / "model-2.safetensors").unlink()
    weights = bytearray((own / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (own / "model.safetensors").write_bytes(weights)
    refused("model.safetensors has another SHA-256")


def test_sources_are_tried_in_order_and_each_says_why_not(
    pin: ModelPin, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = HubSource(repo="a/here"), HubSource(repo="a/there")
    fetched: list[str] = []

    def locate_one(source: HubSource) -> Located:
        if source == here:
            raise SourceUnavailableError("no reachable a/here")
        return Located(source, "the hub (a/there)", {}, None)

    def fetch(located: Located, note: object) -> Path:
        fetched.append(located.description)
        return folder

    monkeypatch.setattr(pins, "locate_one", locate_one)
    monkeypatch.setattr(pins, "fetch", fetch)
    both = pin.model_copy(update={"sources": (here, there)})
    assert find_model(both, silent) == folder
    assert fetched == ["the hub (a/there)"]
    wrong = both.model_copy(update={"weights": {"model.safetensors": "0" * 64}})
    with pytest.raises(BadInputError, match=r"no reachable a/here; the hub .* has another model"):
        find_model(wrong, silent)
    with pytest.raises(BadInputError, match=r"a folder on the machine of the run.*--model FOLDER"):
        find_model(pin.model_copy(update={"sources": ()}), silent)
