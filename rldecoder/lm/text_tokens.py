"""Text to tokens, one way for documents and one for prompts, and the tokens that end an answer.

Some tokenizers put tokens around every text: a beginning-of-text token in front (Llama, Gemma),
or an end-of-text token behind (`add_eos_token`). What stands in front belongs before documents
and prompts alike, or the model reads the one otherwise than the other. What stands behind belongs
to no prompt: nothing is to be continued after the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rldecoder.config.data import Bos
from rldecoder.errors import BadInputError
from rldecoder.lm.specs import ModelRecord
from rldecoder.visible_text import visible_text

# Any ordinary text: it shows what is put around it.
_SAMPLE = "The city"


def load_tokenizer(folder: Path, record: Path | None = None) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder; with its `ModelRecord`, as the run has it.

    Raises:
        BadInputError: if there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise BadInputError(
            f"No tokenizer can be loaded from {folder}.",
            f"{error}.",
            "Name a model that carries its tokenizer files in `sync_tokenizer.model`.",
        ) from error
    if tokenizer.eos_token_id is None:
        raise BadInputError(
            f"The tokenizer in {folder} has no end-of-text token.",
            "Documents are separated by it.",
            "Set `eos_token` in tokenizer_config.json.",
        )
    if record is not None and record.is_file():
        set_bos(tokenizer, ModelRecord.load(record).bos)
    return tokenizer


def tokens_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts in front of every text: most often nothing, or its BOS token.

    Raises:
        BadInputError: it changes the text's own tokens too.
    """
    return _tokens_around(tokenizer)[0]


def tokens_between(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands behind each document of packed text: the end-of-text token, or nothing.

    Nothing where every text begins with a token of its own and the tokenizer ends none: the next
    document's beginning parts them, as in the text that such models were trained on (llama2.c).
    One that never saw an end-of-text token there pays 27 nats for it, and reads the next document
    0.2 to 0.4 nats a token worse.

    Raises:
        BadInputError: as `tokens_in_front`.
    """
    front, behind = _tokens_around(tokenizer)
    end = int(tokenizer.eos_token_id)
    # Where the end is the beginning, too (GPT-2, OPT), the next document has it.
    return [] if front and (not behind or front[-1] == end) else [end]


def _tokens_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    bare = _bare(tokenizer, _SAMPLE)
    whole = list(tokenizer(_SAMPLE, verbose=False)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise BadInputError(
        f"The tokenizer in {tokenizer.name_or_path} tokenises a text otherwise once its special "
        "tokens are added.",
        f"{_SAMPLE!r} is {bare} without and {whole} with them.",
        "Correct `post_processor` in tokenizer.json: it may only put tokens around a text.",
    )


def set_bos(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> None:
    """Make the tokenizer put its BOS token in front of every text, or nothing.

    Args:
        tokenizer: changed in place, for whatever reads or saves it from here on.
        bos: `auto` leaves it as it was published.

    Raises:
        BadInputError: it has no BOS token to put there.
    """
    if bos == "auto" or bool(tokens_in_front(tokenizer)) == (bos == "always"):
        return
    start = tokenizer.bos_token
    if bos == "always" and start is None:
        raise BadInputError(
            f"The tokenizer in {tokenizer.name_or_path} has no beginning-of-text token.",
            "`ingest.bos: always` puts it in front of every text.",
            "Set `ingest.bos: auto`, or `bos_token` in tokenizer_config.json.",
        )
    before = f"{start} " if bos == "always" else ""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{before}$A",
        pair=f"{before}$A $B",
        special_tokens=[(start, tokenizer.bos_token_id)] if before else [],
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text to be continued: those in front, the text's own, and nothing behind.

    Special tokens that the text spells are read as such, as a chat's turns need.
    """
    return tokens_in_front(tokenizer) + _bare(tokenizer, text)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], longest: int | None = None
) -> list[list[int]]:
    """`encode_prompt` of several texts.

    Args:
        longest: tokens that the model reads; a longer text keeps its end, where the question is.
    """
    front = tokens_in_front(tokenizer)
    rows = [_bare(tokenizer, text) for text in texts]
    if longest is not None:
        rows = [row[-(longest - len(front)) :] for row in rows]
    return [front + row for row in rows]


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of the texts alone; `SequencePacker` adds what stands around each.

    Text that spells a special token stays text: it must not end a document.
    """
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(row) for row in found["input_ids"]]


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> list[int]:
    """All tokens that end an answer, sorted: the tokenizer's end of text, and those that the
    model's generation settings name (Llama 3, Qwen and Gemma have several). A negative number
    means none, as in transformers.

    Raises:
        BadInputError: the settings name something that is no token.
    """
    named: Any = None if generation is None else generation.eos_token_id
    listed = [] if named is None else named if isinstance(named, list | tuple) else [named]
    for one in listed:
        # Not rounded, not cut into digits: another token would end answers.
        if not isinstance(one, int) or isinstance(one, bool):
            raise BadInputError(
                "The model's generation settings name an end that is no token.",
                f"`eos_token_id` is {visible_text(repr(named), 60)}; it must be a whole number, or "
                "a list of them.",
                "Mend generation_config.json in the model's folder.",
            )
    ends = {one for one in listed if one >= 0}
    if tokenizer.eos_token_id is not None:
        ends.add(int(tokenizer.eos_token_id))
    return sorted(ends)


def answer_texts(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]], ends: Iterable[int]
) -> list[str]:
    """What generated tokens say, without special tokens and without those that ended the answer
    (which a tokenizer need not call special)."""
    left_out = set(ends)
    kept = [[token for token in row if token not in left_out] for row in rows]
    return list(tokenizer.batch_decode(kept, skip_special_tokens=True))


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
