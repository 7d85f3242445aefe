"""A real MLflow server, and a gate before it that can close, dawdle or fail in the middle of a run."""

import http.client
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

from sdxl_lora.cli import ui
from sdxl_lora.runtime.library_settings import MLFLOW_SERVER
from tests.support.patience import patience

PASSWORD = "PlantedPasswordOfMLflow"
STARTUP_SECONDS = patience(20)
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}
Trouble = Callable[["Gate"], None]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((ui.HOST, 0))
        return int(listener.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """MLflow's server with its database and artifacts in `folder`; its port."""
    port = free_port()
    command = [*ui.command(folder / "mlflow.db", port), "--artifacts-destination", str(folder / "artifacts")]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **MLFLOW_SERVER},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            wait_for(port)
            yield port
        finally:
            os.killpg(server.pid, 15)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection(ui.HOST, port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(f"no MLflow server on port {port}")


class Gate(ThreadingHTTPServer):
    """Passes requests on to the server behind it. With the first batch of losses trouble begins."""

    daemon_threads = True

    def __init__(self, behind: int, trouble: Trouble) -> None:
        super().__init__((ui.HOST, 0), Passage)
        self.behind = behind
        self.delay = 0.0
        """Seconds that an answer takes."""
        self.status: int | None = None
        """Of every answer; None: as the server behind it says."""
        self.trouble = trouble
        self.in_trouble = Event()

    @property
    def address(self) -> str:
        """With a password, as a user may write it."""
        return f"http://somebody:{PASSWORD}@{ui.HOST}:{self.server_address[1]}"

    def handle_error(self, *_: object) -> None:
        """Nothing: whom a request was for may have gone."""

    def close(self) -> None:
        """Stops listening."""
        self.shutdown()
        self.server_close()


class Passage(BaseHTTPRequestHandler):
    """One request."""

    server: Gate

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay)
        if self.server.status is not None:
            self.send_error(self.server.status)
            return
        connection = http.client.HTTPConnection(ui.HOST, self.server.behind, timeout=60)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if b"train/loss" in body:
            self.server.trouble(self.server)
            self.server.in_trouble.set()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_any  # noqa: N815, as http.server names them

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def gate(behind: int, trouble: Trouble) -> Iterator[Gate]:
    with Gate(behind, trouble) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
