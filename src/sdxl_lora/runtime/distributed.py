"""The processes that work together: those of `accelerate launch` or torchrun, else this one alone."""

import torch
from accelerate import PartialState
from torch import Tensor, distributed


def processes() -> PartialState:
    """How many there are and which one this is. The first call makes them known to each other."""
    return PartialState(cpu=not torch.cuda.is_available())


def all_agree(number: int) -> bool:
    """Whether all processes have the same number. All of them have to ask."""
    if processes().num_processes == 1:
        return True
    numbers: list[int | None] = [None] * processes().num_processes
    distributed.all_gather_object(numbers, number)
    return len(set(numbers)) == 1


def sum_over_processes(tensor: Tensor) -> None:
    """Adds up the tensors of all processes, in place, so that each has the same sum."""
    if processes().num_processes > 1:
        distributed.all_reduce(tensor)
