"""The baselines stage: files, sanity of the lenses, tasks, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from rldecoder.artifacts.catalogue import Baselines
from rldecoder.config.data import BaselinesConfig
from rldecoder.data.shards import read_tokens
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.evals import baseline_shards
from rldecoder.evals.baseline_shards import BaselineWorker, Tensors
from rldecoder.evals.prompts import make_prompts
from rldecoder.lm.frozen import FrozenLM
from rldecoder.stages.baselines import working_is_right
from rldecoder.stages.context import StageContext
from rldecoder.stages.inputs import TextInputs
from rldecoder.stages.table import stage_named
from tests.stages.published import published
from tests.stages.token_inputs import token_inputs

STAGE = stage_named("baselines")

MakeContext = Callable[..., StageContext]
LENGTH = 32


@pytest.fixture(scope="module")
def inputs(tiny_lm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextInputs:
    sequences = {"train": 40, "validation": 4, "test": 4, "ood": 2}
    return token_inputs(tmp_path_factory.mktemp("ingest"), tiny_lm_dir, LENGTH, sequences)


def settings(**changes: object) -> BaselinesConfig:
    values = {"lens_layers": [1, 3, 4], "eval_tokens": 100, "num_task_prompts": 2}
    return BaselinesConfig.model_validate(values | changes)


def test_files_and_numbers(inputs: TextInputs, context: MakeContext, tiny_lm_dir: Path) -> None:
    ctx = context()
    output = STAGE.run(inputs, settings(), ctx)
    rows = published(Baselines, ctx.out).lens.to_pylist()
    by_key = {(row["layer"], row["lens"], row["split"]): row for row in rows}
    assert len(rows) == len(by_key) == 3 * 3 * 2
    # The logit lens after the last block is the model itself, and so is the Jacobian lens.
    for lens in ("logit", "jacobian"):
        last = by_key[4, lens, "test"]
        assert last["kl"] == pytest.approx(0, abs=1e-6)
        assert last["agreement"] == 1.0
    for split in ("test", "ood"):
        assert by_key[3, "affine", split]["kl"] < by_key[1, "affine", split]["kl"]
        assert by_key[1, "affine", split]["kl"] < by_key[1, "logit", split]["kl"]
    assert output.metrics["affine_kl_3"] == by_key[3, "affine", "test"]["kl"]
    assert output.metrics["jacobian_kl_3"] == by_key[3, "jacobian", "test"]["kl"]

    lens = load_file(Baselines.affine_lens.path(ctx.out))
    assert set(lens) == {f"{part}.{layer}" for part in "Ac" for layer in (1, 3, 4)}
    lm = FrozenLM.load(tiny_lm_dir)
    ids = torch.from_numpy(read_tokens(inputs.corpus.folder, "test", 3))
    resids, final = lm.residuals(ids)
    predicted = (resids[3] @ lens["A.3"] + lens["c.3"])[:, 1:-1]
    p, q = (
        torch.log_softmax(lm.unembed(hidden).double(), -1) for hidden in (final[:, 1:-1], predicted)
    )
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert by_key[3, "affine", "test"]["kl"] == pytest.approx(float(kl), rel=1e-4)
    ce = -p.gather(-1, ids[:, 2:, None]).mean()
    assert output.metrics["ce_test"] == pytest.approx(float(ce), rel=1e-5)

    # The published Jacobian, read by the model's own last norm.
    moved = load_file(Baselines.jacobian_lens.path(ctx.out))
    assert torch.equal(moved["J.4"], torch.eye(lm.d_model))
    norm = lm.base.get_submodule("ln_f")
    with torch.no_grad():
        q = torch.log_softmax(lm.unembed(norm(resids[3] @ moved["J.3"].T)[:, 1:-1]).double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert by_key[3, "jacobian", "test"]["kl"] == pytest.approx(float(kl), rel=1e-4)

    record = published(Baselines, ctx.out).record
    assert record.tokens == {"train": 1280, "validation": 128, "test": 96, "ood": 64}
    assert record.tasks["addition"].prompts == 2
    assert record.tasks["addition"].shown_working_right == 0.0
    kl = by_key[3, "affine", "test"]["kl"]
    assert record.lenses[3].affine_test.kl == float(f"{kl:.4g}")
    layer = record.lenses[3].model_dump()
    assert layer["jacobian_test"]["kl"] == float(f"{output.metrics['jacobian_kl_3']:.4g}")
    assert layer["jacobian"]["positions"] == 8
    assert 0 < layer["jacobian"]["relative_error"] < 1
    assert record.lenses[4].model_dump()["jacobian"]["relative_error"] == 0
    assert Baselines.lens_figure.path(ctx.out).read_text().lstrip().startswith("<?xml")


def test_same_bytes_twice(inputs: TextInputs, context: MakeContext) -> None:
    contents = []
    for name in ("a", "b"):
        ctx = context(name)
        few = settings(num_task_prompts=0, lens_layers="all", jacobian_positions=2)
        STAGE.run(inputs, few, ctx)
        contents.append(
            {
                p.name: p.read_bytes()
                for p in sorted(ctx.out.iterdir())
                if p.name != Baselines.timing.name
            }
        )
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


def test_a_killed_run_takes_up_its_shards(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many shards the predictions are those of one, and what was finished is not done again."""
    config = settings(micro_batch_sequences=2, num_task_prompts=17, jacobian_positions=20)
    whole = context("whole")
    STAGE.run(inputs, config, whole)
    computed: list[str] = []
    compute = BaselineWorker.compute

    def counted(self: BaselineWorker, number: int, advance: Callable[[float], None]) -> Tensors:
        name = self.settings.shards()[number].name
        if name == "predictions-test-0000002.safetensors" and not computed.count("killed"):
            computed.append("killed")
            raise KeyboardInterrupt
        computed.append(name)
        return compute(self, number, advance)

    monkeypatch.setattr(BaselineWorker, "compute", counted)
    monkeypatch.setattr(baseline_shards, "SHARD_TOKENS", 1)
    monkeypatch.setattr(baseline_shards, "SHARD_PROMPTS", 16)
    ctx = context("parts")
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(inputs, config, ctx)
    before = computed.index("killed")
    STAGE.run(inputs, config, ctx)
    # 2 of positions, 20 + 2 of sums, 2 + 1 of measurements, 2 of each task; the one on its way to
    # the disk is kept, too.
    assert len(computed) == 1 + 31
    assert len(set(computed[:before]) & set(computed[before + 1 :])) == 0

    # The affine lens is a sum of 20 terms now, all else is added up as before.
    one, other = (published(Baselines, c.out).lens.to_pylist() for c in (whole, ctx))
    for row, again in zip(one, other, strict=True):
        exact = row["lens"] != "affine"
        assert again == (row if exact else pytest.approx(row, rel=1e-5))
    tasks, tasks_again = (published(Baselines, c.out).record.tasks for c in (whole, ctx))
    assert tasks == tasks_again
    assert tasks_again["cloze"].prompts == 17
    name = Baselines.jacobian_lens.name
    assert (whole.out / name).read_bytes() == (ctx.out / name).read_bytes()


