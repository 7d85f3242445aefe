"""`sdxl-lora verify`: the checks of an adapter's header, as lines or JSON."""

from pathlib import Path

from sdxl_lora.reproducibility.checklist import checks_as_json, exit_status, format_check, summarize_checks
from sdxl_lora.reproducibility.verify import verify

_WIDTH = 11  # of the longest check's name


def run_verify(adapter: Path, as_json: bool) -> int:
    """Print every check as it is made, and return the exit status: 1 if one failed."""
    checks = []
    for check in verify(adapter):
        checks.append(check)
        if not as_json:
            print(format_check(check, _WIDTH), flush=True)
    print(checks_as_json(checks) if as_json else summarize_checks(checks))
    return exit_status(checks)
