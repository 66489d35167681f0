"""Both stages' networks compiled by torch.compile, in place: weights, names and types stay what they are."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from latdiff3d.errors import InputError

DEFAULT_BACKEND = "inductor"  # PyTorch's, which needs a C++ compiler, and triton on a GPU


def compiled(network: nn.Module, compile: bool | str) -> nn.Module:
    """Let `network` run compiled from its first call on: slow to begin with, and again for each new size of volume.

    An autoencoder's encoder and decoder are compiled each, for both are called alone as well. A copy is not compiled.

    Args:
        network: an autoencoder, with an encoder and a decoder, alone or in a wavelet stem, or a denoiser.
        compile: True, or the name of one of PyTorch's backends, such as "aot_eager", which needs no compiler; False
            leaves the network as it is.

    Returns:
        The same network.

    Raises:
        InputError: an unknown backend; PyTorch's own does not work on this machine.
    """
    if not compile:
        return network
    backend = DEFAULT_BACKEND if compile is True else compile
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise InputError(f"compile is {compile!r}; expected true, false or a backend of {', '.join(known)}.")
    if backend == DEFAULT_BACKEND:
        _try_inductor(next(network.parameters()).device.type)
        # Backward passes give their inputs' memory away, unless a graph is gone back through twice, as the adaptive
        # weight does; PyTorch cannot tell beforehand, and its error names this setting.
        torch._functorch.config.donated_buffer = False
    inner = getattr(network, "network", network)
    parts = [getattr(inner, name) for name in ("encoder", "decoder") if hasattr(inner, name)] or [network]
    for part in parts:
        part.compile(backend=backend)
    return network


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Run `network` as it was written, for what puts other functions in the place of its layers'."""
    if not any(module._compiled_call_impl for module in network.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@functools.cache
def _try_inductor(device_type: str) -> None:
    try:
        torch.compile(torch.sin, backend=DEFAULT_BACKEND)(torch.ones(8, device=device_type))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"compile is true, and PyTorch cannot compile on this machine ({reason}); install a C++ compiler, or set "
            "compile: false."
        ) from error
