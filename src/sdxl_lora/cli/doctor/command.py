"""`sdxl-lora doctor`: prints every check of a recipe on this machine."""

import time
from pathlib import Path

from sdxl_lora.config import load_params
from sdxl_lora.reproducibility.checklist import checks_as_json, exit_status, format_check, summarize_checks
from sdxl_lora.runtime.library_settings import COMPUTE, set_library_settings

_WIDTH = 10  # of the longest check's name


def run_doctor(recipe: Path, as_json: bool) -> int:
    """Print every check as soon as it is made, and return the exit status: 1 if one failed.

    Raises:
        ValueError: the recipe does not fit the schema.
        FileNotFoundError: it does not exist.
    """
    start = time.monotonic()
    params = load_params(recipe)
    set_library_settings(COMPUTE)
    # Only now: torch and diffusers read these settings when they are imported.
    from sdxl_lora.cli.doctor.checks import run_checks
    from sdxl_lora.cli.doctor.context import RunContext
    from sdxl_lora.runtime.device import choose_device

    context, checks = RunContext(params, choose_device()), []
    for check in run_checks(context):
        checks.append(check)
        if not as_json:
            print(format_check(check, _WIDTH), flush=True)
    context.cleanup()
    summary = f"{summarize_checks(checks)}, in {time.monotonic() - start:.0f} s"
    print(checks_as_json(checks) if as_json else summary)
    return exit_status(checks)
