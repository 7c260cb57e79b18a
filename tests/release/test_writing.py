"""A release is written whole or not at all, over nothing, and says nothing of the machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig

import rldecoder
from rldecoder.artifacts.catalogue import FinalDecoder, Labels, SupervisedDecoder, TrainedSae
from rldecoder.artifacts.manifests import MANIFEST
from rldecoder.config.data import LocalSource
from rldecoder.data.provenance import Provenance, SourceProvenance
from rldecoder.decoder.modeling_sae_decoder import new_decoder
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.release.card import model_card
from rldecoder.release.contents import ReleasedCorpus, ReleaseInputs
from rldecoder.release.leaks import require_no_leaks, without_places
from rldecoder.release.manifest import CARD, SUFFIXES, read_release, verify_release
from rldecoder.release.writing import _forget_folder, write_release
from rldecoder.run import Run
from rldecoder.sae.model import Sae
from rldecoder.sae.spec import SaeSpec
from tests.release.conftest import CONFIG, Released

KEY = "hf_" + "aB3dE5gH7jK9" * 3


def test_files_are_the_stores_own_and_of_three_kinds(released: Released, run: Run) -> None:
    manifest = read_release(released.root)
    assert set(manifest.files) == {
        path.relative_to(released.root).as_posix()
        for path in released.root.rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    assert all(name == CARD or name.endswith(SUFFIXES) for name in manifest.files)
    for kind, name in ((Labels, Labels.labels.name), (FinalDecoder, "decoder/model.safetensors")):
        ours = (released.root / kind.kind / name).read_bytes()
        assert ours == (run.artifact(kind).folder / name).read_bytes()
    assert not (released.root / "model" / "model").exists()
    assert not [name for name in manifest.files if "pairs" in name and "explainer" in name]


def test_the_same_run_gives_the_same_bytes(run: Run, tmp_path: Path, released: Released) -> None:
    again = write_release(run, tmp_path / "again")
    assert SupervisedDecoder.stage not in again.artifacts
    other = read_release(released.root)
    shared = {name for name in again.files if name not in (CARD, MANIFEST)}
    assert {name: again.files[name] for name in shared} == {n: other.files[n] for n in shared}
    assert write_release(run, tmp_path / "third") == again


def test_nothing_in_it_tells_of_the_machine(released: Released, debug_store: Path) -> None:
    places = [released.store, debug_store, Path.cwd(), CONFIG.parent, released.root]
    needles = [str(place).encode() for place in places]
    for path in released.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += repr(pq.read_table(path).to_pydict()).encode()
            assert [needle for needle in needles if needle in data] == [], path
            assert os.fsencode(os.uname().nodename) not in data or len(os.uname().nodename) < 6


def test_a_run_that_names_places_and_a_pasted_key(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings lose their places; what cannot lose them is refused, and leaves nothing behind."""
    labels = run.config.label_features.model_copy(update={"reviews": tmp_path / "who" / "r.jsonl"})
    source = LocalSource(paths=(str(tmp_path / "texts" / "a.txt"),))
    ingest = run.config.ingest.model_copy(update={"sources": (source,)})
    told = Run(
        run.config.model_copy(update={"label_features": labels, "ingest": ingest}),
        run.store,
        refs=run.refs,
    )
    write_release(told, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["stages"]["ingest"]["sources"][0]["paths"] == ["a.txt"]
    assert str(tmp_path) not in (tmp_path / "out" / "settings.json").read_text()

    for text, message in ((KEY, "a key of a service"), (f"see {run.store.root}/x", "a path of")):
        monkeypatch.setattr("rldecoder.release.card.model_card", lambda *_, text=text: text)
        with pytest.raises(BadInputError, match=f"README.md holds .*{message}") as caught:
            write_release(run, tmp_path / "leaking")
        assert KEY not in str(caught.value)
        assert not list(tmp_path.glob("*leaking*"))


def test_leaks_are_found_wherever_text_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, place = "s3cret-value-of-mine", "/some/where/of/mine"
    monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
    for text in (secret, KEY, f"{place}/x"):
        (tmp_path / "a.json").write_text(json.dumps({"x": [text]}))
        nested = pa.table({"a": [[text]], "b": [{"c": text}], "d": [text]})
        for column in nested.column_names:
            pq.write_table(nested.select([column]), tmp_path / f"{column}.parquet")
        save_file({"w": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"from": text})
        (tmp_path / "README.md").write_text(f"made in {text}")
        names = ["a.json", "a.parquet", "b.parquet", "d.parquet", "m.safetensors", "README.md"]
        for name in names:
            with pytest.raises(BadInputError, match=re.escape(name)) as caught:
                require_no_leaks(tmp_path, [name], [place])
            assert secret not in str(caught.value)
    (tmp_path / "a.json").write_text('{"x": "nothing of the sort, not even /root or a/b"}')
    require_no_leaks(tmp_path, ["a.json"], [place, "/root"])
    (tmp_path / "a.json").write_text('{"x": "/root/secret"}')
    with pytest.raises(BadInputError, match="path of this machine, /root"):
        require_no_leaks(tmp_path, ["a.json"], ["/root"])


def test_places_lose_all_but_their_last_part() -> None:
    value = {
        "paths": ["/data/ann/texts/", "texts/a.txt", "~/x.csv", r"C:\Users\ann\b.txt"],
        "/data/k.txt": 3,
        "url": "https://example.org/a",
        "share": r"\\host\c.txt",
    }
    assert without_places(value) == {
        "paths": ["texts", "texts/a.txt", "x.csv", "b.txt"],
        "k.txt": 3,
        "url": "https://example.org/a",
        "share": "c.txt",
    }
    source = SourceProvenance(documents=1, tokens=2, licences=("CC-BY-4.0",))
    provenance = Provenance(
        context_length=8,
        splits={},
        sources={"/home/ann/private": source},
        dropped_documents={},
        fingerprint={"0.local./home/ann/private/a.txt": "0"},
    )
    corpus = ReleasedCorpus.of(provenance)
    assert (corpus.sources[0].name, corpus.licences) == ("private", ["CC-BY-4.0"])
    assert "/home" not in corpus.model_dump_json()


def test_nothing_is_overwritten_unasked(run: Run, copied: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(BadInputError, match="holds something already, which is no release"):
            write_release(run, full, overwrite=overwrite)
    assert (full / "thesis.txt").read_text() == "mine"

    with pytest.raises(BadInputError, match="is a release already"):
        write_release(run, copied)
    verify_release(copied, read_release(copied))
    write_release(run, copied, overwrite=True)
    assert SupervisedDecoder.stage not in read_release(copied).artifacts
    verify_release(copied, read_release(copied))
    (tmp_path / "empty").mkdir()
    write_release(run, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "release", "empty"}


def test_what_was_changed_in_the_store_is_not_released(debug_store: Path, tmp_path: Path) -> None:
    store = Path(shutil.copytree(debug_store, tmp_path / "store"))
    run = rldecoder.open_run(CONFIG, store)
    inputs = run.inputs(ReleaseInputs)  # verified once, and remembered
    weights = inputs.final.folder / "decoder" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"model.safetensors"):
        write_release(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    shutil.rmtree(store / "evaluate")
    with pytest.raises(BadInputError, match=r"not come far enough to be released.*"):
        write_release(rldecoder.open_run(CONFIG, store), tmp_path / "out")


def test_the_card_is_the_hubs_and_honest(released: Released, run: Run) -> None:
    card = (released.root / CARD).read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "rl-decoder"
    assert (fields["license"], fields["license_name"]) == ("other", "none: random weights")
    order = [body.index(f"\n## {part}") for part in ("What not", "Numbers", "Licences", "How it")]
    assert order == sorted(order)
    # Numbers beside their controls, with the ends of their intervals.
    test = run.artifact("evaluate").faithfulness["test"]["supervised"]
    assert f"{test.kl:.3f} \\[{test.kl_low:.3f}, {test.kl_high:.3f}\\]" in body
    for control in ("shuffled labels", "random SAE", "before any training", "random reward"):
        assert control in body
    for caveat in run.artifact("train_explainer").caveats:
        assert caveat.split("[")[0].replace("_", "\\_") in body
    assert "PSF-2.0" in body  # of the text
    assert re.findall(r"…|\{\{|None", body) == []
    assert len([line for line in body.splitlines() if line.startswith("| ")]) > 60


def test_the_cards_licences(released: Released, run: Run) -> None:
    from rldecoder.lm.pins import ModelPin
    from rldecoder.lm.specs import HubSource

    pin = ModelPin.load(released.root / "model" / "pin.json")
    hub = pin.model_copy(update={"sources": (HubSource(repo="ann/base", revision="0" * 40),)})
    inputs = run.inputs(ReleaseInputs)
    corpus = ReleasedCorpus.of(inputs.corpus.provenance)
    card = model_card(inputs, read_release(released.root), hub, corpus, "CC-BY-4.0")
    fields = yaml.safe_load(card.split("---\n", 2)[1])
    assert (fields["license"], fields["base_model"]) == ("cc-by-4.0", "ann/base")
    assert "license_name" not in fields
    assert "CC-BY-4.0, as far as the others allow" in card


def test_what_is_others_is_not_called_ours(released: Released, run: Run) -> None:
    """A published SAE and labels of others keep their own licences."""
    from rldecoder.interp.imported_labels import ImportedLabels, OthersSummary
    from rldecoder.lm.pins import ModelPin
    from rldecoder.sae.pretrained import SaeSource

    sae, labels = replace(run.artifact(TrainedSae)), replace(run.artifact(Labels))
    sae.__dict__["source"] = SaeSource.model_construct(
        form="gemma_scope", weights_sha256="ab" * 32, hook_name="blocks.12.hook_resid_post"
    )
    nothing = OthersSummary(latents=0, accepted=0, means={})
    labels.__dict__["imported"] = ImportedLabels.model_construct(
        source="12-res", model="gemma-2-2b", latents=3, unscored={"no tokens": 3},
        methods=dict.fromkeys(("imported", "shuffled", "random_sae", "ours"), nothing),
    )  # fmt: skip
    inputs = run.inputs(ReleaseInputs)._replace(sae=sae, labels=labels)
    corpus = ReleasedCorpus.of(inputs.corpus.provenance)
    pin = ModelPin.load(released.root / "model" / "pin.json")
    card = model_card(inputs, read_release(released.root), pin, corpus)
    chain = card[card.index("## Licences") : card.index("## How it was made")]
    places = [chain.index(f"\n{number}. **{what}") for number, what in enumerate(
        ("The frozen model", "The text", "The SAE", "Labels of others", "What is ours"), 1
    )]  # fmt: skip
    assert places == sorted(places)
    assert "(decoder, explainer, labels, scores)" in chain
    assert "labels of others, control: shuffled" in card


def test_a_decoder_with_blocks_does_not_say_where_its_model_lay(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    lm = FrozenLM.load(tiny_llama_dir)
    spec = SaeSpec(d_model=lm.d_model, num_latents=128, k=6, hook_layer=2, model_name="tiny")
    sae = Sae.random_init(spec, seed=1)
    new_decoder(lm, sae, [2, 3]).save_pretrained(tmp_path)
    config, released = tmp_path / "config.json", AutoConfig.from_pretrained(tmp_path)
    assert str(tiny_llama_dir) not in config.read_text()

    # As older versions wrote it, and released it could not be.
    settings = json.loads(config.read_text())
    settings["block_config"]["_name_or_path"] = str(tiny_llama_dir)
    config.write_text(json.dumps(settings))
    with pytest.raises(BadInputError, match="path of this machine"):
        require_no_leaks(tmp_path, [config.name], [tiny_llama_dir])
    _forget_folder(config)
    require_no_leaks(tmp_path, [config.name], [tiny_llama_dir])
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == released.to_dict()
