"""The spectral term: zero where energies agree, known where they don't, and a push towards sharper, in phase."""

import math

import pytest
import torch

from latdiff3d.spectral_loss import spectral_distance
from latdiff3d.spectrum import high_frequency_energy

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


def test_energies_are_those_that_the_spectrum_is_measured_by():
    image, other = volumes(1), 0.3 * volumes(1, seed=1)
    energies = high_frequency_energy(other[0].numpy()) / high_frequency_energy(image[0].numpy())
    expected = torch.as_tensor(energies).log().square().mean().item()
    assert spectral_distance(other, image, everywhere(image)).item() == pytest.approx(expected, rel=1e-4)


def test_what_is_below_the_cut_off_does_not_count():
    ramp = torch.cos(2 * math.pi * torch.arange(16) / 8).view(1, 1, 1, 16, 1).expand(1, 1, 16, 16, 16)  # Nyquist / 4
    image = volumes(1, 1)[..., :12, :14].new_zeros(1, 1, 16, 16, 16) + torch.rand(1, 1, 16, 16, 16)
    assert spectral_distance(image + ramp, image, torch.ones_like(image)).item() < 0.05


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
