"""The number format: bfloat16 by itself only where the device multiplies it itself, and no format by guess."""

import pytest
import torch

from latdiff3d.devices import autocast, device, fastest_precision
from latdiff3d.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({}, "fp32"),
        ({"avx512_f": True, "avx512_vnni": True, "avx512_bf16": False}, "fp32"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_with_units_for_it(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert fastest_precision(CPU) == expected


@pytest.mark.parametrize(("has_units", "expected"), [(True, "bf16"), (False, "fp32")])
def test_so_does_a_gpu(monkeypatch, has_units, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units or including_emulation)
    assert fastest_precision(torch.device("cuda:0")) == expected


def test_autocast_computes_in_the_format_named():
    a = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp16"):
        assert (a @ a).dtype == torch.float16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="precision is 'int8'; expected 'bf16', 'fp16' or 'fp32'"):
        autocast(CPU, "int8")


@pytest.mark.parametrize("gpus", ["0,1", "first", "99"])
def test_a_device_that_is_not_there_is_refused(gpus):
    with pytest.raises(InputError, match=r"gpus is "):
        device(gpus)
