"""The doctor's checks in their order. A check that breaks down does not stop the others."""

from collections.abc import Iterator

from sdxl_lora.cli.doctor.context import CheckFunction, CheckSkippedError, RunContext
from sdxl_lora.cli.doctor.resources import check_disk, check_gpu_memory, check_memory, check_models
from sdxl_lora.cli.doctor.services import check_mlflow, check_remote
from sdxl_lora.cli.doctor.smoke_tests import (
    check_gradient,
    check_resume,
    check_sample,
    check_save,
    check_step,
    check_vae,
)
from sdxl_lora.cli.doctor.software import check_gpu, check_libraries, check_precision, check_python
from sdxl_lora.reproducibility.checklist import Check, failed, warned

CHECKS: list[CheckFunction] = [
    check_python,
    check_libraries,
    check_gpu,
    check_precision,
    check_gpu_memory,
    check_memory,
    check_disk,
    check_models,
    check_mlflow,
    check_remote,
    check_vae,
    check_gradient,
    check_step,
    check_resume,
    check_save,
    check_sample,
]


def run_checks(context: RunContext) -> Iterator[Check]:
    """Yield each check as soon as it is made. An exception in a check is its finding."""
    for check in CHECKS:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        try:
            yield from check(context)
        except CheckSkippedError as reason:
            yield warned(name, f"not tried: {reason}", "see the check of that")
        except Exception as error:  # whatever it is, the run would have met it
            yield failed(
                name,
                f"{type(error).__name__}: {' '.join(str(error).split())}",
                "correct that, then run the doctor again",
            )
