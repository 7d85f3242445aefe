"""Looks at everything that an expensive run needs, within a minute."""

import argparse
import logging
import os
import sys
import time
from pathlib import Path

from sdxl_lora.config import load_params
from sdxl_lora.paths import PARAMS
from sdxl_lora.reproducibility.checklist import checks_as_json, exit_status, format_check, summarize_checks

_WIDTH = 10  # of the longest check's name
_LIBRARY_SETTINGS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic kernels need it before CUDA starts
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sdxl_lora.cli.doctor.command",
        description=(__doc__ or "").splitlines()[0],
        epilog="The exit status is 1 if a check fails.",
    )
    parser.add_argument("--recipe", type=Path, default=PARAMS, help=f"default: {PARAMS}")
    parser.add_argument("--json", action="store_true", help="the list as JSON")
    arguments = parser.parse_args()
    start = time.monotonic()
    try:
        params = load_params(arguments.recipe)
    except (ValueError, OSError) as error:
        sys.exit(f"doctor: {error}")
    for name, value in _LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of 4 bits, used on no CPU
    from sdxl_lora.cli.doctor.context import RunContext
    from sdxl_lora.cli.doctor.examinations import (
        run_checks,  # only now: libraries read their settings when imported
    )
    from sdxl_lora.runtime.device import choose_device

    context, checks = RunContext(params, choose_device()), []
    for check in run_checks(context):
        checks.append(check)
        if not arguments.json:
            sys.stdout.write(f"{format_check(check, _WIDTH)}\n")
            sys.stdout.flush()
    context.cleanup()
    summary = f"{summarize_checks(checks)}, in {time.monotonic() - start:.0f} s"
    sys.stdout.write(f"{checks_as_json(checks) if arguments.json else summary}\n")
    sys.exit(exit_status(checks))


if __name__ == "__main__":
    main()
