"""What a stage will hold in memory in training, from its configuration: its step runs on tensors without numbers."""

import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latdiff3d import config
from latdiff3d.cpu_convolutions import without_cpu_convolutions
from latdiff3d.updates import LossScaler

aten = torch.ops.aten
NETWORKS = {"autoencoder": ("autoencoder", "discriminator"), "diffusion": ("denoiser", "codec")}
LATE = 1_000_000  # a number of updates after which every term of the loss is active
BLOCK = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8  # channels, of oneDNN
FLASH = 1  # of at::SDPBackend, what PyTorch chooses on a CPU
# What is asked of numbers that are not there: whether one is out of range, or a count is at its start. It is not.
COMPARISONS = (aten.lt.Scalar, aten.gt.Scalar, aten.le.Scalar, aten.ge.Scalar, aten.eq.Scalar)
# What autocast computes in float32 on a GPU and leaves in 16 bits on a CPU, of what our networks are made of.
FLOAT32_ON_GPU = (nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Need:
    """What one process of a stage holds while it trains, in bytes.

    Attributes:
        kept: from one step to the next: weights, their moving averages, the optimisers' states.
        step: at most beside them: the batch, activations, gradients, scratch space of convolutions on a CPU.
    """

    kept: int
    step: int

    @property
    def total(self) -> int:
        """Both; Python, PyTorch and the data are not counted."""
        return self.kept + self.step


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as something holds them.

    Operations that read numbers get some that let a training step go on: 1, finite, within any range asked for.

    Args:
        convolution_scratch: count what convolutions take on a CPU while they run, beside their results.

    Attributes:
        held: bytes, now.
        peak: the most of them since it was last set.
    """

    def __init__(self, convolution_scratch: bool) -> None:
        super().__init__()
        self.convolution_scratch = convolution_scratch
        self.held = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def count(self, tensor: torch.Tensor) -> None:
        """Count what holds the numbers of `tensor`, once, until it is given up."""
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._give_up, storage.nbytes())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            [number] = args
            if number.dtype == torch.bool:
                return not getattr(number, "compares", False)
            return 1.0 if number.dtype.is_floating_point else 1
        if func is aten._fused_sdp_choice.default:
            return FLASH
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.count(result)
        if func in COMPARISONS:
            results.compares = True
        if self.convolution_scratch and func in (aten.convolution.default, aten.convolution_backward.default):
            self.peak = max(self.peak, self.held + _convolution_scratch(func, args, results))
        return results

    def _give_up(self, num_bytes: int) -> None:
        self.held -= num_bytes


def simulate(stage: str, overlays: Sequence[str | Path], settings: Mapping[str, Any], on_gpu: bool) -> Need:
    """Return what a stage of one process will hold, whatever the machine that says so holds.

    The configured step runs twice, all of the loss's terms active, on PyTorch's fake tensors, which have shapes and no
    numbers: whatever the configuration changes is counted. What a library takes beside tensors is known of oneDNN's
    convolutions alone; cuDNN's workspace, the allocator's fragments and CUDA itself come on top on a GPU, and with
    several processes a copy of the gradients. `compile` is left out.

    Args:
        stage: "autoencoder" or "diffusion".
        overlays, settings: as of `config.training_workflow`. A stage 2 needs no first stage.
        on_gpu: whether the step will run on a GPU; else on a CPU.

    Raises:
        InputError: for a configuration that cannot train.
    """
    here = {"device": "$devices.torch.device('cpu')", "compile": False}
    if stage == "diffusion":
        here["first_stage_codec"] = "@codec"  # an untrained one, of the same size
    with quietly():
        parser = config.training_workflow(overlays, {**settings, **here}, stage).parser
    networks = [parser.get_parsed_content(name) for name in NETWORKS[stage]]
    ledger = Ledger(convolution_scratch=not on_gpu)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for network in networks:
            _empty(network)
        stack.enter_context(ledger)
        for network in networks:
            if on_gpu:
                _as_on_gpu(network)
            for tensor in [*network.parameters(), *network.buffers()]:
                ledger.count(tensor)
        step = parser.get_parsed_content("train::step")
        for name in ("scaler", "discriminator_scaler"):
            if hasattr(step, name):  # it would find gradients that are not finite, for want of numbers
                setattr(step, name, LossScaler(torch.device("cpu"), "fp32"))
        batch = random_batch(stage, parser)
        engine = Engine(step)
        group = parser.get_parsed_content("accumulate_grad_batches")
        engine.state.epoch_length = 2 * LATE * group
        for _ in ("the optimisers' states are made", "and are there"):
            for network in networks:
                network.zero_grad(set_to_none=True)
            kept = ledger.peak = ledger.held
            for number in dict.fromkeys((1, group)):  # the first and the last batch of an update
                engine.state.iteration = LATE * group + number
                step(engine, batch)
    kept -= sum(tensor.nbytes for tensor in batch.values())
    averages = sum(p.nbytes for p in networks[0].parameters()) if "ema" in parser["train"] else 0
    return Need(kept + averages, ledger.peak - kept)


def random_batch(stage: str, parser: Any) -> dict[str, Any]:
    """Return a batch as the stage's step takes it, of the configured size, crop and channels.

    Args:
        stage: "autoencoder" or "diffusion".
        parser: of the stage's configuration.
    """
    num, crop = parser.get_parsed_content("batch_size"), parser.get_parsed_content("crop_to")
    image = {"image": torch.rand(num, parser.get_parsed_content("num_channels"), *crop)}
    if stage == "autoencoder":
        return image | {"valid": torch.ones(num, 1, *crop)}
    mask = torch.randint(parser.get_parsed_content("num_classes"), (num, 1, *crop), dtype=torch.uint8)
    batch = {"mask": mask}
    if num_columns := parser.get_parsed_content("known_covariates").num_columns:
        batch["covariates"] = torch.zeros(num, num_columns)
    if parser.get_parsed_content("encode") != "cached":
        return batch | image
    factor = parser.get_parsed_content("codec").factor
    mean = torch.randn(num, parser.get_parsed_content("latent_channels"), *(size // factor for size in crop))
    return batch | {"mean": mean, "std": torch.full_like(mean, 0.1)}


def _convolution_scratch(func: Any, args: Any, results: Any) -> int:
    """Return the bytes that a convolution takes at most, on a CPU and beside its results.

    As measured with torch 2.13 and AVX-512, `memory.peak_bytes`; with AVX2 this may be half more than what is taken.
    oneDNN computes on copies in blocks of channels, then copies the result; PyTorch's own convolutions, which it
    prefers for little to compute, copy each voxel's neighbourhood.
    """
    is_forward = func is aten.convolution.default
    x, weight, (stride, padding, dilation, transposed, output_padding, groups) = (
        (args[0], args[1], args[3:9]) if is_forward else (args[1], args[2], args[4:10])
    )
    backend = torch._C._select_conv_backend(
        x, weight, None, stride, padding, dilation, transposed, output_padding, groups, None
    ).name
    y = results if is_forward else args[0]
    if backend.startswith("Slow"):
        window = math.prod(weight.shape[2:])
        return 0 if is_forward and window == 1 else window * x.nbytes
    from_x = _blocked(x) if x.shape[1] >= BLOCK else 0  # a first layer reads its few channels as they are
    if is_forward:
        return 2 * y.nbytes if transposed else max(from_x + weight.nbytes + _blocked(y) - y.nbytes, _blocked(y))
    to_x = max(_blocked(y) + weight.nbytes + _blocked(x) - x.nbytes, _blocked(x)) if args[10][0] else 0
    return max(to_x, from_x + _blocked(y)) if args[10][1] else to_x


def _blocked(tensor: torch.Tensor) -> int:
    channels = tensor.shape[1]
    return tensor.nbytes // channels * (-(-channels // BLOCK) * BLOCK)


def _empty(network: nn.Module) -> None:
    """Replace weights and buffers by fake ones; `Module.to` would refuse, as something watches them."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer)


def _as_on_gpu(network: nn.Module) -> None:
    def float32_in_autocast(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return tuple(x.float() for x in inputs) if torch.is_autocast_enabled("cpu") else None

    for module in without_cpu_convolutions(network).modules():
        if isinstance(module, FLOAT32_ON_GPU):
            module.register_forward_pre_hook(float32_in_autocast)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep MONAI from saying, for each configuration that is read, where its logging is set."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
