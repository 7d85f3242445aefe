"""The process group: that of `accelerate launch` or torchrun, or this process alone."""

import torch
from accelerate import PartialState
from torch import Tensor, distributed


def distributed_state() -> PartialState:
    """Return the number of processes and this one's rank. The first call initializes the process group."""
    return PartialState(cpu=not torch.cuda.is_available())


def all_ranks_agree(number: int) -> bool:
    """Return whether all processes pass the same number. Collective: every process must call it."""
    if distributed_state().num_processes == 1:
        return True
    numbers: list[int | None] = [None] * distributed_state().num_processes
    distributed.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum the tensors of all processes in place. Collective: every process must call it."""
    if distributed_state().num_processes > 1:
        distributed.all_reduce(tensor)
