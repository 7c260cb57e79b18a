"""Are a frozen model's parts the model? A comparison with its own forward pass.

The project runs a model in parts: blocks up to a layer, blocks from a layer on, an output layer
of its own. An architecture that does more between them (scales its logits, uses its final norm
twice, hands something from block to block beside the residual stream) would give wrong numbers
without a word. Here each part is compared with the whole, on two short sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from rldecoder.errors import BadInputError, NumericalError, RlDecoderError
from rldecoder.lm.cut import replaced_input
from rldecoder.lm.placement import rounds_activations

if TYPE_CHECKING:
    from rldecoder.lm.frozen import FrozenLM

_LENGTH, _SHORTER, _CACHED = 12, 8, 9
"""Tokens of the long sequence, of the short one, and how many of them a cache holds at first."""
_LAYERS = 8
"""How many layers the full proof cuts at, evenly spaced, the first and the last among them."""
_TOLERANCE = {torch.float32: 2e-3, torch.float64: 2e-3, torch.float16: 2e-2}
_COARSE = 6e-2
"""Largest relative error that counts as rounding (measured: 1e-5 in float32, 1e-2 in bfloat16,
2e-2 with activations of 8 bits)."""


class _Difference(NamedTuple):
    """One comparison."""

    what: str
    error: float
    """|found - own| / |own| of a token; of the worst in float32, of the median one below: there a
    choice between experts may turn on rounding at single tokens."""


def prove(lm: FrozenLM, *, brief: bool = False, hook_layer: int | None = None) -> None:
    """Raise unless trunk, tail and unembedding give what the model's own forward pass gives.

    In full (a dozen passes over 20 tokens): at up to `_LAYERS` layers, with padding on the left,
    and with a cache. In brief (three passes): at the middle layer, the sequence alone.

    Args:
        lm: the model.
        brief: prove in brief.
        hook_layer: prove in full at this layer, and at no other.

    Raises:
        BadInputError: something differs by more than rounding, the model cannot be run so, or it
            does what short sequences do not show.
        NumericalError: the model's own numbers are not finite.
    """
    _require_plain_attention(lm)
    tolerance = _COARSE if rounds_activations(lm.model) else _TOLERANCE.get(lm.dtype, _COARSE)
    try:
        with torch.no_grad():
            for found in _comparisons(lm, brief, hook_layer):
                if not found.error <= tolerance:
                    raise _refusal(
                        lm,
                        f"{found.what} differ from the model's own by {found.error:.2g} of their "
                        f"size (rounding in {str(lm.dtype).removeprefix('torch.')}: at most "
                        f"{tolerance:.2g}).",
                    )
    except (RlDecoderError, MemoryError, torch.OutOfMemoryError):
        raise
    # Architectures of every kind come by here: what an unsuited one raises is its own affair.
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise _refusal(
            lm, f"Its blocks cannot be run by themselves: {type(error).__name__}: {reason}"
        ) from error


def _require_plain_attention(lm: FrozenLM) -> None:
    """Raise if attention looks at positions that an index of its own has chosen.

    The choice begins beyond thousands of positions, so that the sequences of this proof would show
    nothing. There it hangs on more than the text: ties are broken, and blocks are counted, by the
    place in the batch, so that padding and caches change it.
    """
    for name, module in lm.base.named_modules():
        if "Indexer" in type(module).__name__:
            raise _refusal(
                lm,
                f"Its attention looks at positions that an index chooses (`{name}`): in long texts "
                "others with padding or a cache than without.",
            )


def _refusal(lm: FrozenLM, why: str) -> BadInputError:
    return BadInputError(
        f"Models of type {lm.model.config.model_type!r} are not supported.",
        why,
        "docs/models.md lists the types that work: use a model of one of these.",
    )


def _comparisons(lm: FrozenLM, brief: bool, hook_layer: int | None) -> Iterator[_Difference]:
    depth = lm.num_layers
    ids, short = _probe(lm)
    own, logits = _own(lm, ids)
    yield _compare("logits", lm.unembed(lm.tail(own[depth], depth)), logits)

    # Trunk and tail, the sequence alone.
    layers = [(depth + 1) // 2] if brief else _spread(depth)
    layers = layers if hook_layer is None else [hook_layer]
    final = lm.resid_and_final(ids, 0)[1]
    for layer in layers:
        at = f"at layer {layer}"
        yield _compare(f"residuals {at}", lm.trunk(ids, layer).resid, own[layer])
        yield _compare(f"final hidden states from layer {layer}", lm.tail(own[layer], layer), final)
    if brief:
        return

    # Both sequences in one batch, the shorter one padded on the left.
    pad = ids.shape[1] - short.shape[1]
    batch = torch.cat([ids, torch.cat([ids[:, :pad], short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :pad] = 0

    own_short, logits_short = _own(lm, short)
    finals = [final, lm.resid_and_final(short, 0)[1]]
    cached = [_cached_layer(lm), depth] if hook_layer is None else [hook_layer]
    for layer in dict.fromkeys(cached):
        owns, at = [own[layer], own_short[layer]], f"at layer {layer}"
        resid = lm.trunk(batch, layer, attention_mask=mask).resid
        yield _compare_rows(f"residuals {at} of padded sequences", resid, owns)
        found = lm.tail(resid, layer, attention_mask=mask)
        yield _compare_rows(
            f"final hidden states of padded sequences from layer {layer}", found, finals
        )
        for cache in (None, DynamicCache()):
            found = _in_parts(batch.shape[1], partial(_trunk_part, lm, layer, batch, mask), cache)
            yield _compare_rows(f"residuals {at} with a cache", found, owns)
        found = _in_parts(
            batch.shape[1], partial(_tail_part, lm, layer, resid, mask), lm.tail_cache(layer)
        )
        yield _compare_rows(f"final hidden states from layer {layer} with a cache", found, finals)
    found = _in_parts(batch.shape[1], partial(_model_part, lm, batch, mask), None)
    yield _compare_rows("logits with a cache", found, [logits, logits_short])


def _probe(lm: FrozenLM) -> tuple[Tensor, Tensor]:
    """Token ids [1, 12] and [1, 8], shorter for a model that reads less; nothing special."""
    special = set(lm.tokenizer.all_special_ids) | set(lm.end_token_ids)
    step = max(1, lm.vocab_size // (2 * _LENGTH + _SHORTER + len(special)))
    plain = [token for token in range(1, lm.vocab_size, step) if token not in special]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(plain), generator=generator)
    tokens = torch.tensor(plain)[order].repeat(1 + (_LENGTH + _SHORTER) // max(1, len(plain)))
    length = min(_LENGTH, lm.context_length)
    shorter = max(1, min(_SHORTER, length - 1))
    tokens = tokens.to(lm.device)
    return tokens[None, :length], tokens[None, length : length + shorter]


def _own(lm: FrozenLM, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Residuals at every layer, and logits, as they are in the model's own forward pass.

    Raises:
        BadInputError: a block or the final norm is run more than once, or not at all.
        NumericalError: they are not finite.
    """
    seen: list[list[Tensor]] = [[] for _ in range(lm.num_layers + 1)]
    with ExitStack() as hooks:
        for layer, calls in enumerate(seen):
            hooks.enter_context(replaced_input(lm.part_after(layer), partial(_keep, calls)))
        logits: Tensor = lm.model(input_ids=ids, use_cache=False).logits
    for layer, calls in enumerate(seen):
        if len(calls) != 1:
            part = "final norm" if layer == lm.num_layers else f"block {layer}"
            raise _refusal(lm, f"Its {part} is run {len(calls)} times in one pass, not once.")
        if calls[0].dim() != 3:
            raise _refusal(lm, f"Its residual stream at layer {layer} is no [B, T, D].")
        if not bool(calls[0].isfinite().all() and logits.isfinite().all()):
            raise NumericalError(
                f"The model at {lm.folder} gives NaN or infinity on ordinary tokens "
                f"(residuals at layer {layer}, or logits).",
                f"Its weights are damaged, or {lm.dtype} is too narrow for it.",
                "Check the weights, or use float32 (`compute_dtype`).",
            )
    return [calls[0] for calls in seen], logits


