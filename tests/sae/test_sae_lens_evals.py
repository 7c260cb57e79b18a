"""Our quality metrics against sae_lens's own evaluation, from which sae_bench's core one comes.

sae_lens runs the model, the hooks, the SAE (loaded from our file) and its formulas; nothing of ours
is in between. The first token's id occurs nowhere else and is ignored there, as position 0 is here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.evals import get_downstream_reconstruction_metrics, get_sparsity_and_variance_metrics
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.metrics import ReconstructionQuality, reconstruction_quality
from rldecoder.sae.model import Sae, SaeSpec
from rldecoder.sae.splice import SpliceReport, splice_quality

LAYER, FIRST = 2, 7


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
        self.d_model = lm.d_model
        self.quality: ReconstructionQuality = reconstruction_quality(
            sae, resid.flatten(0, 1).split(50)
        )
        replacements = {"sae": lambda r: sae(r).recon, "zero": torch.zeros_like}
        self.splice: SpliceReport = splice_quality(lm, ids, LAYER, replacements, batch=2)

        theirs = SAE.load_from_disk(str(folder))
        theirs.cfg.metadata.hook_name = f"transformer.h.{LAYER - 1}"
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
