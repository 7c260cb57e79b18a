"""The axes of arrays in signatures, told once; docstrings write them as the letters given here.

`Float[Tensor, "tokens d_model"]` is jaxtyping's: a float tensor with two axes. Within one
signature an axis has one length. `*places` is any number of axes, none included; `#batch` may be
1 instead. The tests hold calls to them (tests/array_checks.py); outside tests they are words.
"""

from __future__ import annotations

AXES = {
    "active": "K: latents that are kept for a token, active ones and padding",
    "axes": "any shape at all",
    "bags": "B of `Bags`: sums of pairs",
    "batch": "B: sequences, prompts or responses that are run together",
    "bins": "equal ranges of confidence",
    "candidates": "C: latents of a place that a claim may name",
    "cells": "[M], the pairs that were chosen, or [N, L], all of them",
    "claims": "n: features that a method names at a place",
    "d_model": "D: width of the residual stream",
    "groups": "G: nested dictionaries",
    "interventions": "M: changes of a place's latents",
    "latents": "L: columns of the dictionary",
    "length": "T: positions of a sequence, in order",
    "pairs": "M: (token, latent) pairs that count in a batch",
    "places": "N: positions in text that are looked at, of any shape where a star stands before it",
    "prompts": "of the tasks",
    "seeds": "S: trainings of one system",
    "seen": "positions that attention reaches, those in the cache included",
    "sequences": "S: whole sequences of text",
    "sizes": "of the sets that a deletion takes away",
    "some": "a choice of the things that the argument is named after",
    "tokens": "N: rows of text, from any sequences",
    "variants": "m: versions of one place",
    "vocab": "V: tokens of the vocabulary",
}
"""Name to meaning."""