def _spread(depth: int) -> list[int]:
    """Up to `_LAYERS` layers from 0 to `depth`."""
    parts = min(depth, _LAYERS - 1)
    return sorted({round(part * depth / parts) for part in range(parts + 1)})


def _cached_layer(lm: FrozenLM) -> int:
    """The layer nearest to the middle with a cache on both sides.

    Where all blocks on a side are linear attention there is none.
    """
    layers = range(1, lm.num_layers + 1)
    middle = (lm.num_layers + 1) // 2
    for layer in sorted(layers, key=lambda layer: abs(layer - middle)):
        if lm.has_caches(layer):
            return layer
    return middle  # what makes a cache there says why it cannot


def _in_parts(
    length: int, read: Callable[[int, int, Any], tuple[Tensor, Any]], cache: Cache | None
) -> Tensor:
    """A pass in three parts: most tokens, one, the rest; each goes on where the last stopped."""
    parts = []
    first = min(_CACHED, length - 1)
    for start, end in ((0, first), (first, first + 1), (first + 1, length)):
        if end > start:
            part, cache = read(start, end, cache)
            parts.append(part)
    return torch.cat(parts, dim=1)


def _trunk_part(
    lm: FrozenLM, layer: int, ids: Tensor, mask: Tensor, start: int, end: int, cache: Cache | None
) -> tuple[Tensor, Cache | None]:
    return lm.trunk(
        ids[:, start:end],
        layer,
        attention_mask=mask[:, :end],
        past_key_values=cache,
        use_cache=True,
    )


