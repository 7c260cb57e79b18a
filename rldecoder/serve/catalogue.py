"""The labelled features of a run: search, cards, and the queue of labels to review."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from rldecoder.artifacts.catalogue import Clusters, Labels
from rldecoder.dashboard.cards import FeatureCard, ReviewShown, feature_cards
from rldecoder.dashboard.relations import Relations
from rldecoder.errors import BadInputError
from rldecoder.interp.records import Review
from rldecoder.interp.review import ReviewLine, append_review, read_reviews, settled
from rldecoder.interp.shown import ShownLatents
from rldecoder.serve.answers import FeaturePage, FindAnswer, FoundLatent, QueueAnswer, SearchAnswer
from rldecoder.serve.requests import FeatureQuery, FindQuery, ReviewRequest
from rldecoder.serve.words import kind_words, numbers, worth_words

Usual = Callable[[int], float]
Effects = tuple[Sequence[str], Sequence[str]]
ORDERS: dict[str, Callable[[FeatureCard], tuple[float, ...]]] = {
    "importance": lambda card: (card.rank,),
    "confidence": lambda card: (-card.confidence, card.rank),
    "density": lambda card: (-card.density, card.rank),
    "latent": lambda card: (card.latent,),
    "review": lambda card: (card.queue,),
}
ONLY: dict[str, Callable[[FeatureCard], bool]] = {
    "all": lambda card: True,
    "high": lambda card: card.high,
    "low": lambda card: card.is_label and not card.high,
    "failed": lambda card: not card.is_label,
}


class Catalogue:
    """Cards of all labelled features, texts made visible; and the verdicts on them.

    Args:
        clusters: of the same labels, with the queue.
        reviews: the JSONL file of verdicts; it need not exist yet.
    """

    def __init__(self, labels: Labels, clusters: Clusters, reviews: Path) -> None:
        self.labels = labels.labels
        self._said = ShownLatents(self.labels, labels.descriptions)
        self._queue = clusters.load_queue(self.labels)
        self._relations = Relations(clusters.clusters)
        self._features = {feature.latent: feature for feature in self.labels.features}
        self._label_of = {feature.latent: feature.label for feature in self.labels.features}
        self._audit = {feature.latent for feature in self.labels.features if feature.audit}
        self.reviews = reviews
        self.cards = feature_cards(labels, clusters, max_features=len(self.labels.features))
        self._by_latent = {card.latent: card for card in self.cards}
        self._haystacks = {card.latent: _haystack(card) for card in self.cards}

    def search(self, query: FeatureQuery) -> SearchAnswer:
        """One page of cards that hold all words, and how many there are."""
        words = query.words.lower().split()
        found = [
            card
            for card in sorted(self.cards, key=ORDERS[query.sort])
            if ONLY[query.only](card) and all(self._holds(card, word) for word in words)
        ]
        page = found[query.start : query.start + query.count]
        return SearchAnswer(cards=page, found=len(found), all=len(self.cards))

    def find(self, query: FindQuery, usual: Usual) -> FindAnswer:
        """Latents of the whole dictionary by words or number, labelled ones first.

        Raises:
            BadInputError: it has no latent of that number.
        """
        words = query.words.lower().split()
        number = _number_in(query.words)
        if number is not None:
            if number >= self.labels.num_latents:
                raise BadInputError(
                    f"There is no latent {number}.",
                    f"The dictionary has latents 0 to {self.labels.num_latents - 1}.",
                    "Choose one of those.",
                )
            return FindAnswer(found=[self._found(number, usual)], more=0)

        asked = () if query.others else self.cards
        cards = [c.latent for c in asked if all(self._holds(c, word) for word in words)]
        rest = [
            latent
            for latent, text in self._descriptions.items()
            if all(word in text for word in words)
        ]
        found = [*cards, *rest]
        shown = [self._found(latent, usual) for latent in found[: query.count]]
        return FindAnswer(found=shown, more=len(found) - len(shown))

    def _found(self, latent: int, usual: Usual) -> FoundLatent:
        said = self._said.of(latent)
        return FoundLatent(
            latent=latent,
            shown=said.text,
            is_label=said.is_label,
            sure=said.sure,
            usual=usual(latent),
        )

    @cached_property
    def _descriptions(self) -> dict[int, str]:
        """Of the latents without a card."""
        latents = (latent for latent in self._said.latents if latent not in self._by_latent)
        return {latent: self._said.of(latent).text.lower() for latent in latents}

    def feature(self, latent: int, usual: float, effects: Effects, code: str) -> FeaturePage:
        """The page of any latent.

        Args:
            effects: tokens that the decoder's row raises, and lowers.
        """
        said, feature = self._said.of(latent), self._features.get(latent)
        card = self.card(latent) if feature is not None else None
        output = None if feature is None else feature.output
        bar = self.labels.high_confidence_threshold
        return FeaturePage(
            latent=latent,
            shown=said.text,
            is_label=said.is_label,
            sure=said.sure,
            usual=usual,
            kind="none" if feature is None else feature.kind,
            kind_words=kind_words(feature, said),
            worth=[] if feature is None else worth_words(feature, said, bar),
            tried=[] if card is None else card.tried,
            numbers=[] if feature is None else numbers(feature),
            promoted=effects[0],
            suppressed=effects[1],
            raised=[] if output is None else [gain.token for gain in output.raised],
            lowered=[] if output is None else [gain.token for gain in output.lowered],
            examples=[] if card is None else card.examples,
            relations=self._relations.of(latent),
            reviews=[] if card is None else card.reviews,
            code=code,
        )

    def has(self, latent: int) -> bool:
        """Whether the latent was among those to label."""
        return latent in self._by_latent

    def card(self, latent: int) -> FeatureCard:
        """The card of a latent that there is one of (`has`), with the verdicts on it."""
        lines = [line.bare() for line in self._lines() if line.latent == latent]
        published = self._features[latent].reviews
        # What the labels already took in stands in the file as well, unless the file is new.
        earlier = [review for review in published if not any(_same(review, r) for r in lines)]
        reviews = tuple(ReviewShown.model_validate(review) for review in (*earlier, *lines))
        return self._by_latent[latent].model_copy(update={"reviews": reviews})

    def queue(self, count: int) -> QueueAnswer:
        """The next labels to look at, and how far the work has come."""
        seen = settled(self._lines(), self.labels.features)
        reviewed = sum(f.latent in seen or f.reviewed for f in self.labels.features)
        waiting = self._queue.waiting(self.labels, seen)
        return QueueAnswer(
            cards=[self.card(feature.latent) for feature in waiting[:count]],
            reviewed=reviewed,
            all=len(self.labels.features),
        )

    def review(self, request: ReviewRequest) -> ReviewShown:
        """Append a verdict; returns it as it is kept.

        Raises:
            BadInputError: the latent has no card, so nobody can have judged its label.
        """
        card = self._by_latent.get(request.latent)
        if card is None or (card.label is None and request.label is None):
            raise BadInputError(
                f"Latent {request.latent} has no label to judge.",
                "Only features of the review queue can be reviewed.",
                "Give a better label, or choose another feature.",
            )
        line = ReviewLine(
            sae_digest=self.labels.sae_digest,
            latent=request.latent,
            reviewer=request.reviewer.strip(),
            accept=request.accept,
            label=None if request.label is None else request.label.strip(),
            # Not for the page to say, and not shown there: who knows it may judge otherwise.
            audit=request.latent in self._audit,
            note=request.note,
            shown=self._label_of.get(request.latent),
        )
        return ReviewShown.model_validate(append_review(self.reviews, line))

    def _lines(self) -> list[ReviewLine]:
        if not self.reviews.is_file():
            return []
        return read_reviews(self.reviews, self.labels.sae_digest, strict=False)

    def _holds(self, card: FeatureCard, word: str) -> bool:
        if word.startswith("#"):
            return word == f"#{card.latent}"
        return word in self._haystacks[card.latent]


def _number_in(words: str) -> int | None:
    """The latent that `#1472` or `1472` names; None: these are words."""
    text = words.strip().removeprefix("#")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None


def _haystack(card: FeatureCard) -> str:
    fired = (example for example in card.examples if example.kind != "near_miss")
    contexts = ("".join(example.tokens) for example in fired)
    others = (other.label or "" for other in card.others)
    parts = (card.shown, card.label or "", card.failure or "", *others, *card.promoted, *contexts)
    return "\n".join(parts).lower()


def _same(published: Review, line: Review) -> bool:
    """Whether both are one verdict; labels of an older program kept no times."""
    return published == (line if published.at else line.model_copy(update={"at": None}))
