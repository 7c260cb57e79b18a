"""What can be known to be wrong before any work: an SAE or labels of others that do not fit.

Without a model it is known from the config and the SAE's folder; the rest when the model is there,
before any text is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rldecoder.artifacts.catalogue import ModelFolder
from rldecoder.config.run import RunConfig
from rldecoder.errors import BadInputError
from rldecoder.interp.neuronpedia_labels import check_first

if TYPE_CHECKING:
    from rldecoder.sae.fit import Surroundings


def check(run: RunConfig, model: ModelFolder | None = None) -> None:
    """Refuse a run whose pretrained SAE, imported labels or streams do not fit it.

    Args:
        model: the frozen model, once it is published.

    Raises:
        BadInputError: it does not fit, or cannot be read; the setting to change is named.
    """
    if run.train_sae.in_team and run.train_sae.source == "stream":
        _check_shared_stream(run)
    if run.label_features.imported is not None:
        check_first(run.label_features.imported, run.cache_activations.hook_layer)
    config = run.train_sae.pretrained
    if config is None:
        return
    from rldecoder.sae.fit import Surroundings, check_fit, described  # slow to import
    from rldecoder.sae.releases import find

    found = find(config)
    around = Surroundings(run.cache_activations.hook_layer, run.ingest.context_length)
    if model is not None:
        around = with_model(around, model)
    check_fit(described(found), int(found.config["d_in"]), around, config.accept)


def _check_shared_stream(run: RunConfig) -> None:
    """Each process holds the frozen model on a device of its own."""
    if run.sync_tokenizer.device_map == "auto":
        raise BadInputError(
            f"train_sae.source is stream, in {run.train_sae.processes} processes, and "
            "sync_tokenizer.device_map is auto.",
            "Each process would spread the frozen model over the devices of the others.",
            "Set train_sae.processes: 1, or train_sae.source: cache.",
        )


def with_model(around: Surroundings, model: ModelFolder) -> Surroundings:
    """What is known once there is a model."""
    record = model.record
    sources = [value for key, value in record.source.items() if key in ("hub", "repo")]
    return around._replace(
        bos=text_begins_with_bos(model),
        d_model=record.d_model,
        num_layers=record.num_layers,
        model_names=(record.name, record.title, *sources),
    )


def text_begins_with_bos(model: ModelFolder) -> bool:
    """Whether documents of this run begin with the model's BOS token."""
    from transformers import AutoTokenizer  # here, because planning imports none of it

    from rldecoder.lm.text_tokens import set_bos, tokens_in_front

    tokenizer = AutoTokenizer.from_pretrained(model.model, local_files_only=True)
    set_bos(tokenizer, model.record.bos)
    start = tokenizer.bos_token_id
    return start is not None and start in tokens_in_front(tokenizer)
