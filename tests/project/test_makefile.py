"""The Makefile on a machine that lacks something; `.ci/run` shows that it works on one that does not."""

import shutil
import subprocess
from itertools import islice
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


SETTINGS = ("PYTHON", "PORT", "NAME", "REPO", "PUBLIC", "FORCE", "REF", "DATA", "ONLY", "ADAPTER")
TARGETS = [
    line.split(":")[0]
    for line in (REPOSITORY / "Makefile").read_text().splitlines()
    if "  ## " in line and not line.startswith(("$", "clean:"))
]
HOSTILE = {
    "backticks": "`touch x`.safetensors",
    "substitution": "$(touch x)",
    "semicolon": "; touch x;",
    "quoted semicolon": '"; touch x; "',
    "single quotes": "'; touch x; '",
    "substitution in quotes": '"$(touch x)"',
    "newline": "a\ntouch x\nb",
    "make's shell": "$(shell touch x)",
    "make's braces": "${shell touch x}",
    "make's eval": "$(eval x := $(shell touch x))",
    "make's variables": "$(MAKE) $@ $$ $(PYTHON)",
    "pipe and redirection": "a | touch x > x & touch x && touch x || touch x",
    "option": "--help",
    "comment": "a # b \\",
    "glob": "* ? [a-z] ~ {a,b}",
    "arithmetic": "$((1 + 1)) $HOME $PORT",
}
STAND_IN = """#!/bin/bash
printf '%s\\0' $# {name} "$@" >> {log}
"""


@pytest.fixture
def _stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose programs only note what they are called with."""
    programs = Path(".venv/bin")
    programs.mkdir(parents=True)
    for name in ("sdxl-lora", "dvc", "python", "ruff", "mypy", "lint-imports", "pip-compile"):
        script = STAND_IN.format(log=tmp_path / "calls", name=name)
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    Path("demo/build").mkdir(parents=True)
    Path(".venv/installed").touch()
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def calls() -> list[list[str]]:
    """What the stand-ins were called with, each after the program's name."""
    words = iter(Path("calls").read_text().split("\0")[:-1])
    return [[next(words), *islice(words, int(count))] for count in words]


def calls_with(value: str) -> list[list[str]]:
    """The calls of `sdxl-lora` that a value of every setting must lead to, in the order of the targets."""
    return [
        ["recipe", "--force", "demo"],
        ["summary"],
        ["doctor"],
        ["plan"],
        ["ui", f"--port={value}"],
        ["promote"],
        ["push", "--public", "--force", "--", value],
        ["recipe", "--force", "--", value],
        ["reproduce", f"--data={value}", "--", value],
        ["verify", "--", value],
    ]


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("source", ["command line", "environment", "environment over makefile"])
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_no_value_runs_anything_and_commands_get_it_as_it_is(
    value: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting has the value at once, and every target runs."""
    targets = [target for target in TARGETS if target != "lock"]  # rewrites its lock from real output
    if source == "command line":
        result = make(*targets, *(f"{name}={value}" for name in SETTINGS))
    else:
        for name in SETTINGS:
            monkeypatch.setenv(name, value)
        result = make(*targets, *(["--environment-overrides"] if "over" in source else []))
    assert not Path("x").exists(), result.stdout
    assert result.returncode == 0, result.stderr
    assert [words for program, *words in calls() if program == "sdxl-lora"] == calls_with(value)
    assert ["python", "-m", "tests.support.elsewhere", f"--only={value}"] in calls()


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize("source", ["command line", "environment"])
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_no_value_runs_anything_in_setup_lock_and_clean(
    value: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`setup` tries the words of PYTHON as programs; none of these is an interpreter."""
    arguments = []
    for name in SETTINGS:
        if source == "environment":
            monkeypatch.setenv(name, value)
        else:
            arguments.append(f"{name}={value}")
    make("lock", *arguments)
    assert make("clean", *arguments).returncode == 0
    result = make("setup", *arguments)
    assert not Path("x").exists(), result.stdout
    assert f"none of [{value}] is Python 3.11" in result.stderr


@pytest.mark.usefixtures("_stand_ins")
def test_targets_without_settings_call_commands_with_their_defaults() -> None:
    assert make("ui", "recipe", "reproduce", "verify", "push-to-hub", "demo").returncode == 0
    expected = [["ui"], ["recipe", "--"], ["reproduce", "--"], ["verify", "--"], ["push", "--"]]
    expected += [["recipe", "demo"], ["summary"]]
    assert [words for program, *words in calls() if program == "sdxl-lora"] == expected


@pytest.mark.usefixtures("_stand_ins")
def test_internal_names_cannot_be_set() -> None:
    result = make("plan", "BIN=`touch x`", "RUN=touch x;", "INSTALLED=y", "CURDIR=`touch x`", "SHELL=touch")
    assert result.returncode == 0
    assert calls() == [["sdxl-lora", "plan"]]
    assert not Path("x").exists()