def test_without_the_jacobian_lens_all_is_as_before_it(
    inputs: TextInputs, context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(num_task_prompts=0, jacobian_positions=0)
    assert "jacobian_positions" not in config.digest_fields()
    output = STAGE.run(inputs, config, context("off"))
    found = published(Baselines, context("off").out)
    assert {row["lens"] for row in found.lens.to_pylist()} == {"logit", "affine"}
    assert not any("jacobian" in name for name in output.metrics)
    assert not Baselines.jacobian_lens.path(found.folder).exists()
    assert "jacobian" not in Baselines.record.path(found.folder).read_text()
    assert found.record.lenses[3].jacobian is None

    # A model that no gradient goes through has the other lenses, and a note.
    monkeypatch.setattr(baseline_shards, "obstacle", lambda lm, layer: "it is cut")
    ctx = context("cut")
    STAGE.run(inputs, settings(num_task_prompts=0), ctx)
    assert ctx.report.notes == ["The Jacobian lens is left out: it is cut."]
    for name in (Baselines.lens.name, Baselines.record.name, Baselines.affine_lens.name):
        assert (ctx.out / name).read_bytes() == (found.folder / name).read_bytes()
    with pytest.raises(ValidationError, match="at least 2 positions"):
        settings(jacobian_positions=1)


@pytest.mark.parametrize("layers", [[], [5], [1, 99]])
def test_layers_out_of_range(inputs: TextInputs, context: MakeContext, layers: list[int]) -> None:
    with pytest.raises(BadInputError, match="The model has 4 blocks"):
        STAGE.run(inputs, settings(lens_layers=layers), context())


def test_working_of_additions() -> None:
    prompt = make_prompts("addition", "test", 1, 0)[0]
    question = prompt.prompt.rsplit("Q:", 1)[1]
    a, b = (int(word) for word in question.replace("?", " ").split() if word.isdigit())
    assert working_is_right(prompt, f" {a} + {b} = {a + b}. The answer is {a + b}.")
    assert working_is_right(prompt, f" {b} + {a} = {a + b}. The answer is 99.")
    assert not working_is_right(prompt, f" {a} + {b} = {a + b + 1}. The answer is {a + b}.")
    assert not working_is_right(prompt, f" {a + 1} + {b} = {a + b + 1}.")
    assert not working_is_right(prompt, f" The answer is {a + b}.")
    assert not working_is_right(prompt, f" I think so.\n{a} + {b} = {a + b}.")


@pytest.mark.parametrize("text", ["model: [", "model: tiny", "- 1", "lenses: {1: {logit_test: 3}}"])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    Baselines.record.path(tmp_path).write_text(text)
    with pytest.raises(DamagedFileError, match="is not what this version publishes"):
        _ = published(Baselines, tmp_path).record
