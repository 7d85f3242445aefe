"""Measurements as JSON lines: configuration, machine, time and memory. Independent of any benchmark.

A file, benchmarks/results/*.jsonl, contains one session on one machine. Only lines of one file are compared.
"""

import os
import platform
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import pynvml
import torch
from pydantic import BaseModel, ConfigDict

GIB = 2**30
FOLDER = Path("benchmarks/results")
OK = "ok"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers")

Configuration = dict[str, Any]  # of JSON scalars
Benchmark = Literal["official_script", "train_step", "vae_encode", "matmul", "sample", "forecast"]


class Machine(BaseModel):
    """Hardware and versions of a measurement."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    gpu: str | None
    """Name of the GPU; null on a CPU."""
    gpu_memory_gib: float | None
    driver: str | None
    cpus: int
    python: str
    packages: dict[str, str]
    """Version of each of PACKAGES that is installed."""


class Result(BaseModel):
    """Measurement of one configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    benchmark: Benchmark
    date: datetime
    """Time of the measurement, UTC."""
    command: str
    """Command that measures only this configuration."""
    machine: Machine
    configuration: Configuration
    """All values that can change the figures."""
    outcome: str
    """`ok`, `out of memory`, or the error that ended it."""
    seconds: list[float] = []
    """Wall time of each step after the warm-up, or of each repetition, seconds."""
    peak_reserved_gib: float | None = None
    """Peak memory that PyTorch's allocator held, GiB."""
    peak_allocated_gib: float | None = None
    """Peak memory that tensors took, GiB."""
    peak_device_gib: float | None = None
    """Peak memory used on the GPU minus the memory used before, by NVML, including CUDA's context, GiB."""
    forecast_gib: float | None = None
    """Forecast of `peak_reserved_gib` from before the run, GiB."""
    figures: dict[str, float] = {}
    """Other figures: final loss, loss scale, TFLOP/s."""

    @property
    def seconds_per_step(self) -> float | None:
        """Return the median, seconds; None if nothing was timed."""
        return median(self.seconds) if self.seconds else None

    @property
    def samples_per_second(self) -> float | None:
        """Return examples per second, at the median; None if nothing was timed."""
        if (seconds := self.seconds_per_step) is None:
            return None
        samples: int = self.configuration["batch_size"]
        return samples / seconds


def this_machine() -> Machine:
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu, memory, driver = None, None, None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        memory = round(torch.cuda.get_device_properties().total_memory / GIB, 2)
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
    return Machine(
        gpu=gpu,
        gpu_memory_gib=memory,
        driver=driver,
        cpus=os.cpu_count() or 1,
        python=platform.python_version(),
        packages=packages,
    )


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def publish(result: Result, output: Path | None) -> None:
    """Print a result as a JSON line and append it to `output`, if given."""
    line = result.model_dump_json()
    print(line, flush=True)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def read_results(path: Path) -> list[Result]:
    """Return the results in one file.

    Raises:
        ValueError: a line is not a result, or is from another machine than the first; names file and line.
    """
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(Result.model_validate_json(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not a benchmark result: {error}") from error
        if results[-1].machine != results[0].machine:
            raise ValueError(
                f"{path}, line {number}, is from another machine or version than line 1: "
                "move it to another file"
            )
    return results


def differing(one: Configuration, other: Configuration) -> set[str]:
    """Return the keys in which two configurations differ; a missing key counts as null."""
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def select(results: Iterable[Result], benchmark: Benchmark, values: Configuration) -> Iterator[Result]:
    """Yield the results of `benchmark` whose configuration has these values."""
    for result in results:
        configuration = result.configuration
        if result.benchmark == benchmark and all(configuration.get(k) == v for k, v in values.items()):
            yield result
