"""Checks that MLflow and the DVC remote answer.

A client may wait for a dead server for minutes, and a thread cannot be stopped. So each check runs this
module as a script, with `mlflow` or `remote` as its argument, and kills it after ANSWER_SECONDS. The script
asks the service, prints one line, and exits with status 1 if the service does not work.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.runtime.dvc_command import write_to_remote
from sdxl_lora.runtime.dvc_execution import project_root
from sdxl_lora.runtime.library_settings import SERVICE_CHECK

if TYPE_CHECKING:
    from sdxl_lora.cli.doctor.context import RunContext

ANSWER_SECONDS = 20  # seconds that an answer may take


def check_mlflow(_: "RunContext") -> Iterator[Check]:
    """Whether live curves will be shown. A run goes on without them."""
    answers, words = _ask("mlflow")
    if answers:
        yield passed("mlflow", words)
    else:
        remedy = "start the server, correct MLFLOW_TRACKING_URI, or log later by `dvc repro -sf track_run`"
        yield warned("mlflow", words, remedy)


def check_remote(_: "RunContext") -> Iterator[Check]:
    """Whether results can be pushed."""
    answers, words = _ask("remote")
    if answers:
        yield passed("remote", words)
    else:
        yield failed(
            "remote", words, "`dvc remote list` shows its place, `dvc remote modify --local` corrects it"
        )


def _ask(service: str) -> tuple[bool, str]:
    """Whether it answers well and in time, and what is to be said of that."""
    command = [sys.executable, "-m", "sdxl_lora.cli.doctor.services", service]
    try:
        result = subprocess.run(
            command,
            env={**os.environ, **SERVICE_CHECK},
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer in {ANSWER_SECONDS} s"
    lines = (result.stdout.strip() or result.stderr.strip()).splitlines()
    return result.returncode == 0, lines[-1] if lines else f"status {result.returncode}"


def _ask_mlflow() -> str:
    """Open the project's experiment, and create it if needed, as the first stage would."""
    from sdxl_lora.tracking.connection import connect  # seconds, which the other question need not wait for

    uri = connect().client.tracking_uri
    return "mlflow.db, in this folder" if uri.startswith("sqlite:") else f"{uri.rpartition('@')[2]} answers"


def _ask_remote() -> str:
    """Write a small file to the default remote and delete it.

    Raises:
        DvcException, OSError: there is no remote, or it refuses.
    """
    return f"{write_to_remote(project_root())} can be written"


def main() -> None:
    questions = {"mlflow": _ask_mlflow, "remote": _ask_remote}
    try:
        sys.stdout.write(f"{questions[sys.argv[1]]()}\n")
    except Exception as error:  # clients of a dozen stores raise whatever they like
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


if __name__ == "__main__":
    main()
