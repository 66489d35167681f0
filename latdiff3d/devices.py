"""Where the networks compute and in which number format: 16-bit autocast where it is wanted and is of use."""

from contextlib import AbstractContextManager, nullcontext

import torch

from latdiff3d.errors import InputError

BF16_UNITS = ("avx512_bf16", "amx_bf16")  # of CPUs, as torch.cpu.get_capabilities names them; not tried on ARM
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of autocast


def device(gpus: str | int | None = None) -> torch.device:
    """Return the device to compute on.

    Args:
        gpus: the number of one GPU, as "0" or "0,", or nothing for the first GPU where there is one, else the CPU.

    Raises:
        InputError: several GPUs, or one that is not there.
    """
    numbers = [part.strip() for part in str(gpus if gpus is not None else "").split(",") if part.strip()]
    if not numbers:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if len(numbers) > 1 or not numbers[0].isdigit():
        raise InputError(f"gpus is {gpus!r}; expected the number of one GPU, such as 0, (one process uses one GPU).")
    if int(numbers[0]) >= torch.cuda.device_count():
        raise InputError(
            f"gpus is {gpus!r}, but {torch.cuda.device_count()} GPUs are visible here; leave it out to use the CPU."
        )
    return torch.device(f"cuda:{numbers[0]}")


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
