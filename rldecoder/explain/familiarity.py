"""How far a text is from what a run was trained on, by how well its SAE reads the text.

An SAE reconstructs residuals of text like its own; on other text it leaves more of them out, and
what decoder, labels and claims say rests on the part that it kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rldecoder.explain.checking import TextStates
from rldecoder.lm.sinks import is_sink
from rldecoder.sae.model import Sae

FEW_TOKENS = 16
"""Below this many tokens the measurement is rough, and says so."""
LIKE, UNLIKE = 1.4, 2.2
"""Times the run's own unexplained share: up to the first a text is like the run's, from the second
on unlike it. On SmolLM2's quickstart the share differs by 1.2 between prose and documentation."""


class Familiarity(NamedTuple):
    """One text beside the run's held-out text."""

    fvu: float
    """Share of the text's variance, about the SAE's `b_dec`, that the SAE leaves unexplained."""
    of_run: float
    """The same of the run's held-out text, about its mean."""
    num_tokens: int
    """Measured; attention sinks are left out."""

    @property
    def verdict(self) -> str:
        """`like`, `somewhat unlike` or `unlike` the run's text."""
        ratio = self.fvu / max(self.of_run, 1e-9)
        return "like" if ratio <= LIKE else "somewhat unlike" if ratio <= UNLIKE else "unlike"

    @property
    def said(self) -> str:
        """In a sentence."""
        care = {
            "like": "",
            "somewhat unlike": " Read features and claims with some care.",
            "unlike": " Features and claims may mean little here.",
        }[self.verdict]
        rough = (
            "" if self.num_tokens >= FEW_TOKENS else f" ({self.num_tokens} tokens: a rough sign)"
        )
        return (
            f"This text is {self.verdict} what the run was trained on: its SAE leaves "
            f"{self.fvu:.0%} unexplained here, {self.of_run:.0%} on the run's held-out "
            f"text{rough}.{care}"
        )


@torch.no_grad()
def familiarity(states: TextStates, sae: Sae, of_run: float) -> Familiarity | None:
    """How far a text is from a run's; None of a text that is all attention sinks.

    Args:
        states: as the frozen model read the text.
        of_run: the SAE's fvu on the run's held-out text (`BestSae.fvu`).
    """
    resid = states.resid.float()
    ordinary = ~is_sink(resid)
    ordinary[0] = False  # always a sink
    if not ordinary.any():
        return None
    error = (resid - sae.decode(states.latents))[ordinary].square().sum()
    spread = (resid - sae.b_dec)[ordinary].square().sum()
    return Familiarity(float(error / spread.clamp_min(1e-12)), of_run, int(ordinary.sum()))
