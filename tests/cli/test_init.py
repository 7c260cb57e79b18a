"""`rldecoder init`: a config for one's own text that is complete, fits it, and can be run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rldecoder.artifacts.store import ArtifactStore
from rldecoder.cli.init import Asked, write_config
from rldecoder.config.own_text import (
    LENGTH,
    TASK_TOKENS,
    OwnText,
    few_blocks,
    fit_budgets,
    own_text_yaml,
)
from rldecoder.config.run import RunConfig, load_run_config
from rldecoder.errors import BadInputError
from rldecoder.planning import throughput
from rldecoder.run import Run
from rldecoder.stages.table import STAGES
from tests.conftest import ROOT

TOKENS = {"train": 95_000, "validation": 7_500, "label": 12_500, "test": 10_000}


pytestmark = pytest.mark.usefixtures("own_cache")


def asked(tmp_path: Path, model: Path, *text: Path, **changes: object) -> Asked:
    base = Asked(
        tmp_path / "mine.yaml", str(model), text, "text", None, (), None, 10, overwrite=False
    )
    return base._replace(**changes)


def written(given: Asked) -> tuple[RunConfig, str]:
    console = Console(record=True, width=80)
    write_config(given, console)
    return load_run_config(given.out), console.export_text()


def test_one_long_file_becomes_a_config_that_can_be_planned(
    tmp_path: Path, tiny_lm_dir: Path
) -> None:
    book = tmp_path / "A book.txt"
    book.write_text("\n\n".join(f"Chapter {i} tells of the {i}th day. " * 9 for i in range(400)))
    run, said = written(asked(tmp_path, tiny_lm_dir, book))
    assert (run.name, run.sync_tokenizer.path) == ("mine", str(tiny_lm_dir))
    assert run.cache_activations.hook_layer == run.train_decoder.depth == 2  # of 4 blocks
    assert run.ingest.max_document_chars is None
    (source, tasks) = run.ingest.sources
    assert source.paths == (str(book),)  # type: ignore[union-attr]
    assert source.document_chars is not None  # type: ignore[union-attr]
    assert tasks.type == "tasks"
    budget = run.ingest.budget_tokens
    assert all(n % LENGTH == 0 for n in budget.model_dump().values())
    assert budget == run.cache_activations.budget_tokens
    assert "Few long files: cut at paragraphs" in said
    assert "time: about" in said
    assert "out of domain: Python source code of the standard library" in " ".join(said.split())
    assert f"next: rldecoder run {tmp_path}" in said.replace("\n", "")
    # Every stage has an address: the config can be run as it is.
    refs = Run(run, ArtifactStore(tmp_path / "store")).refs
    assert list(refs) == [stage.name for stage in STAGES]
    # The speed that was measured is there for other plans, unless other work was in the way.
    kept = [one.model for one in throughput.measured()]
    assert kept == ([] if "other work is in the way" in said else [str(tiny_lm_dir)])
    with pytest.raises(BadInputError, match="is there already"):
        written(asked(tmp_path, tiny_lm_dir, book))


@pytest.mark.parametrize("name", ["2024", "no", "my-notes"])
def test_any_file_name_names_a_run(name: str) -> None:
    """YAML reads a bare 2024 as a number and a bare `no` as false."""
    text = OwnText(
        name=name, command="rldecoder init", model="smollm2-135m-instruct", num_layers=30,
        hook_layer=27, sources=({"type": "local", "paths": ["a.txt"]},),
        ood_sources=({"type": "pysource"},), ood_said="code", text_said=("one",), tokens=TOKENS,
    )  # fmt: skip
    written = own_text_yaml(text, fit_budgets(TOKENS, 95_000))
    assert RunConfig.model_validate(yaml.safe_load(written)).name == name


def test_what_cannot_be_a_run_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_lm_dir: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Not much. " * 100)
    for given, words in (
        (asked(tmp_path, tiny_lm_dir, short), "too short for a run"),
        (asked(tmp_path, tiny_lm_dir, tmp_path / "absent.txt"), "absent"),
    ):
        with pytest.raises(BadInputError, match=words):
            written(given)
        assert not given.out.exists()


def text(**changes: object) -> OwnText:
    values = {
        "name": "mine", "command": "rldecoder init", "model": "org/some-model", "num_layers": 30,
        "hook_layer": few_blocks(30), "ood_said": "code", "text_said": ("n",), "tokens": TOKENS,
        "sources": ({"type": "local", "paths": ['a "b".txt', "ü: c"]},),
        "ood_sources": ({"type": "pysource"},),
    }  # fmt: skip
    return OwnText.model_validate(values | changes)


def test_budgets_follow_the_text_and_the_time() -> None:
    assert [few_blocks(n) for n in (4, 12, 30, 32)] == [2, 10, 27, 29]
    all_of_it = fit_budgets(TOKENS, 10**9)
    assert all_of_it.splits["train"] == 95_000 // LENGTH * LENGTH + TASK_TOKENS
    assert all_of_it.decoder == all_of_it.splits["train"] // 4
    assert all_of_it.splits["test"] == 10_000 // LENGTH * LENGTH
    less_time = fit_budgets(TOKENS, 50_000)
    assert less_time.splits["train"] == 50_000 // LENGTH * LENGTH
    assert less_time.sae_visits < all_of_it.sae_visits <= 900_000
    assert less_time.decoder < all_of_it.decoder
    tiny = fit_budgets(dict.fromkeys(TOKENS, 3000), 10**9)
    run = RunConfig.model_validate(yaml.safe_load(own_text_yaml(text(), tiny)))
    # Nothing asks for more tokens than there are.
    assert run.gate_decoder.test_tokens <= tiny.splits["test"]
    assert run.train_decoder.validation_tokens <= tiny.splits["validation"]
    assert run.gate_sae.splice_sequences * LENGTH <= tiny.splits["test"]


def test_names_and_paths_survive_yaml() -> None:
    run = RunConfig.model_validate(
        yaml.safe_load(own_text_yaml(text(), fit_budgets(TOKENS, 10**9)))
    )
    assert run.sync_tokenizer.repo == "org/some-model"
    assert run.ingest.sources[0].paths == ('a "b".txt', "ü: c")  # type: ignore[union-attr]
    odd = text(command="init 'a\nb'", ood_said="x\ny: z", model="my: spec.yaml")
    read = yaml.safe_load(own_text_yaml(odd, fit_budgets(TOKENS, 10**9)))
    assert read["sync_tokenizer"]["model"] == "my: spec.yaml"
    assert read.keys() >= run.model_fields_set


def test_the_example_is_what_init_writes() -> None:
    path = ROOT / "configs" / "own_text.yaml"
    example = yaml.safe_load(path.read_text())
    assert load_run_config(path).cache_activations.hook_layer == few_blocks(30)
    made = yaml.safe_load(own_text_yaml(text(), fit_budgets(TOKENS, 10**9)))

    def keys(value: object) -> object:
        return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None

    assert keys(example) == keys(made)
    comments = [line for line in path.read_text().splitlines() if "#" in line]
    assert len(comments) > 25
