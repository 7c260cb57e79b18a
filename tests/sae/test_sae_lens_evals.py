"""Our quality metrics against sae_lens's own evaluation and sae_bench's core evaluation.

They run the model, the hooks, the SAE (loaded from our file) and their formulas; nothing of ours
is in between. The first token's id occurs nowhere else and is ignored there, as position 0 is here.
sae_bench asks for older companions than are pinned here, so `make readers` puts it, without them,
into a folder that only its own process sees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import save_file
from torch import Tensor

from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.metrics import ReconstructionQuality, reconstruction_quality
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.splice import SpliceReport, splice_quality

LAYER, FIRST = 2, 7
HOOK = f"transformer.h.{LAYER - 1}"
READERS = Path(
    os.environ.get(
        "RLDECODER_EXPORT_READERS", Path(__file__).parents[2] / "build" / "export_readers"
    )
)

# Its `run_evals` reads where the SAE hooks in from attributes of the configuration, as older
# versions of sae_lens had them, and asks a store for batches of tokens.
SAE_BENCH = """
import json, sys
sae_folder, model_folder, ids_file, readers, hook, first, layer = sys.argv[1:]
sys.path.append(readers)
import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_lens import SAE
from sae_lens.load_model import HookedProxyLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ids = load_file(ids_file)["ids"]


class Store:
    context_size, store_batch_size_prompts = ids.shape[1], 2

    def reset_input_dataset(self):
        self.batches = iter(ids.split(2))

    def get_batch_tokens(self, size):
        return next(self.batches)


sae, store = SAE.load_from_disk(sae_folder), Store()
for name, value in {"hook_name": hook, "hook_layer": int(layer), "hook_head_index": None}.items():
    object.__setattr__(sae.cfg, name, value)
store.reset_input_dataset()
lm = HookedProxyLM(
    AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
)
config = CoreEvalConfig(
    batch_size_prompts=2, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=3,
    compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
    compute_variance_metrics=True, exclude_special_tokens_from_reconstruction=True,
)
print(json.dumps(run_evals(sae, store, lm, config, ignore_tokens={int(first)})[0]))
"""


class Store:
    """As much of sae_lens's activation store as its evaluation asks for."""

    def __init__(self, input_ids: Tensor, batch: int) -> None:
        self._batches = iter(input_ids.split(batch))

    def get_batch_tokens(self, size: int) -> Tensor:
        """The next sequences."""
        return next(self._batches)


class Both:
    """The same SAE on the same sequences, measured by us and by sae_lens."""

    def __init__(self, folder: Path, model_folder: Path, k: int) -> None:
        lm = FrozenLM.load(model_folder)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(8, lm.vocab_size, (6, 20), generator=generator)
        ids[:, 0] = FIRST
        resid = lm.trunk(ids, LAYER).resid[:, 1:].detach()
        spec = SaeSpec(d_model=lm.d_model, num_latents=96, k=k, hook_layer=LAYER)
        sae = Sae.random_init(spec, 0, resid.flatten(0, 1).mean(0))
        sae.save(folder)
        self.folder, self.model_folder, self.ids = folder, model_folder, ids
        self.mean_square = float(resid.square().sum(-1).mean())
        self.d_model = lm.d_model
        self.quality: ReconstructionQuality = reconstruction_quality(
            sae, resid.flatten(0, 1).split(50)
        )
        replacements = {"sae": lambda r: sae(r).recon, "zero": torch.zeros_like}
        self.splice: SpliceReport = splice_quality(lm, ids, LAYER, replacements, batch=2)

        theirs = SAE.load_from_disk(str(folder))
        theirs.cfg.metadata.hook_name = HOOK
        proxy = HookedProxyLM(lm.model, lm.tokenizer)
        common = {
            "n_batches": 3,
            "eval_batch_size_prompts": 2,
            "ignore_tokens": [FIRST],
            "model_kwargs": {},
        }
        with torch.no_grad():
            self.their_quality, self.their_features = get_sparsity_and_variance_metrics(
                theirs, proxy, Store(ids, 2), ActivationScaler(), compute_l2_norms=True,
                compute_sparsity_metrics=True, compute_variance_metrics=True,
                compute_featurewise_density_statistics=True, **common,
            )  # fmt: skip
            self.their_splice = get_downstream_reconstruction_metrics(
                theirs, proxy, Store(ids, 2), ActivationScaler(), compute_kl=True,
                compute_ce_loss=True, **common,
            )  # fmt: skip


@pytest.fixture(scope="module", params=[4, 32])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_lm_dir: Path
) -> Both:
    return Both(tmp_path_factory.mktemp("evals"), tiny_lm_dir, request.param)


def test_reconstruction_is_theirs(both: Both) -> None:
    ours, theirs = both.quality, both.their_quality
    assert ours.explained_variance == pytest.approx(theirs["explained_variance"], abs=1e-4)
    # Theirs is summed over dimensions.
    assert ours.mse * both.d_model == pytest.approx(theirs["mse"], rel=1e-4)
    assert ours.l0_mean == pytest.approx(theirs["l0"], rel=1e-4)
    torch.testing.assert_close(
        ours.density.float(),
        torch.tensor(both.their_features["feature_density"]),
        rtol=0,
        atol=1e-5,
    )


def test_splice_is_theirs(both: Both) -> None:
    ours, theirs = both.splice, both.their_splice
    assert ours.replaced["sae"].kl == pytest.approx(theirs["kl_div_with_sae"], rel=1e-3, abs=1e-5)
    assert ours.replaced["sae"].ce == pytest.approx(theirs["ce_loss_with_sae"], rel=1e-4)
    assert ours.frozen_ce == pytest.approx(theirs["ce_loss_without_sae"], rel=1e-4)


@pytest.mark.skipif(
    not (READERS / "sae_bench").is_dir(), reason="sae_bench is not here; run `make readers`"
)
def test_quality_and_splice_are_those_of_sae_bench(both: Both, tmp_path: Path) -> None:
    save_file({"ids": both.ids}, tmp_path / "ids.safetensors")
    places = [both.folder, both.model_folder, tmp_path / "ids.safetensors", READERS]
    done = subprocess.run(
        [sys.executable, "-c", SAE_BENCH, *map(str, places), HOOK, str(FIRST), str(LAYER)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    quality, splice = found["reconstruction_quality"], both.splice
    error = both.quality.mse * both.d_model
    # Each token's error is divided by the number of tokens in its batch there.
    assert error == pytest.approx(quality["mse"] * 2 * (both.ids.shape[1] - 1), rel=1e-3)
    # What is divided by there is no variance: the mean square, less the square of the mean square
    # of a dimension. With a variance in its place it is our fvu.
    size = both.mean_square
    assert 1 - error / (size - (size / both.d_model) ** 2) == pytest.approx(
        quality["explained_variance"], abs=1e-3
    )
    assert both.quality.l0_mean == pytest.approx(found["sparsity"]["l0"], rel=1e-4)
    kl = found["model_behavior_preservation"]["kl_div_with_sae"]
    assert splice.replaced["sae"].kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    losses = found["model_performance_preservation"]
    assert splice.replaced["sae"].ce == pytest.approx(losses["ce_loss_with_sae"], rel=1e-4)
    assert splice.frozen_ce == pytest.approx(losses["ce_loss_without_sae"], rel=1e-4)
