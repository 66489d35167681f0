"""The spectral term: zero where energies agree, known where they don't, and a push towards sharper, in phase."""

import math

import pytest
import torch

from latdiff3d.spectral_loss import _energies, spectral_distance
from latdiff3d.spectrum import spectrum_ratio

SHAPE = (12, 16, 14)


def volumes(count=2, channels=2, seed=0):
    return torch.rand(count, channels, *SHAPE, generator=torch.Generator().manual_seed(seed))


def everywhere(image):
    return torch.ones_like(image[:, :1])


def test_equal_volumes_have_no_distance():
    assert spectral_distance(volumes(), volumes(), everywhere(volumes())) == 0


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_a_gain_counts_by_its_logarithm_whichever_way(gain):
    image = volumes()
    distance = spectral_distance(gain * image, image, everywhere(image)).item()
    assert distance == pytest.approx((2 * math.log(gain)) ** 2, rel=1e-4)


@pytest.mark.parametrize(("frequency", "share"), [(1.0, 1.0), (0.75, 0.9), (0.5, 0.25), (0.25, 0.0), (0.125, 0.0)])
def test_what_counts_lies_above_half_the_nyquist_frequency(frequency, share):
    wave = 0.5 + 0.5 * torch.cos(math.pi * frequency * torch.arange(32)).view(1, 1, 1, 32, 1).expand(1, 1, 16, 32, 16)
    band = _energies(wave, torch.ones(1, 1, 10, 26, 10)).item()
    assert band == pytest.approx(share * wave.var(dim=3, correction=0).mean().item(), abs=0.006)


def test_it_agrees_with_the_spectrum_that_is_measured_and_never_trained_on():
    image, made = volumes(1, 1), volumes(1, 1, seed=1) * 0.6
    ratio = spectrum_ratio(image[0].numpy(), made[0].numpy())
    assert spectral_distance(made, image, everywhere(image)).sqrt().item() == pytest.approx(-math.log(ratio), abs=0.25)


def test_every_place_counts_alike():
    image = volumes(1, 1)
    distances = []
    for place in (slice(0, 10), slice(1, 11), slice(2, 12)):
        made = image.clone()
        made[:, :, place] = made[:, :, place] * 0.5
        distances.append(spectral_distance(made, image, everywhere(image)).item())
    assert max(distances) < 1.3 * min(distances)


def test_padding_does_not_count():
    image = volumes()
    padded, noise = (torch.nn.functional.pad(v, (2, 3, 0, 4, 1, 0)) for v in (image, torch.zeros_like(image)))
    valid = torch.nn.functional.pad(everywhere(image), (2, 3, 0, 4, 1, 0))
    made = torch.where(valid > 0, 0.5 * padded, torch.rand_like(noise))
    expected = spectral_distance(0.5 * image, image, everywhere(image))
    assert torch.allclose(spectral_distance(made, padded, valid), expected)


def test_a_batch_is_the_mean_of_its_volumes():
    image, made = volumes(), volumes(seed=1) ** 2
    each = [spectral_distance(made[i : i + 1], image[i : i + 1], everywhere(image[:1])) for i in range(2)]
    assert torch.allclose(spectral_distance(made, image, everywhere(image)), torch.stack(each).mean())


def test_its_gradient_amplifies_the_detail_that_is_there():
    image = volumes(1, 1)
    blurred = torch.nn.functional.avg_pool3d(image, 3, 1, 1).requires_grad_()
    spectral_distance(blurred, image, everywhere(image)).backward()
    with torch.no_grad():
        moved = blurred - 0.1 * blurred.grad / blurred.grad.norm()
        detail = blurred - torch.nn.functional.avg_pool3d(blurred, 5, 1, 2)
        assert spectral_distance(moved, image, everywhere(image)) < spectral_distance(blurred, image, everywhere(image))
        assert ((moved - blurred) * detail).sum() > 0


def test_a_flat_volume_gives_a_number():
    flat = torch.full((1, 1, *SHAPE), 0.5, requires_grad=True)
    spectral_distance(flat, volumes(1, 1), everywhere(flat)).backward()
    assert torch.isfinite(flat.grad).all()
