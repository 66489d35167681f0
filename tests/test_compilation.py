"""Compiled networks: the same results, names and types, through every door that calls a part of them."""

import copy

import pytest
import torch
from conftest import refused, train_here
from test_runs import loaded
from test_training import CPU, LATENTS, autoencoder_step, denoiser, engine_at, volumes

from latdiff3d import compilation, networks, recompute
from latdiff3d.codec import LatentCodec
from latdiff3d.compilation import compiled
from latdiff3d.errors import InputError
from latdiff3d.synthesis import Model
from latdiff3d.training import AutoencoderValidation


def is_compiled(network):
    return any(module._compiled_call_impl for module in network.modules())


def gradients_of(network, precision):
    noisy, times = torch.randn(2, LATENTS, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 900])
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        prediction = network(noisy, times)
    prediction.float().square().mean().backward()
    return prediction, [parameter.grad for parameter in network.parameters()]


@pytest.mark.parametrize(("backend", "precision"), [("eager", "fp32"), ("aot_eager", "bf16")])
def test_a_compiled_denoiser_is_itself_recomputed_and_in_autocast(backend, precision):
    plain = networks.placed(recompute.per_block(denoiser(0)), CPU)
    torch.nn.init.normal_(plain.out[-1].conv.weight, std=0.1)
    network = compiled(copy.deepcopy(plain), backend)
    assert is_compiled(network) and type(network) is type(plain)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert not is_compiled(copy.deepcopy(network))  # the moving average, which is
    (one, own), (other, expected) = (gradients_of(each, precision) for each in (network, plain))
    assert torch.equal(one, other)
    for gradient, exact in zip(own, expected, strict=True):
        assert (gradient - exact).norm() <= 1e-5 * exact.norm() + 1e-9


def test_stage_1_compiled_has_the_same_terms_adaptive_weight_among_them():
    terms = []
    for backend in (False, "aot_eager"):
        step = autoencoder_step(disc_start=1, disc_warmup=0)
        network = compiled(networks.placed(recompute.per_block(step.autoencoder), CPU), backend)
        assert network is step.autoencoder and is_compiled(network) == bool(backend)
        torch.manual_seed(0)
        terms.append(step(engine_at(1), volumes()))
        validated = AutoencoderValidation(network, CPU, "fp32")(engine_at(1), volumes())
        terms[-1] |= {name: validated[name] for name in ("psnr", "l1")}
    assert terms[1] == pytest.approx(terms[0], rel=1e-5)


def test_tiles_of_a_compiled_codec_have_the_whole_volumes_norms():
    codec = LatentCodec(autoencoder_step().autoencoder, LATENTS)
    codec.measure([volumes()])
    image = torch.rand(1, 1, 16, 16, 96, generator=torch.Generator().manual_seed(0))
    expected, _ = codec.encode(image)
    compiled(codec.autoencoder, "eager")
    at_once, _ = codec.encode(image)
    tiles, _ = codec.encode(image, memory_gb=0.012)
    assert torch.allclose(at_once, expected, atol=1e-5)
    assert torch.allclose(tiles, expected, atol=1e-4)


def test_it_is_off_unless_asked_for_and_an_unknown_backend_is_refused(phantoms, tmp_path):
    network = denoiser(0)
    assert compiled(network, False) is network and not is_compiled(network)
    with pytest.raises(InputError, match=r"compile is 'fast'; expected true, false or a backend of .*aot_eager"):
        compiled(network, "fast")
    line = refused(train_here("autoencoder", phantoms, tmp_path, "x", compile=3))
    assert "compile is 3; expected true, false or a backend's name, such as aot_eager" in line


def test_without_a_compiler_one_line_says_so(monkeypatch):
    def fail(function, backend):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    compilation._try_inductor.cache_clear()
    with pytest.raises(InputError, match=r"cannot compile on this machine \(InvalidCxxCompiler: No working C"):
        compiled(denoiser(0), True)


def test_a_compiled_run_trains_and_samples(phantoms, tiny_runs, tmp_path):
    settings = {"first_stage": str(tiny_runs.autoencoder), "max_epochs": 1, "compile": "eager"}
    ended = train_here("diffusion", phantoms, tmp_path, "second", **settings)
    assert ended.code == 0, ended.err
    assert list(loaded(tmp_path / "second")["objects"]["ema"]) == list(loaded(tiny_runs.diffusion)["objects"]["ema"])
    model, plain = Model.load(tmp_path / "second"), Model.load(tmp_path / "second", settings={"compile": False})
    mask = phantoms / "phantom_0004" / "phantom_0004_seg.nii.gz"
    for loaded_model, expected in ((model, True), (plain, False)):
        assert is_compiled(loaded_model.synthesizer.denoiser) is expected
        assert is_compiled(loaded_model.synthesizer.codec.autoencoder) is expected
    assert torch.allclose(model.sample(mask, 3).volume, plain.sample(mask, 3).volume, atol=1e-5)
