"""The processes that work together: those of `accelerate launch` or torchrun, else this one alone."""

import torch
from accelerate import PartialState
from torch import Tensor, distributed


def distributed_state() -> PartialState:
    """How many there are and which one this is. The first call makes them known to each other."""
    return PartialState(cpu=not torch.cuda.is_available())


def all_ranks_agree(number: int) -> bool:
    """Whether all processes have the same number. All of them have to ask."""
    if distributed_state().num_processes == 1:
        return True
    numbers: list[int | None] = [None] * distributed_state().num_processes
    distributed.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


def all_reduce_sum(tensor: Tensor) -> None:
    """Adds up the tensors of all processes, in place, so that each has the same sum."""
    if distributed_state().num_processes > 1:
        distributed.all_reduce(tensor)
