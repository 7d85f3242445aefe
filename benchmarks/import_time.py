"""Cost of each stage's imports: CPU and wall seconds, number of modules, loaded heavy libraries.

Each measurement is a new process that imports one stage. The first does not count, because it may compile
bytecode and read files from disk. On a busy machine, CPU seconds vary less than wall seconds.

Usage: python -m benchmarks.import_time [--stages NAME ...] [--repeats N] [--json]
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
STAGES = (
    "download_dataset",
    "clean_captions",
    "encode_dataset",
    "train_lora",
    "sample_images",
    "evaluate_lora",
    "export_lora",
    "report_run",
    "track_run",
)
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "triton",
    "datasets",
    "mlflow",
    "pandas",
    "dvc",
)
_IMPORT = (
    "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(list(sys.modules)))"
)


class ImportCost(BaseModel):
    """Cost of importing one stage."""

    stage: str
    cpu_s: float
    """Median user and system time of the process, interpreter included, seconds."""
    wall_s: float
    """Median wall time of the process, seconds."""
    modules: int
    """Length of sys.modules afterwards."""
    heavy: list[str]
    """Loaded libraries of `HEAVY`."""
    of_models: dict[str, int]
    """Number of loaded modules of diffusers, transformers and peft."""


def loaded_modules(module: str) -> list[str]:
    """Return the names in sys.modules after a new process has imported `module`."""
    command = [sys.executable, "-c", _IMPORT, module]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    return list(json.loads(done.stdout.splitlines()[-1]))


def import_cost(stage: str, repeats: int) -> ImportCost:
    """Measure the import of stages.`stage` in `repeats` new processes, after one that does not count."""
    modules = loaded_modules(f"stages.{stage}")
    cpu, wall = [], []
    for _ in range(repeats):
        before, started = os.times(), perf_counter()
        loaded_modules(f"stages.{stage}")
        wall.append(perf_counter() - started)
        after = os.times()
        cpu.append(
            after.children_user - before.children_user + after.children_system - before.children_system
        )
    libraries = {name.partition(".")[0] for name in modules}
    return ImportCost(
        stage=stage,
        cpu_s=median(cpu),
        wall_s=median(wall),
        modules=len(modules),
        heavy=[name for name in HEAVY if name in libraries],
        of_models={
            library: sum(name.partition(".")[0] == library for name in modules)
            for library in ("diffusers", "transformers", "peft")
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON line per stage")
    arguments = parser.parse_args()
    if not arguments.json:
        print("| stage | CPU s | wall s | modules | heavy libraries |")
        print("|---|---|---|---|---|")
    for stage in arguments.stages:
        cost = import_cost(stage, arguments.repeats)
        if arguments.json:
            print(cost.model_dump_json(), flush=True)
            continue
        heavy = ", ".join(
            f"{name} ({cost.of_models[name]})" if name in cost.of_models else name for name in cost.heavy
        )
        row = f"| {cost.stage} | {cost.cpu_s:.2f} | {cost.wall_s:.2f} | {cost.modules} | {heavy or 'none'} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
