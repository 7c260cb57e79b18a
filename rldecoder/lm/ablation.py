"""Exact predictions of the frozen model with another residual at single positions.

The blocks above a layer are run once over a sequence, with a key-value cache. Every variant of a
position is then one more token: it sees what came before its position, as it was, and itself, and
no other variant. What came before is what the model's own mask of the whole sequence shows, block
by block: all of it, a window, a chunk. So a thousand ablations in a sequence cost a thousand
tokens, and not a thousand sequences.

Where a model's blocks cannot be read so (its mask does more than to allow and to forbid, or a
comparison with the sequence as a whole fails), each variant is the last position of a sequence of
its own: as exact, and slow.

Axes: T position, D model width, V vocabulary, n variants, S cached and new positions.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import Cache

from rldecoder.errors import BadInputError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.masks import allowed_by, given_mask, seen_masks

_COMPARED = 12
"""Positions of a comparison with the whole sequence, at least."""
_EXACT = (torch.float32, torch.float64)
_ROUNDING, _COARSE_ROUNDING = 1e-3, 5e-2
"""Largest relative error of the worst position in float32; of the median one below, where a choice
between experts may turn on rounding."""
_WHOLE_TOKENS = 8192
"""Tokens of a batch of whole sequences."""


class PlaceReader:
    """Reads changed positions of sequences, in the blocks above one layer."""

    def __init__(self, lm: FrozenLM, layer: int) -> None:
        self.lm, self.layer = lm, layer
        self.slow_because: str | None = None
        """Why every variant is run as a whole sequence; None while that is not needed."""
        self._compared = 0

    def sequence(self, resid: Tensor) -> ReadSequence:
        """Run the blocks above the layer once.

        Args:
            resid: [T, D] the residual stream at the layer, from the sequence's first token on.
        """
        return ReadSequence(self, resid.to(self.lm.device, self.lm.dtype))

    def check(self, text: ReadSequence, variants: int) -> None:
        """Compare with the whole sequence, where more is asked for than was compared before.

        A window shows only where there are more positions than it is wide, cached and new ones
        together, for attention that counts them.
        """
        size = len(text.resid) + variants
        if self.slow_because is None and size > self._compared:
            # More than is needed, so that few sequences need another comparison.
            size = max(64, 1 << (size - 1).bit_length())
            self.slow_because = text.difference(size - len(text.resid))
            self._compared = size


class ReadSequence:
    """One sequence, unchanged, and what any change of one of its positions would make of it."""

    final: Tensor
    """[T, D] the unchanged final hidden states."""

    @torch.no_grad()
    def __init__(self, reader: PlaceReader, resid: Tensor) -> None:
        self._reader, self.resid = reader, resid
        lm, layer = reader.lm, reader.layer
        self._blocks = torch.nn.ModuleList(lm.part_after(n) for n in range(layer, lm.num_layers))
        self._cache: Cache | None = None
        self._masks: tuple[Tensor, ...] = ()
        if not self._blocks:  # the final norm alone
            self.final = lm.tail(resid[None], layer)[0]
            return
        try:
            cache = lm.tail_cache(layer)
            with seen_masks(self._blocks) as seen:
                self.final = lm.tail(resid[None], layer, past_key_values=cache)[0]
            by_kind = {id(mask): allowed_by(mask, len(resid), resid.device) for mask in seen}
            self._masks = tuple(by_kind[id(mask)] for mask in seen)
            self._cache = cache
        except BadInputError as error:
            reader.slow_because = reader.slow_because or error.what
            self.final = lm.tail(resid[None], layer)[0]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, nearly."""
        kept = [self.resid, self.final, *set(self._masks)]
        for layer in [] if self._cache is None else self._cache.layers:
            kept += [value for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def hidden(self, resid: Tensor, position: Tensor) -> Tensor:
        """Final hidden states [n, D] of variants of positions; differentiable.

        Args:
            resid: [n, D] what stands at the layer in place of the position's own residual.
            position: [n] int64, 0 to T - 1; may repeat.
        """
        resid, position = resid.to(self.resid), position.to(self.resid.device)
        self._reader.check(self, len(position))
        if self._reader.slow_because is None:
            return self._one_token_each(resid, position)
        return self._one_sequence_each(resid, position)

    def logprobs(self, resid: Tensor, position: Tensor) -> Tensor:
        """[n, V] float32 log-probabilities of the next token; arguments as for `hidden`."""
        return self._reader.lm.unembed(self.hidden(resid, position)).log_softmax(-1)

    def without(self, removed: Tensor, position: Tensor) -> Tensor:
        """[n, D] residuals at the layer less `removed` [n, D], for `hidden` and `logprobs`."""
        here = self.resid[position.to(self.resid.device)].float()
        return here - removed.to(here)

    def difference(self, variants: int) -> str | None:
        """Why so many variants as single tokens would be wrong here; None if they are right."""
        number = max(variants, _COMPARED)
        positions = torch.linspace(0, len(self.resid) - 1, number, device=self.resid.device)
        place = positions.long()
        try:
            with torch.no_grad():
                found = self._one_token_each(self.resid[place], place).double()
        except torch.OutOfMemoryError:
            raise
        # A model that cannot take such a mask says so in its own words.
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0]
        own = self.final[place].double()
        errors = (found - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-30)
        exact = self.resid.dtype in _EXACT
        worst = float(errors.max() if exact else errors.median())
        if worst <= (_ROUNDING if exact else _COARSE_ROUNDING):
            return None
        return f"beside the whole sequence a single position is off by {worst:.2g} of it"

    def _one_token_each(self, resid: Tensor, position: Tensor) -> Tensor:
        length = len(self.resid)
        before = torch.arange(length, device=position.device) < position[:, None]
        itself = torch.eye(len(position), dtype=torch.bool, device=position.device)
        added: dict[int, Tensor] = {}
        for own in self._masks:
            if id(own) in added:  # blocks of one kind share a mask
                continue
            allowed = torch.cat([before & own[position], itself], dim=1)
            mask = torch.zeros(allowed.shape, dtype=resid.dtype, device=resid.device)
            added[id(own)] = mask.masked_fill(~allowed, torch.finfo(resid.dtype).min)[None, None]

        with ExitStack() as hooks:
            for block, own in zip(self._blocks, self._masks, strict=True):
                hooks.enter_context(given_mask(block, added[id(own)]))
            out = self._reader.lm.tail(
                resid[None],
                self._reader.layer,
                attention_mask=next(iter(added.values()), None),
                position_ids=position[None],
                past_key_values=_continued(self._cache),
            )
        return out[0]

    def _one_sequence_each(self, resid: Tensor, position: Tensor) -> Tensor:
        lm, layer = self._reader.lm, self._reader.layer
        out = torch.empty_like(resid)
        for place in position.unique().tolist():
            rows = (position == place).nonzero()[:, 0]
            for part in rows.split(max(1, _WHOLE_TOKENS // (place + 1))):
                before = self.resid[None, :place].expand(len(part), -1, -1)
                whole = torch.cat([before, resid[part, None]], dim=1)
                out = out.index_put((part,), lm.tail(whole, layer)[:, -1])
        return out


def _continued(cache: Cache | None) -> Cache | None:
    """The cache, to be gone on from: what is added is not in the original."""
    if cache is None:
        return None
    view = copy.copy(cache)
    # A layer joins old and new keys to a new tensor and forgets the old ones.
    view.layers = [copy.copy(kept) for kept in cache.layers]
    return view
