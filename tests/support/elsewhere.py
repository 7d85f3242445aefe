"""Runs the tests that compute with other kernels, threads, order and load: `make test-elsewhere`.

What passes on one processor may fail on another, whose kernels add in another order. One machine can act as
several: PyTorch, oneDNN and MKL can be told to use older instructions.
"""

import argparse
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import torch

TESTS = Path(__file__).parents[1]
NUMERICAL = (
    *("adapters", "data", "evaluation", "inference", "kernels", "models", "training"),
    *("stages/test_evaluate_lora.py", "stages/test_sample_images.py", "stages/test_train_lora.py"),
    "tracking/test_logged_model.py",
)
"""Folders and files below tests/ whose tests compute with torch."""
BUSY_PROCESSES = 4


@dataclass(frozen=True)
class Variation:
    """One way to run the tests."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    busy: bool = False
    """Next to BUSY_PROCESSES processes that compute."""
    python: str = sys.executable


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    """Names of tests; the end of pytest's output if it ran none."""
    seconds: float


def variations(pythons: Sequence[str]) -> list[Variation]:
    """Return all ways that this machine's processor can run, and one for each further interpreter."""
    capabilities = ["default", "avx2", "avx512"]
    widest = torch.backends.cpu.get_cpu_capability().lower()  # wider instructions would end the process
    if widest in capabilities:
        capabilities = capabilities[: capabilities.index(widest) + 1]
    variables = [
        *(("ATEN_CPU_CAPABILITY", capability) for capability in capabilities),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("MKL_CBWR", "COMPATIBLE"),
        *(("OMP_NUM_THREADS", number) for number in ("1", "2", "4")),
    ]
    return [
        Variation("as it is"),
        *(Variation(f"{name}={value}", {name: value}) for name, value in variables),
        Variation("random order", {"SDXL_LORA_TEST_ORDER": str(os.getpid())}),
        Variation("busy machine", busy=True),
        *(Variation(python, python=python) for python in pythons),
    ]


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep this many processes busy."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def run(variation: Variation, files: Sequence[str]) -> Outcome:
    """Run pytest on the files as a process of its own."""
    start = monotonic()
    with TemporaryDirectory() as folder, load(BUSY_PROCESSES if variation.busy else 0):
        report = Path(folder) / "report.xml"
        command = [variation.python, "-m", "pytest", "-q", "-m", "not slow", f"--junitxml={report}", *files]
        environment = {**os.environ, **variation.environment}
        result = subprocess.run(
            command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False
        )
        if not report.is_file():
            return Outcome(0, 0, ((result.stdout + result.stderr)[-2000:],), monotonic() - start)
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    if result.returncode and not names:
        names = [result.stdout[-2000:]]
    return Outcome(len(cases) - len(failed) - skipped, skipped, tuple(names), monotonic() - start)


def find_files(names: Sequence[str]) -> list[str]:
    """Return the paths of these folders and files of tests/, as pytest takes them.

    Raises:
        FileNotFoundError: one does not exist.
    """
    for name in names:
        if not (TESTS / name).exists():
            raise FileNotFoundError(f"{TESTS / name} not found: correct NUMERICAL in {Path(__file__).name}")
    return [str((TESTS / name).relative_to(TESTS.parent)) for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="variations to run, as the table names them"
    )
    parser.add_argument(
        "--files", nargs="+", metavar="PATH", help="of tests/, instead of all that compute", default=NUMERICAL
    )
    parser.add_argument(
        "--python", nargs="+", metavar="PATH", help="further interpreters with all packages", default=[]
    )
    options = parser.parse_args(arguments)
    known = variations(options.python)
    chosen = [v for v in known if not options.only or v.name in options.only]
    if not chosen:
        parser.error(f"--only names none of: {', '.join(v.name for v in known)}")
    files, start, failures = find_files(options.files), monotonic(), 0
    width = max(len(variation.name) for variation in chosen)
    print(f"{len(chosen)} variations of {', '.join(options.files)}")
    for number, variation in enumerate(chosen, 1):
        outcome = run(variation, files)
        failures += len(outcome.failed)
        left = (monotonic() - start) / number * (len(chosen) - number) / 60
        print(
            f"{number:2}/{len(chosen)}  {variation.name:{width}}  {outcome.passed:4} passed  "
            f"{len(outcome.failed):3} failed  {outcome.skipped:3} skipped  {outcome.seconds:5.0f} s"
            f"   about {left:.0f} min left",
            flush=True,
        )
        for name in outcome.failed:
            print(f"       {name}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
