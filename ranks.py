"""The processes of a run, as torchrun starts them. They share work and change no bit of it."""

import os
import sys
from datetime import timedelta
from itertools import islice
from typing import NamedTuple

from torch import distributed

from common import InputError, first_line


class Ranks(NamedTuple):
    """The processes of a run, as torchrun starts them: all call the same methods in one order."""
    rank: int = 0
    world: int = 1

    def map(self, function, items):
        """[function(item) for item in items]; the ranks share them, and change no bit of it."""
        mine = islice(items, self.rank, None, self.world)
        parts = self.gather([function(item) for item in mine])
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def gather(self, value):
        """The values of all ranks, in their order; also a barrier."""
        values = [value] * self.world
        try:
            if self.world > 1:
                distributed.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: another rank stopped ({first_line(error)})"
                             ) from None
        return values


SOLO = Ranks()


def join_ranks(device):
    """The Ranks that torchrun started, or SOLO. Only the first rank prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return SOLO
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(days=7))  # rank 0 reads the corpus
    if rank:
        sys.stdout = open(os.devnull, "w")
    return Ranks(rank, world)
