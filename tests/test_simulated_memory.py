"""What a step will hold is known from its configuration: beside what PyTorch's profiler sees in the real step."""

import functools

import pytest
import torch
from conftest import TINY
from ignite.engine import Engine
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from latdiff3d import config, simulated_memory
from latdiff3d.cpu_convolutions import CpuConv3d
from latdiff3d.memory import peak_bytes
from latdiff3d.simulated_memory import NETWORKS, Ledger, random_batch, simulate

SMALL = {
    "autoencoder": {
        "crop_to": [32, 32, 32],
        "autoencoder_def::channels": [16, 32],
        "discriminator_def::channels": 8,
        "precision": "fp32",
    },
    "diffusion": {
        "crop_to": [64, 64, 64],
        "denoiser_def::channels": [16, 32],
        "denoiser_def::attention_levels": [False, True],
        "denoiser_def::num_head_channels": 16,
        "precision": "fp32",
    },
}
CONFIGURATIONS = {
    "as it is": ("autoencoder", [], {}),
    "recomputing": ("autoencoder", [], {"use_checkpoint": True, "batch_size": 2}),
    "VQ": ("autoencoder", ["configs/autoencoder_vq.yaml"], {"crop_to": [32, 48, 32]}),
    "every loss": ("autoencoder", ["configs/sharp.yaml"], {"batch_size": 2}),
    "cached": ("diffusion", [], {}),
    "recomputing U-Net": ("diffusion", [], {"use_checkpoint": True, "batch_size": 8}),
    "encoder": ("diffusion", ["configs/condition_encoder.yaml"], {"batch_size": 2}),
    "two updates": ("diffusion", ["configs/unconditional.yaml"], {"batch_size": 1, "crop_to": [64, 32, 64]}),
}


def real_step_bytes(stage, overlays, settings):
    """The highest rise in a step after one that has made the optimisers' states, its batch counted in."""
    parser = config.training_workflow(
        overlays, settings | ({"first_stage_codec": "@codec"} if stage == "diffusion" else {}), stage
    ).parser
    step = parser.get_parsed_content("train::step")
    batch = random_batch(stage, parser)
    engine = Engine(step)
    engine.state.iteration = 1_000_000
    step(engine, batch)
    for name in NETWORKS[stage]:
        parser.get_parsed_content(name).zero_grad(set_to_none=True)
    return sum(t.nbytes for t in batch.values()) + peak_bytes(lambda: step(engine, batch), torch.device("cpu"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_simulated_step_holds_what_the_real_one_does(name):
    stage, overlays, settings = CONFIGURATIONS[name]
    settings = SMALL[stage] | settings
    simulated = simulate(stage, overlays, settings, on_gpu=False).step
    real = real_step_bytes(stage, overlays, settings)
    assert simulated == pytest.approx(real, rel=0.2), simulated / real


def test_what_is_kept_is_weights_averages_and_adams_two_moments():
    settings = SMALL["diffusion"]
    parser = config.training_workflow([], settings, "diffusion").parser
    size = sum(p.nbytes for p in parser.get_parsed_content("denoiser").parameters())
    codec = sum(t.nbytes for t in parser.get_parsed_content("codec").parameters())
    kept = simulate("diffusion", [], settings, on_gpu=False).kept
    assert 4 * size + codec <= kept < 1.02 * (4 * size + codec)


def test_settings_change_what_is_needed_and_no_size_is_too_large():
    large = {"crop_to": [512, 512, 512]}
    plain, recomputing = (
        simulate("autoencoder", [], {**large, "use_checkpoint": on}, on_gpu=True).step for on in (False, True)
    )
    assert plain > 100e9 and recomputing < 0.6 * plain


def test_norms_are_in_float32_in_a_gpus_autocast(monkeypatch):
    settings = SMALL["autoencoder"] | {"precision": "bf16"}
    need = simulate("autoencoder", [], settings, on_gpu=True)
    monkeypatch.setattr(simulated_memory, "FLOAT32_ON_GPU", ())
    assert need.step > 1.1 * simulate("autoencoder", [], settings, on_gpu=True).step


def test_what_a_gpu_will_hold_is_not_told_by_a_cpus_convolutions(monkeypatch):
    def refuse(*_):
        raise NotImplementedError

    settings = {k: v for k, v in TINY["diffusion"].items() if "epochs" not in k}
    monkeypatch.setattr(CpuConv3d, "_conv_forward", refuse)
    assert simulate("diffusion", [], settings, on_gpu=True).step > 0
    with pytest.raises(NotImplementedError):
        simulate("diffusion", [], settings, on_gpu=False)


def test_the_ledger_gives_up_what_nothing_holds():
    with FakeTensorMode(), Ledger(convolution_scratch=False) as ledger:
        first = torch.zeros(1000)
        second = first + 1
        assert (ledger.held, ledger.peak) == (8000, 8000)
        view = second[:10]
        del first, second
        assert ledger.held == 4000  # the view holds all of it
        del view
        assert (ledger.held, ledger.peak) == (0, 8000)


KINDS = {
    "3 × 3 × 3": functools.partial(nn.Conv3d, kernel_size=3, padding=1),
    "1 × 1 × 1": functools.partial(nn.Conv3d, kernel_size=1),
    "5 × 1 × 1": functools.partial(nn.Conv3d, kernel_size=(5, 1, 1), padding=(2, 0, 0)),
    "transposed": functools.partial(nn.ConvTranspose3d, kernel_size=4, stride=2, padding=1),
}
CHANNELS = [(4, 32), (32, 4), (24, 24), (32, 64), (64, 32)]


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN copies in another manner without AVX-512"
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("kind", "channels"), [(k, c) for k in KINDS for c in CHANNELS if k != "transposed" or min(c) > 16]
)
def test_what_a_convolution_takes_beside_its_results_is_known(kind, channels, batch):
    layer = KINDS[kind](*channels, bias=False)
    x = torch.rand(batch, channels[0], 24, 24, 24).requires_grad_()
    y = layer(x)
    wanted = torch.rand_like(y)
    forward = peak_bytes(lambda: layer(x), torch.device("cpu"))
    backward = peak_bytes(lambda: torch.autograd.grad(y, (x, layer.weight), wanted), torch.device("cpu"))
    with FakeTensorMode() as mode:
        x, weight, wanted = (mode.from_tensor(tensor) for tensor in (x, layer.weight, wanted))
        with Ledger(convolution_scratch=True) as ledger:
            y = torch.func.functional_call(layer, {"weight": weight}, (x,))
            assert ledger.peak == pytest.approx(forward, rel=0.1)
            before = ledger.peak = ledger.held
            torch.autograd.grad(y, (x, weight), wanted)
    assert ledger.peak - before == pytest.approx(backward, rel=0.1)


def test_a_tiny_run_is_simulated_as_it_is_configured():
    need = simulate("diffusion", [], {k: v for k, v in TINY["diffusion"].items() if "epochs" not in k}, on_gpu=False)
    assert 0 < need.step < need.total < 50e6
