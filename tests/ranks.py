"""Several gloo processes on this machine, for the tests of what they compute together."""

import torch
from torch import distributed

NUM_RANKS = 2


def on_two_ranks(worker, folder, *args):
    """Run `worker(*args)` in two gloo processes and return what each returns, in the order of their ranks.

    Whatever holds the process group, a DistributedDataParallel above all, must be gone before the group is: the last
    to let go of it waits for gloo's threads, and only the group itself does so without the lock those threads need.
    A worker's locals are, when it returns. The processes end with the tests, should they hang.
    """
    torch.multiprocessing.spawn(_rank, (worker, folder, args), nprocs=NUM_RANKS, daemon=True)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(NUM_RANKS)]


def _rank(rank, worker, folder, args):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=NUM_RANKS)
    result = worker(*args)
    torch.save(result, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()
