"""Each measurement in a process of its own, started afresh: importing bitsandbytes alone takes up the GPU."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Argument = TypeVar("Argument")
Value = TypeVar("Value")


def apart(function: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Value:
    """What `function` returns or raises, from a fresh process: no memory of an earlier one counts.

    Raises:
        BrokenProcessPool: the process died.
    """
    with fresh_processes(1) as pool:
        return pool.submit(function, *args, **kwargs).result()


def side_by_side(function: Callable[[Argument], Value], arguments: Sequence[Argument]) -> Iterator[Value]:
    """The same for many arguments, on as many cores as there are: in their order, each when it is there."""
    with fresh_processes(min(len(arguments), os.cpu_count() or 1)) as pool:
        yield from pool.map(function, arguments)


def fresh_processes(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))
