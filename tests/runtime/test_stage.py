import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sdxl_lora.runtime.dvc_execution import DvcExecution, current_execution, parse_execution_id
from sdxl_lora.runtime.stage import Deadline, record_stage, run_stage, stop_on_signals


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path


def test_stage_outside_dvc_is_an_execution_of_its_own() -> None:
    execution = current_execution()
    assert execution.pid in {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    assert execution.is_alive()


@pytest.mark.parametrize(
    ("words", "is_execution"),
    [(["repro", "-f"], True), (["exp", "run"], True), (["queue", "start"], True), (["status"], False)],
)
def test_execution_is_the_dvc_command_that_runs_stages(
    tmp_path: Path, words: list[str], is_execution: bool
) -> None:
    """A program named dvc starts a process that says which execution it belongs to."""
    asked = "from sdxl_lora.runtime.dvc_execution import current_execution; print(current_execution().pid)"
    program = ["import os, subprocess, sys", "print(os.getpid(), flush=True)"]
    program.append(f"subprocess.run([sys.executable, '-c', {asked!r}])")
    (tmp_path / "dvc").write_text("\n".join(program), encoding="utf-8")
    command = [sys.executable, str(tmp_path / "dvc"), *words]
    dvc, execution = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert (dvc == execution) == is_execution


def test_id_says_which_process_and_not_which_host() -> None:
    execution = current_execution()
    assert parse_execution_id(execution.id) == execution
    assert os.uname().nodename not in execution.id
    assert parse_execution_id("not an id") is None


def test_process_id_used_again_is_another_execution() -> None:
    execution = current_execution()
    assert not DvcExecution(execution.machine, execution.pid, execution.created - 100).is_alive()


def test_execution_stays_the_same_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    execution = current_execution()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 0.0)
    assert psutil.Process().create_time() < 1e9
    assert current_execution() == execution
    assert execution.is_alive()


def test_other_machines_are_left_alone() -> None:
    assert DvcExecution("another", 1, 1).is_alive()


def test_stage_notes_how_it_went() -> None:
    with record_stage("download_dataset"):
        assert current_execution().records()["download_dataset"].status == "running"
    with pytest.raises(KeyError), record_stage("encode_dataset"):
        raise KeyError("x")
    statuses = {name: record.status for name, record in current_execution().records().items()}
    assert statuses == {"download_dataset": "executed", "encode_dataset": "failed"}


def test_sigterm_ends_a_stage_cleanly() -> None:
    with pytest.raises(SystemExit) as exit_, record_stage("train_lora"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert exit_.value.code == 143
    assert current_execution().records()["train_lora"].status == "killed"


def test_what_a_user_can_mend_is_said_without_a_traceback() -> None:
    def main() -> None:
        raise ValueError("training.steps is 0: raise it")

    with pytest.raises(SystemExit, match=r"training.steps is 0: raise it"):
        run_stage(main)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_to_stop_instead_of_ending_the_block(number: signal.Signals) -> None:
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)  # a shell's background jobs ignore it
    asked: list[str] = []
    with stop_on_signals(lambda: asked.append("stop")) as signals:
        assert signals == []
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert signals == [number, number]
        assert asked == ["stop", "stop"]
    with pytest.raises((SystemExit, KeyboardInterrupt)), record_stage("train_lora"):
        os.kill(os.getpid(), number)


def test_deadline_is_near_while_two_of_the_longest_rounds_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("sdxl_lora.runtime.stage.time", SimpleNamespace(monotonic=lambda: now))
    deadline = Deadline(20 / 60)
    assert not deadline.is_near()
    now += 4.0  # the longest round: two more take 8 of the 20 seconds
    assert not deadline.is_near()
    while not deadline.is_near():
        now += 0.5
    assert now == 112.0
    assert not Deadline(None).is_near()
