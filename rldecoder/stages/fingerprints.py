"""Hashes of what stages read from outside the store; they are part of a digest.

Apart from the rooms, because a plan needs them all, and must not import torch for it.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata

from rldecoder.artifacts.catalogue import Clusters
from rldecoder.config.base import hash_json
from rldecoder.config.data import IngestConfig
from rldecoder.config.explain import EvaluateConfig, require_harness
from rldecoder.config.interp import LabelFeaturesConfig
from rldecoder.config.llm import FROZEN, LocalModel
from rldecoder.config.model import RANDOM, SyncTokenizerConfig
from rldecoder.config.rl import TrainPpoConfig
from rldecoder.config.sae import TrainSaeConfig
from rldecoder.config.tasks import TASK_READER_VERSION, FileTask
from rldecoder.data import sources
from rldecoder.errors import BadInputError
from rldecoder.interp.llm.prompts import prompts_digest
from rldecoder.interp.neuronpedia_labels import explanations_digest
from rldecoder.lm.model_sources import locate
from rldecoder.lm.registry import choose_model
from rldecoder.lm.user_cache import sha256_file

SAE_FILES = ("cfg.json", "sae_weights.safetensors")


def sync_tokenizer(config: SyncTokenizerConfig) -> dict[str, str]:
    """What identifies the model beside the settings: hashes, a commit, or library versions.

    Raises:
        BadInputError: no source has the model.
    """
    if config.model == RANDOM:
        # The random numbers are torch's; the tokenizer is trained by `tokenizers` on the
        # documentation that came with this Python.
        versions = {name: metadata.version(name) for name in ("tokenizers", "transformers")}
        return {
            "python": platform.python_version(),
            "torch": metadata.version("torch").split("+")[0],
            **versions,
        }
    choice = choose_model(
        config.model, path=config.path, repo=config.repo, revision=config.revision
    )
    identity = locate(choice.sources).identity
    if choice.spec is not None:
        expectations = choice.spec.digest_fields()
        del expectations["sources"]
        identity = {**identity, "spec": hash_json(expectations)}
    return identity


def ingest(config: IngestConfig) -> dict[str, str]:
    """The content of the text sources, or the version of what makes them."""
    found = sources.fingerprint([*config.sources, *config.ood_sources])
    # Such documents are parted by what begins them since this was named; others are as they were.
    return found | ({"separator": "front"} if config.bos == "always" else {})


def label_features(config: LabelFeaturesConfig) -> dict[str, str]:
    """The contents of reviews, of imported labels, of prompts and local models, not their places.

    Raises:
        BadInputError: there is no such file or model.
    """
    out: dict[str, str] = {}
    if config.reviews is not None:
        if not config.reviews.is_file():
            raise BadInputError(
                f"The review file {config.reviews} does not exist.",
                "",
                "Correct `label_features.reviews`, or leave it empty.",
            )
        out["reviews"] = hashlib.sha256(config.reviews.read_bytes()).hexdigest()
    if config.imported is not None:
        out["imported"] = explanations_digest(config.imported)
        # Those in free words are judged, too; runs without any are what they were.
        out["imported_scores"] = "3"
    if config.llm is not None:
        out["prompts"] = prompts_digest()
        for role, model in (("labeler", config.llm.labeler), ("judge", config.llm.judge)):
            if isinstance(model, LocalModel) and model.model != FROZEN:
                choice = choose_model(
                    model.model, path=model.path, repo=model.repo, revision=model.revision
                )
                out[role] = hash_json(locate(choice.sources).identity)
    return out


def train_sae(config: TrainSaeConfig) -> dict[str, str]:
    """The content of the SAE that is taken, or that training goes on from, and of flags over it.

    Raises:
        BadInputError: a file is missing.
    """
    if config.pretrained is not None:
        from rldecoder.sae.releases import find  # slow to import, and rarely needed

        sae = find(config.pretrained)
        return {
            "pretrained_config": hash_json(sae.config),
            "pretrained_weights": sha256_file(sae.weights),
        }
    if config.retrain is None:
        return {}
    files = {f"retrain_{name}": config.retrain.sae / name for name in SAE_FILES}
    if config.retrain.clusters is not None:
        files["retrain_clusters"] = config.retrain.clusters
    for path in files.values():
        if not path.is_file():
            raise BadInputError(
                f"{path} does not exist.",
                "`train_sae.retrain` names an SAE to go on from, and what was found out about it.",
                f"Correct the paths: sae/ of a train_sae artifact, {Clusters.clusters.name} of a "
                "cluster_features one.",
            )
    found = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    return found | {"retrain_reasons": ",".join(sorted(config.retrain.reasons))}


def train_ppo(config: TrainPpoConfig) -> dict[str, str]:
    """The content of task files.

    Raises:
        BadInputError: one is missing.
    """
    for task in config.file_tasks:
        if not task.path.is_file():
            raise BadInputError(
                f"The file {task.path} of task {task.name} does not exist.",
                "",
                "Correct `train_ppo.file_tasks`, or leave the task out.",
            )
    return _task_files(config.file_tasks)


def evaluate(config: EvaluateConfig) -> dict[str, str]:
    """The content of task files, a missing one as such; what the harness reads, and its version.

    Raises:
        BadInputError: the harness is asked for and not installed, or a folder of tasks is missing.
    """
    found = _task_files(config.file_tasks)
    if config.harness is None:
        return found
    require_harness()
    for folder in config.harness.include:
        if not folder.is_dir():
            raise BadInputError(
                f"There is no folder {folder}.",
                "`evaluate.harness.include` names folders with YAMLs of tasks.",
                "Correct the path.",
            )
    # Places in the list instead of paths: a folder may move.
    files = {
        f"harness-{place}-{path.relative_to(folder).as_posix()}": sha256_file(path)
        for place, folder in enumerate(config.harness.include)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    return found | files | {"lm-eval": metadata.version("lm_eval")}


def _task_files(tasks: Sequence[FileTask]) -> dict[str, str]:
    # No task is called so: names have no hyphen.
    version = {"task-reader": str(TASK_READER_VERSION)} if tasks else {}
    return version | {
        task.name: hashlib.sha256(task.path.read_bytes()).hexdigest()
        if task.path.is_file()
        else "missing"
        for task in tasks
    }
