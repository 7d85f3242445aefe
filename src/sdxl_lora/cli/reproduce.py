"""`sdxl-lora reproduce`: a recorded run, run again, and the verdict as a page."""

from dataclasses import asdict

from sdxl_lora import paths
from sdxl_lora.reproducibility.reproduce import DataSource, render_reproduction_page, reproduce
from sdxl_lora.reproducibility.run_record import find_record
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import write_numbers


def run_reproduce(ref: str, data: DataSource) -> int:
    """Print and write the verdict on a run, and return the exit status: 0 if it was reproduced.

    Raises:
        ValueError: `ref` names no recorded run, or its data set cannot be had.
        OSError: git or MLflow fails.
    """
    verdict = reproduce(find_record(ref), data)
    page = render_reproduction_page(verdict)
    write_numbers(paths.REPRODUCTION, asdict(verdict))
    write_text(paths.REPRODUCTION_PAGE, page)
    print(f"{page}\nWritten to {paths.REPRODUCTION_PAGE} and {paths.REPRODUCTION}.")
    return int(verdict.outcome not in ("bit-identical", "within tolerance"))
