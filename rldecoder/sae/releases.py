"""SAEs that sae_lens knows by name, kept in the user's cache as the folders that it writes.

sae_lens downloads and converts them once; from then on the folder is read as any other, without
sae_lens and without a network.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rldecoder.config.sae import PretrainedSae
from rldecoder.errors import BadInputError
from rldecoder.files import remove
from rldecoder.lm.user_cache import user_cache
from rldecoder.sae.folders import SaeFolder, recognise

INSTALL = "pip install -c constraints.txt -e '.[pretrained]'"


def find(config: PretrainedSae) -> SaeFolder:
    """The SAE that a config names.

    Raises:
        BadInputError: there is none, or its files cannot be read. DamagedFileError: one is broken.
    """
    if config.folder is not None:
        return recognise(config.folder, config.stated)
    assert config.release is not None
    assert config.id is not None
    return recognise(release_folder(config.release, config.id), config.stated)


def release_folder(release: str, sae_id: str) -> Path:
    """The folder of a release's SAE, brought into the cache where it is not there yet.

    Raises:
        BadInputError: sae_lens is not installed, does not know the SAE, cannot get or load it.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{release}__{sae_id}")[:80]
    mark = hashlib.sha256(f"{release}\n{sae_id}".encode()).hexdigest()[:12]
    folder = user_cache() / "saes" / f"{name}-{mark}"
    if (folder / "cfg.json").is_file():
        return folder

    try:
        from sae_lens import SAE
    except ImportError as error:
        raise BadInputError(
            f"`train_sae.pretrained.release: {release}` needs sae_lens, which cannot be imported.",
            f"{error}.",
            f"Install it ({INSTALL}), or download the SAE and name its `folder`.",
        ) from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        try:
            with _no_pickled_code(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what it leaves unfolded is refused by name later
                sae = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
            sae.save_model(Path(draft) / "sae")
        except Exception as error:  # whatever the hub's clients and converters of others raise
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BadInputError(
                f"sae_lens cannot load {sae_id} of {release}.",
                f"{type(error).__name__}: {first}",
                "Check both names and the network (HF_HUB_OFFLINE, `hf auth login` for gated "
                "repositories), or download the SAE and name its `folder`.",
            ) from error
        remove(folder)
        os.replace(Path(draft) / "sae", folder)
    return folder


@contextmanager
def _no_pickled_code() -> Iterator[None]:
    """Some releases are .pt files: torch then reads tensors, and refuses all else in them."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
