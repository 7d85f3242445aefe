"""Time of `sdxl-lora --help` and of each subcommand's: `python -m benchmarks.help_time`.

Prints CPU seconds (user and system, the minimum of several runs, because other programs only add to them) and
the number of loaded modules.
"""

import resource
import subprocess
import sys
from pathlib import Path

import typer

from sdxl_lora.cli.main import app

RUNS = 5
COMMAND = Path(sys.executable).with_name("sdxl-lora")
COUNT = """
import sys
from sdxl_lora.cli.main import app
try:
    app()
finally:
    print(len(sys.modules), file=sys.stderr)
"""


def cpu_seconds(command: list[str]) -> float:
    """Return the CPU time that a command and its children take."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def modules(arguments: list[str]) -> int:
    """Return how many modules the command has loaded when it ends."""
    command = [sys.executable, "-c", COUNT, *arguments]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True)
    return int(result.stderr)


def main() -> None:
    names = list(typer.main.get_group(app).commands)
    print(f"{'command':24}{'CPU s':>7}{'modules':>9}")
    for words in ([], *([name] for name in names)):
        arguments = [*words, "--help"]
        seconds = min(cpu_seconds([str(COMMAND), *arguments]) for _ in range(RUNS))
        print(f"{' '.join(arguments):24}{seconds:7.2f}{modules(arguments):9}")


if __name__ == "__main__":
    main()
