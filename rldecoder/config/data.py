"""Settings of ingestion, of the activation cache and of the baselines."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from rldecoder.config.base import Config, Revision, StageConfig, free, late

Bos = Literal["auto", "always", "never"]
"""Whether texts begin with the tokenizer's BOS token; `auto`: as the tokenizer does by itself."""


class SplitTokens(Config):
    """A number of tokens for each split."""

    train: NonNegativeInt = 120_000
    """Tokens that SAE, decoder and affine lens are fitted on."""
    validation: NonNegativeInt = 8_192
    """Tokens that choose checkpoints."""
    label: NonNegativeInt = 16_384
    """Tokens that labels, importance and explainer are fitted on."""
    test: NonNegativeInt = 12_288
    """Tokens that gates and evaluations read."""
    ood: NonNegativeInt = 8_192
    """Out-of-domain tokens, for evaluation only."""


Share = Annotated[float, Field(gt=0, lt=1)]


class SplitFractions(Config):
    """Share of the in-domain documents that each split gets; the sum is 1."""

    train: Share = 0.76
    """Share of `train`, 0 to 1."""
    validation: Share = 0.06
    """Share of `validation`, 0 to 1."""
    label: Share = 0.1
    """Share of `label`, 0 to 1."""
    test: Share = 0.08
    """Share of `test`, 0 to 1."""

    @model_validator(mode="after")
    def _sum_is_one(self) -> Self:
        total = self.train + self.validation + self.label + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the split fractions sum to {total:.6g}, not to 1")
        return self


class PydocsSource(Config):
    """Documentation of Python and of installed packages; needs no download, runs no code."""

    type: Literal["pydocs"] = "pydocs"
    """Names this kind of source."""
    stdlib: bool = True
    """Docstrings of the standard library, and the topics of `help()`."""
    packages: tuple[str, ...] = (
        "numpy",
        "scipy",
        "scikit-learn",
        "matplotlib",
        "torch",
        "datasets",
        "prefect",
        "pydantic",
    )
    """Installed distributions whose docstrings and README are read. Named one by one, so that
    unrelated packages of the environment do not change the result."""


class PysourceSource(Config):
    """Source code of standard library modules that `pydocs` leaves out, without docstrings."""

    type: Literal["pysource"] = "pysource"
    """Names this kind of source."""


class ReaderSource(Config):
    """Original prose that comes with the project: some 260 short pieces, 81,000 tokens."""

    type: Literal["reader"] = "reader"
    """Names this kind of source."""


class TasksSource(Config):
    """Solved training prompts of the generated tasks; all of them go to the split `train`."""

    type: Literal["tasks"] = "tasks"
    """Names this kind of source."""
    tasks: tuple[Literal["addition", "cloze"], ...] = Field(("addition", "cloze"), min_length=1)
    """Tasks whose prompts are told."""
    documents_per_task: PositiveInt = 40
    """Documents of each task, six prompts each."""


class LocalSource(Config):
    """Local files: a .txt, .md or .rst file is a document, or a row of .jsonl, .json, .csv, .tsv
    or .parquet; all but Parquet also packed (.gz, .bz2, .zst)."""

    type: Literal["local"] = "local"
    """Names this kind of source."""
    paths: tuple[str, ...] = Field(min_length=1)
    """Files, or folders that are searched for files of these kinds. Hidden files, links to folders
    and files of other kinds are left out of folders, and counted in provenance.json."""
    text_column: str = "text"
    """Column with the text; JSON calls it a key."""
    title_column: str | None = None
    """Column with a title (None: the file name and row number)."""
    document_separator: str | None = None
    """Line that separates the documents of a text file (None: a file is one document)."""
    document_chars: PositiveInt | None = late(None)
    """A longer text file, or a longer part of one, becomes documents of about so many characters
    that end where a paragraph does; so one long file reaches every split (None: it stays whole).
    Neighbours in one file may then be in different splits, which a caveat says."""
    licence: str = "unknown"
    """Licence of the text. A column `licence` or `license` of a row goes before it."""

    @field_validator("document_separator")
    @classmethod
    def _is_one_line(cls, value: str | None) -> str | None:
        if value is not None and "\n" in value.strip("\r\n"):
            raise ValueError("document_separator is one line, so it holds no line break")
        return value


class DatasetSource(Config):
    """A dataset of the `datasets` library: a hub name or a local folder."""

    type: Literal["dataset"] = "dataset"
    """Names this kind of source."""
    name: str
    """Name on the hub, or a path."""
    subset: str | None = None
    """Configuration of the dataset (None: its default)."""
    split: str = "train"
    """Split of the dataset to read; this project's own splits are made from it."""
    revision: Revision | None = None
    """Commit or tag of the dataset; name one, or a rerun may see other text."""
    streaming: bool = True
    """Read over the network as needed instead of downloading everything first."""
    text_column: str = "text"
    """Column with the text."""
    title_column: str | None = None
    """Column with a title (None: the row number)."""
    licence: str = "unknown"
    """Licence of the text. A column `licence` or `license` of a row goes before it."""


