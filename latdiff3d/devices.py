"""Where the networks compute and in which number format: 16-bit autocast where it is wanted and is of use."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from latdiff3d.errors import InputError

BF16_UNITS = ("avx512_bf16", "amx_bf16")  # of CPUs, as torch.cpu.get_capabilities names them; not tried on ARM
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


def device(gpus: str | int | None = None) -> torch.device:
    """Return the device to compute on.

    Args:
        gpus: numbers, as "0" or "0,1", one for each process on this machine; or nothing for as many GPUs as processes,
            the first for one, or the CPU where there is none.

    Raises:
        InputError: another number of GPUs than of processes, or one that is not there.
    """
    local_rank, num_local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    numbers = [part.strip() for part in str(gpus if gpus is not None else "").split(",") if part.strip()]
    if not numbers:
        return torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if len(numbers) != num_local or not all(number.isdigit() for number in numbers):
        raise InputError(
            f"gpus is {gpus!r} for {num_local} process{'es' * (num_local > 1)}; expected the number of one GPU for "
            "each, such as 0, or torchrun --nproc_per_node 2 main.py … --gpus 0,1."
        )
    number = int(numbers[local_rank])
    if number >= torch.cuda.device_count():
        raise InputError(
            f"gpus is {gpus!r}, but {torch.cuda.device_count()} GPUs are visible here; leave it out to use the CPU."
        )
    if num_local > 1:
        torch.cuda.set_device(number)  # where NCCL, and what only says "cuda", shall be
    return torch.device(f"cuda:{number}")


def fastest_precision(device: torch.device) -> str:
    """Return "bf16" where `device` multiplies bfloat16 itself, else "fp32".

    Emulated, bfloat16 costs time instead of saving it: a 3D convolution's training step on an Ice Lake CPU, which has
    AVX-512 without its bfloat16 part, took 2.4 times as long as in float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    has = torch.cpu.get_capabilities()
    return "bf16" if any(has.get(name, False) for name in BF16_UNITS) else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context in which a network's forward pass runs.

    Args:
        device: where it runs.
        precision: "bf16" or "fp16" (autocast to bfloat16 or float16; weights stay in float32), or "fp32".

    Raises:
        InputError: for any other precision.
    """
    if precision == "fp32":
        return nullcontext()
    if precision in FORMATS:
        return torch.autocast(device.type, FORMATS[precision])
    raise InputError(f"precision is {precision!r}; expected 'bf16', 'fp16' or 'fp32'.")
