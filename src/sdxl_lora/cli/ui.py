"""`sdxl-lora ui`: MLflow's web page over the project's database, for this machine only."""

import os
import socket
import sys
from pathlib import Path

from sdxl_lora.runtime.dvc_execution import project_root
from sdxl_lora.runtime.library_settings import MLFLOW_SERVER, set_library_settings

HOST = "127.0.0.1"


def _require_free_port(port: int) -> None:
    """Raise OSError unless `port` can be listened on.

    Raises:
        OSError: another program listens on it, or it may not be used.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise OSError(
                f"port {port} on {HOST} cannot be used ({error.strerror}). Stop the program that uses it, "
                f"or choose another port: `sdxl-lora ui --port {port + 1}`"
            ) from error


def _require_database(database: Path) -> None:
    """Raise FileNotFoundError unless a run has created the database.

    Raises:
        FileNotFoundError: it does not exist.
    """
    if not database.is_file():
        raise FileNotFoundError(
            f"{database} not found: no run has been tracked here yet. `make demo` tracks one"
        )


def address(port: int) -> str:
    """Return the address of the page that lists the runs; MLflow's first page is about language models."""
    return f"http://{HOST}:{port}/#/experiments/1/runs?workflowType=machine_learning"


def command(database: Path, port: int) -> list[str]:
    """Return the command line of the server."""
    store = f"sqlite:///{database}"
    options = ["--backend-store-uri", store, "--host", HOST, "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "ui", *options]


def run_ui(port: int) -> None:
    """Print the page's address and become the server.

    Raises:
        OSError: there is no database yet, or the port is in use.
    """
    database = project_root() / "mlflow.db"
    _require_database(database)
    _require_free_port(port)
    print(f"{address(port)} (stop it with Ctrl-C)", flush=True)
    set_library_settings(MLFLOW_SERVER)
    os.execv(sys.executable, command(database, port))
