"""The page on faults: what a machine, a disk or a server does wrong, injected for real, and what it costs.

`python -m tests.support.faults` writes docs/faults.md from what happens (as root: some faults mount disks).
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.disk_faults import disk_faults
from tests.support.fault import REPOSITORY, Fault
from tests.support.machine_faults import clock_faults, gpu_faults, remote_faults
from tests.support.tables import table
from tests.support.tracking_faults import tracking_faults
from tests.support.training_faults import training_faults

DOCUMENT = REPOSITORY / "docs/faults.md"
COLUMNS = ("fault", "message", "lost")
HEAD = """# Faults and what each costs

`python -m tests.support.faults` injects each fault for real and writes this page from the results.
`tests/pipeline/test_faults.py` injects them again and checks every line. Losses are measured: existing files
are compared by content, adapters and curves with those of an undisturbed run.
"""
GROUPS: dict[str, Callable[[Path], Iterator[Fault]]] = {
    "MLflow": tracking_faults,
    "Training": training_faults,
    "Disks": disk_faults,
    "Two jobs on one GPU": gpu_faults,
    "The system clock": clock_faults,
    "DVC's remote": remote_faults,
}


def section(title: str, faults: list[Fault]) -> str:
    """A group on the page."""
    return f"\n## {title}\n\n{table(COLUMNS, (fault.row() for fault in faults))}"


def main() -> None:
    page = HEAD
    for title, inject in GROUPS.items():
        with TemporaryDirectory() as folder:
            page += section(title, list(inject(Path(folder).resolve())))
    DOCUMENT.write_text(page, encoding="utf-8")
    sys.stdout.write(f"{DOCUMENT.relative_to(REPOSITORY)} written\n")


if __name__ == "__main__":
    main()
