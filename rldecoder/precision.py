"""Which dtype the hardware is fast with, where a setting leaves it to the hardware."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether products of bfloat16 factors are faster than float32 ones there.

    A CPU without units for them (x86 before AVX-512, most laptops) unpacks every factor in
    software: 15 GFLOP/s beside 80 in float32 were measured on two cores with AVX2. Intel's
    AVX-512 has an instruction for them, which was slower than float32's: 180 beside 260 to
    350 GFLOP/s on two cores without AMX. With AMX they are faster, and so they are on AMD's CPUs
    with AVX-512: 800 beside 210 on two cores of Zen 5.
    """
    if torch.device(device).type != "cpu":
        return True
    # What torch itself asks before it multiplies in bfloat16 on a CPU; it has no public name.
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16")) or not str(has.get("cpu_name", "")).startswith("Intel")


def fast_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The dtype that a setting names; float32 for `bfloat16` where the device is slow with it.

    The weights are the same ones; they and what is computed from them are only rounded less.
    """
    if name == "bfloat16" and not has_bfloat16(device):
        return torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
