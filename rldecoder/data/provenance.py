"""Where the tokens came from, and what of the text is not in them."""

from __future__ import annotations

from rldecoder.schemas import JsonRecord, Scalar, optional


class SplitProvenance(JsonRecord):
    """What a split holds."""

    documents: int
    """Of which it holds tokens."""
    sequences: int
    """Each of the context length."""
    tokens: int
    """In all sequences, those between documents included."""
    budget_tokens: int
    """What was asked for."""


class SourceProvenance(JsonRecord):
    """What a source gave to all splits."""

    documents: int
    """Of which tokens were kept."""
    tokens: int
    """Kept, without those between documents."""
    licences: tuple[str, ...]
    """Of its documents, in the order in which they came."""


class Provenance(JsonRecord):
    """The corpus as it became. What is rare is named only where it happened."""

    context_length: int
    """Tokens in a sequence."""
    splits: dict[str, SplitProvenance]
    """By name; those with a budget."""
    sources: dict[str, SourceProvenance]
    """By name."""
    dropped_documents: dict[str, int]
    """Documents left out, by reason."""
    fingerprint: dict[str, str]
    """What identifies the content of the sources."""
    left_out_files: dict[str, int] | None = optional()
    """Files of folders that no reader takes, by kind."""
    continued_documents: int | None = optional()
    """Long documents read on because their beginnings filled not every split."""
    cut_characters: dict[str, int] | None = optional()
    """Of splits that are not full: characters that `max_document_chars` left unread."""
    separator: tuple[int, ...] | None = optional()
    """Tokens that part documents, where that is not the end-of-text token: those that begin each
    (`text_tokens.tokens_between`)."""

    @property
    def headline(self) -> dict[str, Scalar]:
        """What goes into the manifest."""
        dropped = self.dropped_documents.items()
        tokens: dict[str, Scalar] = {
            f"tokens_{n}": split.tokens for n, split in self.splits.items()
        }
        return tokens | {
            "documents": sum(split.documents for split in self.splits.values()),
            "duplicates_removed": sum(n for why, n in dropped if "duplicates" in why),
        }