Source = Annotated[
    PydocsSource | PysourceSource | ReaderSource | TasksSource | LocalSource | DatasetSource,
    Field(discriminator="type"),
]


class IngestConfig(StageConfig):
    """Documents to sequences of tokens, split by document."""

    sources: tuple[Source, ...] = Field((PydocsSource(),), min_length=1)
    """In-domain text. Several sources are interleaved document by document."""
    ood_sources: tuple[Source, ...] = (PysourceSource(),)
    """Out-of-domain text, for the split `ood`."""
    context_length: int = Field(256, ge=8)
    """Tokens per sequence."""
    bos: Bos = free("auto")
    """The beginning-of-text token before every document, sequence and prompt, in all stages, in
    explanations and in the server: `auto` as the tokenizer puts it before a plain text, `always`,
    or `never`. `sync_tokenizer` measures both and warns if the setting is the worse one. (It is
    in the digest of `sync_tokenizer`, which every stage rests on.)"""
    budget_tokens: SplitTokens = SplitTokens()
    """Tokens to keep per split, rounded down to whole sequences. A split of 0 is left out."""
    fractions: SplitFractions = SplitFractions()
    """How in-domain documents are dealt to splits. Not tied to the budgets, so that a larger
    `train` leaves the documents of `test` as they were."""
    min_document_chars: PositiveInt = 200
    """Shorter documents are dropped."""
    max_document_chars: PositiveInt | None = 2_000
    """Longer documents are cut at a line end, so that a small budget sees many documents
    (None: never cut). Where the beginnings do not fill a split, the rest of local files and
    datasets is read as well, in pieces of this length."""
    near_duplicate_jaccard: float = Field(0.5, gt=0, le=1)
    """Documents of different splits whose 5-word shingles overlap at least this much (Jaccard
    index, estimated by MinHash) count as duplicates; the later one is dropped. Where a script has
    no spaces between words, characters count as words."""
    shuffle_buffer_documents: PositiveInt = 2_048
    """Rows of a file or dataset are shuffled within a buffer of this many documents."""
    shard_sequences: PositiveInt = 4_096
    """Sequences per Parquet shard."""


class CacheActivationsConfig(StageConfig):
    """Residual stream at one layer, and the final hidden state, of every token to Parquet."""

    hook_layer: PositiveInt = 24
    """The residual stream after this many blocks is cached."""
    budget_tokens: SplitTokens = SplitTokens()
    """Tokens to run through the model per split, in whole sequences; at most what `ingest` has."""
    shard_tokens: PositiveInt = 16_384
    """Tokens per shard; a killed run repeats at most one shard."""
    micro_batch_sequences: PositiveInt = free(8)
    """Sequences per forward pass. Halved when memory runs out."""
    disk_reserve_bytes: NonNegativeInt = free(256 << 20)
    """Bytes of disk that must stay free beside the cache."""


class BaselinesConfig(StageConfig):
    """The frozen model on held-out text, and lenses that read its layers."""

    lens_layers: tuple[NonNegativeInt, ...] | Literal["all"] = (8, 15, 24, 27)
    """Layers of the lenses: logit, affine, Jacobian. The decoder starts from the affine lens of
    its hook layer, which must be among them."""
    fit_tokens: PositiveInt = 16_384
    """Tokens of `train` that the affine lens is fitted on."""
    validation_tokens: PositiveInt = 2_048
    """Tokens of `validation` that choose the ridge strength."""
    eval_tokens: PositiveInt = 1_536
    """Tokens of `test`, and as many of `ood`, that the metrics are computed on."""
    ridge_strengths: tuple[PositiveFloat, ...] = Field(
        (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 1.0), min_length=1
    )
    """Ridge penalties tried, relative to the variance of each input dimension."""
    jacobian_positions: NonNegativeInt = late(8, before=0)
    """Positions of `train` at which the Jacobian lens takes d last residual / d residual, with a
    token's backward pass a dimension; at least 2. 0 leaves that lens out."""
    num_task_prompts: NonNegativeInt = 24
    """Prompts per task (addition, cloze). 0 leaves the tasks out."""
    micro_batch_sequences: PositiveInt = free(8)
    """Sequences per forward pass."""
    chunk_tokens: PositiveInt = free(256)
    """Tokens whose logits exist at one time (the vocabulary is what fills the memory)."""

    @field_validator("jacobian_positions")
    @classmethod
    def _several(cls, positions: int) -> int:
        if positions == 1:
            raise ValueError("at least 2 positions (one has no standard error), or 0 for no lens")
        return positions
