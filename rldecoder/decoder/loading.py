"""Making and loading feature decoders."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.sae.model import Sae


def load_decoder(folder: Path, lm: FrozenLM, sae: Sae) -> SaeDecoderForCausalLM:
    """Load a decoder saved with `save_pretrained` and attach it, in float32, on `lm.device`.

    Raises:
        BadInputError: there is no decoder in `folder`, or it belongs to another model or SAE.
        DamagedFileError: its weights cannot be read, or some are missing.
    """
    if not (folder / "config.json").is_file():
        raise BadInputError(
            f"There is no decoder in {folder}.",
            "A decoder's folder holds config.json and model.safetensors.",
            "Run the stage train_decoder first.",
        )
    try:
        decoder, info = SaeDecoderForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DamagedFileError(
            f"The decoder in {folder} cannot be loaded.", str(error), "Rebuild its stage."
        ) from error
    if info["missing_keys"] or info["unexpected_keys"]:
        raise DamagedFileError(
            f"The decoder in {folder} has missing or unknown weights.",
            f"Missing: {sorted(info['missing_keys'])}; unknown: {sorted(info['unexpected_keys'])}.",
            "Rebuild its stage.",
        )
    return decoder.attach(lm, sae).to(lm.device).eval()


@torch.no_grad()
def decoder_from_lens(lm: FrozenLM, sae: Sae, A: Tensor, c: Tensor) -> SaeDecoderForCausalLM:
    """The decoder that reads the SAE's reconstruction through an affine lens.

    The lens predicts final hidden states as `resid @ A + c` (tuned lens, arXiv 2303.08112).
    With `resid` replaced by `latents @ W_dec + b_dec` this is the linear decoder with
    `W = W_dec @ A` and `b = b_dec @ A + c`: the best start that needs no training.

    Args:
        A: [D, D] float32, lens matrix at the SAE's hook layer.
        c: [D] float32, lens bias.
    """
    decoder = new_decoder(lm, sae)
    A, c = A.to(lm.device, torch.float32), c.to(lm.device, torch.float32)
    decoder.W.copy_(sae.W_dec.float() @ A)
    decoder.b.copy_(sae.b_dec.float() @ A + c)
    return decoder
