"""RL-Decoder: read a frozen language model's middle layers through sparse features.

    import rldecoder

    run = rldecoder.open_run("configs/quickstart.yaml")
    reading = run.read("The hat is in the")

docs/library.md describes the names below.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM
    from rldecoder.lm.frozen import FrozenLM
    from rldecoder.release.opening import Release, open_release
    from rldecoder.run import Run, open_run
    from rldecoder.sae.model import Sae

__version__ = "0.2.0"

__all__ = [
    "FrozenLM",
    "Release",
    "Run",
    "Sae",
    "SaeDecoderForCausalLM",
    "__version__",
    "open_release",
    "open_run",
]

# Imported when first asked for: the command line starts without torch, an SAE without transformers.
_HOMES = {
    "FrozenLM": "rldecoder.lm.frozen",
    "Release": "rldecoder.release.opening",
    "Run": "rldecoder.run",
    "Sae": "rldecoder.sae.model",
    "SaeDecoderForCausalLM": "rldecoder.decoder.modeling_sae_decoder",
    "open_release": "rldecoder.release.opening",
    "open_run": "rldecoder.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
