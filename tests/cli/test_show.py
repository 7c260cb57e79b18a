"""The commands that only look, without a process of their own for each."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.cli.show import show_devices, show_explanation, show_models, show_status
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError
from rldecoder.run import Run
from tests.artifacts.published import REF, manifest, publish


def shown(store: ArtifactStore, config: RunConfig, width: int = 200, verify: bool = False) -> str:
    console = Console(record=True, width=width)
    show_status(Run(config, store, refs={REF.stage: REF}), console, verify=verify)
    return console.export_text()


def test_status_tells_what_is_there(tmp_path: Path, config: RunConfig) -> None:
    store = ArtifactStore(tmp_path)
    assert "missing" in shown(store, config)
    (store.progress_path(REF) / "part").mkdir(parents=True)
    assert "interrupted, resumable" in shown(store, config)
    file = publish(store)
    assert "published, gate failed" in shown(store, config)
    whole = file.read_bytes()
    file.write_bytes(whole + b"more")
    assert "damaged, will be rebuilt" in shown(store, config)
    # Of the same size: only hashing sees it, which `status` does where it is asked to.
    file.write_bytes(bytes(len(whole)))
    assert "damaged" not in shown(store, config)
    assert "damaged, will be rebuilt" in shown(store, config, verify=True)
    assert max(map(len, shown(store, config, width=80).splitlines()[1:])) <= 80


@pytest.mark.parametrize("caveats", [[], ["the text is short"]])
def test_status_of_what_passed(tmp_path: Path, config: RunConfig, caveats: list[str]) -> None:
    store = ArtifactStore(tmp_path)
    with store.building(REF) as folder:
        store.publish(REF, folder, manifest(verdict="pass", caveats=caveats, device="[red]cpu"))
    text = shown(store, config)
    assert "published" in text
    assert "failed" not in text
    assert ("with caveats" in text) == bool(caveats)
    assert "[red]cpu" in text  # no markup of somebody else's is obeyed


@pytest.mark.parametrize(("prompt", "what"), [("  ", "empty"), ("\udcff", "Unicode")])
def test_a_prompt_that_cannot_be_read_is_refused(
    tmp_path: Path, config: RunConfig, prompt: str, what: str
) -> None:
    with pytest.raises(BadInputError, match=what):
        show_explanation(Run(config, ArtifactStore(tmp_path)), prompt, Console())


def test_models_and_devices_are_tables() -> None:
    console = Console(record=True, width=200)
    show_models(console)
    show_devices(console)
    narrow = Console(record=True, width=80)
    show_models(narrow)
    show_devices(narrow)
    assert "…" not in narrow.export_text()
    text = console.export_text()
    assert "smollm2-135m-instruct" in text
    assert "gpt2" in text
    assert "cpu" in text.lower()
