"""Whether MLflow and the DVC remote answer: each is asked by a process of its own, which can be given up.

`python -m sdxl_lora.cli.doctor.services mlflow` (or `remote`) asks, says what it found in a line, and fails
if that is nothing good.
"""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.runtime.dvc_execution import project_root

if TYPE_CHECKING:
    from sdxl_lora.cli.doctor.context import RunContext

ANSWER_SECONDS = 20  # seconds that an answer may take
_QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8", "AWS_MAX_ATTEMPTS": "1"}
"""So that a dead server is told from a slow one within that time."""


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
            env={**os.environ, **_QUICK},
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
    """Opens the project's experiment, creating it if need be, as the first stage would."""
    from sdxl_lora.tracking.connection import connect  # seconds, which the other question need not wait for

    uri = connect().client.tracking_uri
    return "mlflow.db, in this folder" if uri.startswith("sqlite:") else f"{uri.rpartition('@')[2]} answers"


def _ask_remote() -> str:
    """Writes a small file to the default remote and deletes it.

    Raises:
        DvcException, OSError: there is no remote, or it refuses.
    """
    from dvc.repo import Repo  # likewise

    with Repo(str(project_root())) as repository:
        name = repository.config["core"].get("remote")
        remote = repository.cloud.get_remote(name)
        path = remote.fs.join(remote.path, f"doctor-{uuid.uuid4().hex}")
        remote.fs.makedirs(remote.path, exist_ok=True)
        remote.fs.pipe_file(path, b"")
        remote.fs.remove(path)
    return f"{name} can be written"


def main() -> None:
    questions = {"mlflow": _ask_mlflow, "remote": _ask_remote}
    try:
        sys.stdout.write(f"{questions[sys.argv[1]]()}\n")
    except Exception as error:  # clients of a dozen stores raise whatever they like
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


if __name__ == "__main__":
    main()
