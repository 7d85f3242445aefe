"""Finding a run's record in git. Records in MLflow and of experiments: tests/pipeline/test_dvc_modes.py."""

import hashlib
import json
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import training_digest
from sdxl_lora.reproducibility.run_record import find_record
from sdxl_lora.storage.safetensors_io import write_tensors

CODE = Path("src/sdxl_lora/training/trainer.py")


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def commit(message: str) -> str:
    git("add", "--all")
    git("commit", "--quiet", "--message", message)
    return git("rev-parse", "HEAD")


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def finish_run(rank: int) -> str:
    """Leaves what a run with this rank leaves, uncommitted; the digest of its training."""
    facts = {"sdxl_lora.git.commit": git("rev-parse", "HEAD")}
    paths.REPORTS.mkdir(parents=True, exist_ok=True)
    paths.LINEAGE.write_text(json.dumps(facts), encoding="utf-8")
    paths.PARAMS.write_text(yaml.safe_dump({"lora": {"rank": rank}}), encoding="utf-8")
    training: dict[str, Any] = {
        "deps": [{"path": str(CODE), "md5": md5(CODE)}],
        "params": {"params.yaml": {"lora": {"rank": rank}}},
        "outs": [{"path": "data/lora", "md5": f"{rank}.dir"}],
    }
    export = {"outs": [{"path": str(paths.LINEAGE), "md5": md5(paths.LINEAGE)}]}
    paths.LOCK.write_text(yaml.safe_dump({"stages": {"train_lora": training, "export_lora": export}}))
    return training_digest(paths.LOCK)


def write_adapter(facts: dict[str, str]) -> str:
    path = Path("adapter.safetensors")
    write_tensors(path, {"a": torch.zeros(1)}, {f"sdxl_lora.{name}": fact for name, fact in facts.items()})
    return str(path)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=main")
    CODE.parent.mkdir(parents=True)
    CODE.write_text("first = True\n")
    paths.PIPELINE.write_text("stages: {}\n")
    Path(".gitignore").write_text("*.safetensors\n")
    commit("start")


def test_commit_holds_its_record_and_knows_which_commit_ran() -> None:
    start = git("rev-parse", "HEAD")
    finish_run(rank=4)
    results = commit("results")
    record = find_record("main")
    assert (record.code_commit, record.recorded_head) == (results, start)
    assert record.outs("train_lora") == {"data/lora": "4.dir"}
    assert record.changed_code() == []


def test_commit_without_a_lock_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"has no dvc\.lock.* After `dvc repro`, commit dvc\.lock"):
        find_record("main")


def test_unknown_name_is_refused_with_what_it_could_be() -> None:
    with pytest.raises(ValueError, match="'nothing' is not a git revision, DVC experiment"):
        find_record("nothing")


def test_code_that_was_not_committed_is_named() -> None:
    committed = CODE.read_text()
    CODE.write_text("first = False\n")
    finish_run(rank=4)
    CODE.write_text(committed)
    commit("results without the code")
    assert find_record("main").changed_code() == [str(CODE)]


def test_report_that_is_not_what_dvc_recorded_is_no_part_of_the_record() -> None:
    finish_run(rank=4)
    paths.LINEAGE.write_text("{}")
    commit("an edited report")
    assert paths.LINEAGE not in find_record("main").files


def test_adapter_is_found_in_the_workspace() -> None:
    digest = finish_run(rank=4)
    name = write_adapter({"dvc.train_lora": digest, "git.commit": git("rev-parse", "HEAD")})
    record = find_record(name)
    assert record.origin == "adapter.safetensors, recorded in the workspace"
    assert record.code_commit == git("rev-parse", "HEAD")


def test_adapter_of_an_older_run_is_found_in_its_commit() -> None:
    digest = finish_run(rank=4)
    older = commit("rank 4")
    finish_run(rank=8)
    commit("rank 8")
    name = write_adapter({"dvc.train_lora": digest, "git.commit": "0" * 40})
    record = find_record(name)
    assert record.code_commit == older
    assert "rank: 4" in record.files[paths.PARAMS]


def test_adapter_whose_code_was_committed_after_the_run_is_made_with_that_commit() -> None:
    before = git("rev-parse", "HEAD")
    CODE.write_text("first = False\n")
    digest = finish_run(rank=4)
    name = write_adapter({"dvc.train_lora": digest, "git.commit": before})
    assert find_record(name).changed_code() == [str(CODE)]
    after = commit("code and results")
    finish_run(rank=4)  # run once more, as it is
    assert find_record(name).code_commit == after


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "does not say what it was trained on"),
        ({"dvc.train_lora": "0" * 64}, r"no dvc\.lock of the workspace, a commit or an experiment"),
    ],
)
def test_adapter_without_a_record_is_refused(facts: dict[str, str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        find_record(write_adapter(facts))


def test_pickle_is_refused_as_an_adapter() -> None:
    Path("adapter.safetensors").write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(ValueError, match="is a pickle, which can run any code"):
        find_record("adapter.safetensors")


def test_missing_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"none\.safetensors not found"):
        find_record("none.safetensors")
