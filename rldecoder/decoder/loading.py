"""Making and loading feature decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rldecoder.decoder.modeling_sae_decoder import SaeDecoderForCausalLM, new_decoder
from rldecoder.errors import BadInputError, DamagedFileError
from rldecoder.lm.frozen import FrozenLM
from rldecoder.lm.quiet import quiet_transformers
from rldecoder.sae.model import Sae
from rldecoder.schemas import JsonRecord


def save_decoder(decoder: SaeDecoderForCausalLM, folder: Path) -> None:
    """`save_pretrained` without its progress bar: config.json and the decoder's own weights."""
    with quiet_transformers():
        decoder.save_pretrained(folder)


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
            "Name the folder `decoder` of a published artifact.",
        )
    try:
        with quiet_transformers():
            loaded: Any = SaeDecoderForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DamagedFileError(
            f"The decoder in {folder} cannot be loaded.", str(error), "Rebuild its stage."
        ) from error
    decoder, info = loaded
    if info["missing_keys"] or info["unexpected_keys"]:
        raise DamagedFileError(
            f"The decoder in {folder} has missing or unknown weights.",
            f"Missing: {sorted(info['missing_keys'])}; unknown: {sorted(info['unexpected_keys'])}.",
            "Rebuild its stage.",
        )
    return decoder.attach(lm, sae).to(lm.device).eval()


class AffineLens(NamedTuple):
    """Predicts final hidden states from the residual stream: `resid @ A + c`."""

    A: Tensor
    """[D, D] float32."""
    c: Tensor
    """[D] float32."""

    def save(self, path: Path) -> None:
        """Write it as safetensors."""
        save_file(self._asdict(), path)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> AffineLens:
        """Read what `save` wrote.

        Raises:
            DamagedFileError: the file cannot be read.
        """
        try:
            tensors = load_file(path)
            return cls(tensors["A"].to(device), tensors["c"].to(device))
        except (SafetensorError, OSError, KeyError) as error:
            raise DamagedFileError(
                f"The affine lens in {path} cannot be read.", str(error), "Rebuild its stage."
            ) from error


class DecoderOrigin(JsonRecord):
    """What a supervised decoder was made of."""

    blocks: tuple[int, ...]
    """Numbers of the frozen model's blocks that it started from; none for `linear`."""
    trained_on: dict[str, str]
    """Digests of the artifacts that it was trained on, by stage."""


def read_affine_lens(path: Path, layer: int) -> AffineLens:
    """One layer's lens from the `affine_lens.safetensors` of the baselines.

    Raises:
        BadInputError: no lens was fitted at this layer.
        DamagedFileError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            layers = sorted(int(name[2:]) for name in names if name.startswith("A."))
            if layer in layers:
                return AffineLens(
                    file.get_tensor(f"A.{layer}").float(), file.get_tensor(f"c.{layer}").float()
                )
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(
            f"The affine lenses in {path} cannot be read.", str(error), "Rebuild the baselines."
        ) from error
    raise BadInputError(
        f"There is no affine lens at layer {layer}, where the SAE reads.",
        f"The baselines fitted lenses at layers {layers}.",
        f"Add {layer} to `baselines.lens_layers`.",
    )


@torch.no_grad()
def decoder_from_lens(lm: FrozenLM, sae: Sae, lens: AffineLens) -> SaeDecoderForCausalLM:
    """The decoder that reads the SAE's reconstruction through an affine lens.

    The lens (tuned lens, arXiv 2303.08112) must be that of the SAE's hook layer. With `resid`
    replaced by `latents @ W_dec + b_dec` it is the linear decoder with `W = W_dec @ A` and
    `b = b_dec @ A + c`: the best start that needs no training.
    """
    decoder = new_decoder(lm, sae)
    A, c = (tensor.to(lm.device, torch.float32) for tensor in lens)
    decoder.W.copy_(sae.W_dec.float() @ A)
    decoder.b.copy_(sae.b_dec.float() @ A + c)
    return decoder
