"""The Makefile on a machine that lacks something; `.ci/run` shows that it works on one that does not."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in (
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
    ):  # `make test` runs this too, and a make in a make says so
        monkeypatch.delenv(name, raising=False)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], capture_output=True, text=True, timeout=patience(15), check=False
    )


def test_help_comes_first_and_needs_no_environment() -> None:
    assert make().stdout == make("help").stdout
    assert not Path(".venv").exists()


def test_help_has_a_line_for_every_target() -> None:
    phony = next(line for line in Path("Makefile").read_text().splitlines() if line.startswith(".PHONY:"))
    assert [line.split()[1] for line in make("help").stdout.splitlines()] == phony.split()[1:]


def test_machine_without_a_fitting_python_is_told_what_to_install(tmp_path: Path) -> None:
    old_python = tmp_path / "old-python"
    old_python.write_text("#!/bin/sh\nexit 1\n")
    old_python.chmod(0o755)
    result = make("setup", f"PYTHON={old_python} no-such-python")
    assert result.returncode != 0
    assert "is Python 3.11, 3.12 or 3.13" in result.stderr
    assert "make setup PYTHON=" in result.stderr
    assert not Path(".venv").exists()


def test_finished_setup_costs_nothing() -> None:
    Path(".venv").mkdir()
    Path(".venv/installed").touch()
    assert make("setup").stdout.strip() in ("", "make: Nothing to be done for 'setup'.")
