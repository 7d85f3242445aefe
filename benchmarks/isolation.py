"""Measurements in separate, freshly started processes: even importing bitsandbytes uses the GPU."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Argument = TypeVar("Argument")
Value = TypeVar("Value")


def run_isolated(
    function: Callable[Arguments, Value], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Value:
    """Call `function` in a fresh process, where no memory of an earlier measurement counts.

    Raises:
        BrokenProcessPool: the process died.
    """
    with _spawn_pool(1) as pool:
        return pool.submit(function, *args, **kwargs).result()


def map_isolated(function: Callable[[Argument], Value], arguments: Sequence[Argument]) -> Iterator[Value]:
    """Call `function` with each argument in fresh processes, one per core; yield the results in order."""
    with _spawn_pool(min(len(arguments), os.cpu_count() or 1)) as pool:
        yield from pool.map(function, arguments)


def _spawn_pool(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))