def _tail_part(
    lm: FrozenLM, layer: int, resid: Tensor, mask: Tensor, start: int, end: int, cache: Cache
) -> tuple[Tensor, Cache]:
    part = lm.tail(resid[:, start:end], layer, attention_mask=mask[:, :end], past_key_values=cache)
    return part, cache


def _model_part(
    lm: FrozenLM, ids: Tensor, mask: Tensor, start: int, end: int, cache: Cache | None
) -> tuple[Tensor, Cache]:
    """As answers are generated (`evals.generation`)."""
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, start:end]
    out = lm.model(
        input_ids=ids[:, start:end],
        attention_mask=mask[:, :end],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=end - start,
    )
    return out.logits, out.past_key_values


def _compare_rows(what: str, found: Tensor, owns: list[Tensor]) -> _Difference:
    """Each row of a batch [B, T, D] with a sequence [1, at most T, D] that was run alone."""
    errors = [
        _errors(row[len(row) - own.shape[1] :], own[0])
        for row, own in zip(found, owns, strict=True)
    ]
    return _difference(what, torch.cat(errors), found.dtype)


def _compare(what: str, found: Tensor, own: Tensor) -> _Difference:
    return _difference(what, _errors(found, own).flatten(), own.dtype)


def _errors(found: Tensor, own: Tensor) -> Tensor:
    """Relative error of each token."""
    found, own = found.double(), own.double()
    return (found - own).norm(dim=-1) / own.norm(dim=-1).clamp_min(1e-30)


def _difference(what: str, errors: Tensor, dtype: torch.dtype) -> _Difference:
    exact = dtype in (torch.float32, torch.float64)
    return _Difference(what, float(errors.max() if exact else errors.median()))


def _keep(calls: list[Tensor], resid: Tensor) -> Tensor:
    calls.append(resid)
    return resid
