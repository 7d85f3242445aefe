"""MLflow's web page over the project's own database, for this machine alone: `python -m sdxl_lora.cli.ui`."""

import argparse
import os
import socket
import sys
from pathlib import Path

from sdxl_lora.runtime.dvc_execution import project_root

HOST = "127.0.0.1"
# MLflow's job runners are of no use here, and take 2.6 GB and 13 s of its start.
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


def _require_free_port(port: int) -> None:
    """Refuses a port that cannot be listened on.

    Raises:
        OSError: another program listens on it, or it may not be used.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise OSError(
                f"port {port} on {HOST} cannot be used ({error.strerror}): stop the program that has it, "
                f"or choose another with `make ui PORT={port + 1}`"
            ) from error


def _require_database(database: Path) -> None:
    """Refuses to show a database that no run has made yet.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not database.is_file():
        raise FileNotFoundError(f"{database} not found: nothing has been tracked here yet; `make demo` does")


def address(port: int) -> str:
    """The page of the project's runs; MLflow's first page is about language models."""
    return f"http://{HOST}:{port}/#/experiments/1/runs?workflowType=machine_learning"


def command(database: Path, port: int) -> list[str]:
    """What starts the server."""
    store = f"sqlite:///{database}"
    options = ["--backend-store-uri", store, "--host", HOST, "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "ui", *options]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sdxl_lora.cli.ui", description=__doc__)
    parser.add_argument("--port", type=int, default=5000, help="default: 5000")
    port = parser.parse_args().port
    database = project_root() / "mlflow.db"
    try:
        _require_database(database)
        _require_free_port(port)
    except OSError as error:
        sys.exit(f"ui: {error}")
    print(f"{address(port)} (stop it with Ctrl-C)", flush=True)
    os.execve(sys.executable, command(database, port), {**os.environ, **ENVIRONMENT})


if __name__ == "__main__":
    main()
