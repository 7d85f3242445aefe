"""The audit of dependencies, against a service on the loopback that speaks OSV's protocol."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.support.patience import patience

SCRIPT = Path(__file__).parents[2] / ".ci/audit.py"
KNOWN = {
    "schema_version": "1.0.0",
    "id": "GHSA-test-test-test",
    "summary": "Anyone may do anything",
    "affected": [
        {
            "package": {"name": "badlib", "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}],
            "versions": ["1.0"],
        }
    ],
}


class Osv(BaseHTTPRequestHandler):
    """Knows one vulnerability, of badlib 1.0."""

    status = 200

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = (query["package"]["name"], query["version"]) == ("badlib", "1.0")
        body = json.dumps({"vulns": [KNOWN]} if known else {}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Osv]]:
    handler = type("Handler", (Osv,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OSV_URL", f"http://127.0.0.1:{server.server_address[1]}/v1/query")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield handler
        server.shutdown()


def audit(folder: Path, lock: str, accepted: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "requirements.lock").write_text(lock)
    (folder / "pyproject.toml").write_text(f"[tool.audit.accepted]\n{accepted}\n")
    command = [sys.executable, str(SCRIPT)]
    return subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=patience(30), check=False
    )


@pytest.mark.usefixtures("service")
def test_known_vulnerability_fails_and_names_the_version_without_it(tmp_path: Path) -> None:
    result = audit(tmp_path, "goodlib==2.0\nbadlib==1.0\n    # via goodlib\n")
    assert result.returncode == 1
    assert "badlib 1.0: GHSA-test-test-test, mended in 1.1" in result.stderr
    assert "goodlib" not in result.stderr


@pytest.mark.usefixtures("service")
def test_mended_version_passes(tmp_path: Path) -> None:
    result = audit(tmp_path, "goodlib==2.0\nbadlib==1.1\n")
    assert result.returncode == 0, result.stderr
    assert "no known vulnerability in 2 packages" in result.stdout


@pytest.mark.usefixtures("service")
def test_accepted_vulnerability_passes(tmp_path: Path) -> None:
    result = audit(tmp_path, "badlib==1.0\n", '"GHSA-test-test-test" = "no stranger reaches it"')
    assert result.returncode == 0, result.stderr
    assert "1 accepted" in result.stdout


def test_service_that_fails_is_no_clean_bill(service: type[Osv], tmp_path: Path) -> None:
    service.status = 503
    result = audit(tmp_path, "badlib==1.0\n")
    assert result.returncode == 0, result.stderr
    assert "NOTHING IS KNOWN" in result.stdout


def test_service_out_of_reach_is_no_clean_bill(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OSV_URL", "http://127.0.0.1:9/v1/query")
    result = audit(tmp_path, "badlib==1.0\n")
    assert result.returncode == 0, result.stderr
    assert "NOTHING IS KNOWN" in result.stdout


def test_lock_that_cannot_be_read_fails(tmp_path: Path) -> None:
    assert audit(tmp_path, "badlib>=1.0\n").returncode == 1
