"""How batches come to the device: workers by the machine's cores, and the same batches with any number of them."""

import os

import pytest
import torch
from test_batches import alike, trained
from torch.utils.data import TensorDataset

from latdiff3d import loading
from latdiff3d.loading import loader, num_workers_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NUMBERS = TensorDataset(torch.arange(4))


@pytest.mark.parametrize(
    ("num_workers", "device", "cores", "num_local", "expected"),
    [
        (3, CPU, 1, 1, 3),
        (0, GPU, 16, 1, 0),
        ("auto", CPU, 16, 1, 0),  # the step has the cores
        ("auto", GPU, 6, 1, 5),
        ("auto", GPU, 16, 4, 3),
        ("auto", GPU, 64, 2, loading.MAX_WORKERS),
        ("auto", GPU, 1, 1, 0),
        ("auto", GPU, 4, 8, 0),
    ],
)
def test_workers_are_as_many_as_there_are_cores_to_spare(monkeypatch, num_workers, device, cores, num_local, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_local))
    assert num_workers_for(num_workers, device) == expected


def test_workers_stay_and_load_ahead_and_a_gpu_has_its_batches_pinned(monkeypatch):
    for device, num_workers, prefetch_factor, expected in (
        (CPU, 0, None, (0, False, False, None)),
        (CPU, 2, None, (2, False, True, loading.PREFETCH)),
        (GPU, 2, 5, (2, True, True, 5)),
        (GPU, 0, None, (0, True, False, None)),
    ):
        one = loader(NUMBERS, device, num_workers, prefetch_factor, batch_size=2)
        assert (one.num_workers, one.pin_memory, one.persistent_workers, one.prefetch_factor) == expected
        assert one.batch_size == 2


def test_batches_to_load_ahead_without_workers_are_warned_of(capsys):
    loader(NUMBERS, CPU, "auto", 4)
    assert "warning: prefetch_factor 4 has no effect, for there are no workers here" in capsys.readouterr().out
    loader(NUMBERS, CPU, 1, 4)
    loader(NUMBERS, CPU, "auto")
    assert not capsys.readouterr().out


def test_a_loader_takes_no_random_numbers_from_the_networks():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    for num_workers in (0, 1):
        assert len(list(loader(NUMBERS, CPU, num_workers))) == 4
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("start", [0, 3])
def test_workers_that_stay_hear_of_each_epochs_seed(start):
    assert alike(trained(num_workers=2, start=start), trained()[start:])
