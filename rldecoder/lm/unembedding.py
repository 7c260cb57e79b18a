"""The output layer of a frozen model: final hidden states to float32 logits, and back.

Axes: D model width, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rldecoder.errors import BadInputError

# What some architectures multiply their logits with, before any cap. `proof.prove` finds those
# that are not here.
_SCALE_SETTINGS = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "cohere2_moe": ("logit_scale", 1),
    "cohere_compass_text": ("logit_scale", 1),
    "granite": ("logits_scaling", -1),
    "granite_swa": ("logits_scaling", -1),
    "granitemoe": ("logits_scaling", -1),
    "granitemoe_swa": ("logits_scaling", -1),
    "granitemoehybrid": ("logits_scaling", -1),
    "granitemoeshared": ("logits_scaling", -1),
    "hyperclovax": ("logits_scaling", 1),
    "minicpm3": ("logits_scaling", -1),
}
"""Model type -> (its setting, 1 = multiplied with it, -1 = divided by it)."""


class Unembedding:
    """`logits = cap(scale * (hidden @ weight.T + bias))`, summed in float32.

    Raises:
        BadInputError: the model has no output layer of that form.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        if not isinstance(getattr(head, "weight", None), Tensor) or head.weight.dim() != 2:
            raise BadInputError(
                f"Models of type {model.config.model_type!r} are not supported.",
                "There is no output layer that makes logits.",
                "Use a causal language model.",
            )
        self._model = model
        setting, power = _SCALE_SETTINGS.get(model.config.model_type, (None, 1))
        value = None if setting is None else getattr(model.config, setting, None)
        self.scale = 1.0 if value is None else float(value) ** power
        """What logits are multiplied with (Granite, Cohere), 1 for most models."""
        self._float32: Tensor | None = None
        self._scaled: Tensor | None = None

    @property
    def cap(self) -> float | None:
        """The bound on logits, where the model has one (Gemma 2)."""
        return getattr(self._model.config, "final_logit_softcapping", None)

    @property
    def head(self) -> nn.Module:
        """The layer itself."""
        return self._model.get_output_embeddings()

    @property
    def stored(self) -> Tensor:
        """The layer's weights [V, D] as they are, in the model's dtype."""
        weight = self.head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def directions(self) -> Tensor:
        """What a hidden state is multiplied with, the scale included: [V, D], model's dtype."""
        stored = self.stored
        if self.scale == 1.0:
            return stored
        if self._scaled is None or self._scaled.device != stored.device:  # the model may move
            self._scaled = (stored.float() * self.scale).to(stored.dtype)
        return self._scaled

    def logits(
        self, final_hidden: Tensor, *, out: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """See `FrozenLM.unembed`."""
        weight = self._weight()
        bias = getattr(self.head, "bias", None)
        if tokens is not None:
            assert out is None
            weight = weight[tokens]
            bias = None if bias is None else bias[tokens]
        # bfloat16 factors have exact float32 products, which the CPU's bfloat16 units add up in
        # float32: same logits to 1e-6, and half the time of a float32 product (measured).
        exact = final_hidden.dtype == self.stored.dtype == torch.bfloat16
        with _bfloat16_products() if exact else nullcontext():
            if out is None:
                logits = F.linear(
                    final_hidden.float(), weight, None if bias is None else bias.float()
                )
                if self.scale != 1.0:
                    logits = logits * self.scale
                return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap
            with torch.no_grad():
                torch.mm(final_hidden.float(), weight.T, out=out)
        if bias is not None:
            out += bias
        if self.scale != 1.0:
            out *= self.scale
        return out if self.cap is None else out.div_(self.cap).tanh_().mul_(self.cap)

    def gradient(self, logits: Tensor, grad: Tensor) -> Tensor:
        """See `FrozenLM.unembed_gradient`."""
        if self.cap is not None:
            grad.mul_(1 - (logits / self.cap).square())
        sent = grad @ self._weight()
        return sent if self.scale == 1.0 else sent * self.scale

    def _weight(self) -> Tensor:
        """The stored weights [V, D] in float32."""
        stored = self.stored
        if stored.dtype == torch.float32:
            return stored
        if self._float32 is None or self._float32.device != stored.device:
            self._float32 = stored.float()
        return self._float32


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """While open, CPU matrix products round float32 factors to bfloat16 and sum in float32."""
    mkldnn: Any = torch.backends.mkldnn
    setting = mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
