"""Order, parts and random numbers: the ranks together see one process's batches; a place in the run is all it takes."""

from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import CacheDataset
from monai.transforms import Compose, RandGaussianNoised

from latdiff3d import batches, loading
from latdiff3d.batches import EveryNth, ImageCrops, Seeds, ShuffledBatches
from latdiff3d.errors import InputError


def as_rank(monkeypatch, rank, num_ranks):
    monkeypatch.setattr(batches, "rank", lambda: rank)
    monkeypatch.setattr(batches, "num_ranks", lambda: num_ranks)


def drawn(monkeypatch, num_cases, batch_size, rank=0, num_ranks=1, epoch=1, first=0, seed=0):
    as_rank(monkeypatch, rank, num_ranks)
    sampler = ShuffledBatches(range(num_cases), batch_size, seed)
    sampler.epoch, sampler.first = epoch, first
    return list(sampler)


def test_an_epoch_is_a_permutation_that_seed_and_epoch_decide(monkeypatch):
    one = drawn(monkeypatch, 12, 3)
    assert sorted(chain(*one)) == list(range(12)) and [len(batch) for batch in one] == [3] * 4
    assert drawn(monkeypatch, 12, 3) == one
    assert drawn(monkeypatch, 12, 3, epoch=2) != one != drawn(monkeypatch, 12, 3, seed=1)


@pytest.mark.parametrize("num_cases", [12, 13, 17])
def test_the_ranks_batches_are_the_parts_of_one_process_batches(monkeypatch, num_cases):
    joint = drawn(monkeypatch, num_cases, 6)
    parts = [drawn(monkeypatch, num_cases, 2, rank, 3) for rank in range(3)]
    assert joint == [list(chain(*together)) for together in zip(*parts, strict=True)]
    assert len(ShuffledBatches(range(num_cases), 2, 0)) == len(joint) == num_cases // 6


def test_what_fills_no_batch_is_left_out_and_a_small_set_is_one_batch(monkeypatch):
    assert [len(batch) for batch in drawn(monkeypatch, 7, 3)] == [3, 3]
    assert [sorted(batch) for batch in drawn(monkeypatch, 2, 3)] == [[0, 1]]


def test_an_epoch_can_be_gone_on_with(monkeypatch):
    assert drawn(monkeypatch, 12, 3, first=2) == drawn(monkeypatch, 12, 3)[2:]
    assert len(ShuffledBatches(range(12), 3, 0)) == 4  # a whole epoch's, wherever it begins


def test_too_few_cases_for_the_ranks_are_refused(monkeypatch):
    with pytest.raises(InputError, match="2 ranks with a batch_size of 3 want 6 training cases, there are 5"):
        drawn(monkeypatch, 5, 3, 0, 2)
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(InputError, match="3 ranks, 2 validation cases; expected one each at least"):
        EveryNth(range(2))


@pytest.mark.parametrize("num_cases", [5, 6])
def test_the_ranks_together_look_at_each_case_once(monkeypatch, num_cases):
    parts = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        sampler = EveryNth(range(num_cases))
        parts.append(list(sampler))
        assert len(sampler) == len(parts[-1])
    assert sorted(chain(*parts)) == list(range(num_cases))


# Random numbers


def loader(num_workers=0):
    noise = Compose([RandGaussianNoised(keys="image", prob=1.0)])
    images = CacheDataset([{"image": np.zeros((1, 2, 2, 2), np.float32)}] * 8, noise, progress=False)
    crops = ImageCrops(images)
    return loading.loader(crops, torch.device("cpu"), num_workers, batch_sampler=ShuffledBatches(crops, 2, 0))


def trained(seed=0, start=0, steps=None, num_workers=0):
    """Return what each step of two epochs saw and drew, from step `start` on."""
    seen, train = [], loader(num_workers)

    def step(engine, batch):
        seen.append((batch["image"].as_tensor().clone(), torch.randn(3)))
        if engine.state.iteration == steps:
            engine.terminate()

    engine = Engine(step)
    Seeds(seed, train).attach(engine)
    engine.state.epoch_length, engine.state.max_epochs = len(train), 2
    engine.state.iteration, engine.state.epoch = start, start // len(train)
    torch.manual_seed(np.random.randint(1000))  # whatever the process drew before
    engine.run(train)
    return seen


def alike(ones, others):
    return len(ones) == len(others) and all(
        torch.equal(a, b) for one, other in zip(ones, others, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_run_gone_on_with_after_any_step_sees_and_draws_what_it_would_have():
    whole = trained()
    assert len(whole) == 8 and not alike(whole[:4], whole[4:])
    for start in range(8):
        assert alike(trained(start=start), whole[start:]), start


def test_another_seed_sees_and_draws_otherwise():
    assert not alike(trained(seed=1), trained())


def test_each_rank_draws_its_own(monkeypatch):
    drawn = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        seeds = Seeds(0, loader())
        seeds._start_step(SimpleNamespace(state=SimpleNamespace(iteration=1)))
        drawn.append(torch.randn(3))
    assert not torch.equal(*drawn)


def test_what_is_measured_does_not_depend_on_where_training_stopped():
    one, other = loader(), loader()
    seeds = Seeds(0, one)
    seeds.at_epoch(7, first=2)
    seeds.at_epoch()
    Seeds(0, other).at_epoch()
    batches_of_one, batches_of_other = ([b["image"].as_tensor() for b in each] for each in (one, other))
    assert len(batches_of_one) == 4 and all(map(torch.equal, batches_of_one, batches_of_other))
