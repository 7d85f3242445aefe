"""A finished run as it was recorded: its code, params and results, found again from whatever names it."""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import PREFIX, entry_digest, read_lineage
from sdxl_lora.runtime.dvc_lock import LockedStages, locked_stages
from sdxl_lora.runtime.git import commits_with, experiments, md5_at, rev_parse, text_at
from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.tracking.pipeline_run import download_record

_RUN_ID = re.compile(r"[0-9a-f]{32}")
_CODE = ("src/", "stages/")

_Texts = Mapping[Path, str]


@dataclass(frozen=True)
class RunRecord:
    """What a run was made from, and what DVC noted of it."""

    origin: str
    """Where it was found, in words."""
    code_commit: str
    """The commit that holds the code."""
    files: _Texts
    """Those of `paths.RECORD` that there are, as they were."""

    @cached_property
    def stages(self) -> LockedStages:
        """The entries of dvc.lock; none before a stage has run."""
        return locked_stages(self.files.get(paths.LOCK, ""))

    @property
    def recorded_head(self) -> str:
        """The commit that was checked out when the run ended, which its adapter names; else `tree`."""
        facts = yaml.safe_load(self.files.get(paths.LINEAGE, "{}"))
        return rev_parse(str(facts.get(f"{PREFIX}git.commit", ""))) or self.code_commit

    def changed_code(self) -> list[str]:
        """Files that were not, when the run used them, as its commit has them."""
        return _changed_code(self.code_commit, self.stages)

    def outs(self, stage: str) -> dict[str, str]:
        """MD5 of what a stage wrote, by path."""
        return {out["path"]: out["md5"] for out in self.stages.get(stage, {}).get("outs", [])}


def find_record(name: str) -> RunRecord:
    """The record of a run.

    Args:
        name: a git revision, a DVC experiment, an id of an MLflow run, or an exported adapter's file.

    Raises:
        ValueError: it is none of these, or has no record; says which remedy there is.
        ConnectionError: MLflow cannot be reached, or knows no such run.
    """
    if Path(name).suffix == ".safetensors":
        return record_of_adapter(Path(name))
    if commit := rev_parse(name):
        return _record_of_commit(commit, f"commit {commit[:12]}")
    if commit := experiments().get(name):
        return _record_of_commit(commit, f"experiment {name}")
    if _RUN_ID.fullmatch(name):
        return _record_of_run(name)
    raise ValueError(
        f"{name!r} is no git revision, no DVC experiment, no id of an MLflow run and no adapter's file. "
        "`git log`, `dvc exp list --all-commits` and `make ui` list them; `git fetch` and `dvc exp pull` get "
        "those of others"
    )


def _record_of_commit(commit: str, origin: str) -> RunRecord:
    """The record that a commit holds."""
    files = read_record(partial(text_at, commit))
    if not {paths.LOCK, paths.PARAMS} <= files.keys():
        raise ValueError(
            f"{origin} holds no {paths.LOCK}, so nothing says what its results were. After `dvc repro`, "
            f"commit {paths.LOCK}, {paths.PARAMS} and {paths.REPORTS}/; or name an experiment, an MLflow run "
            f"or the adapter's file in {paths.EXPORT}/"
        )
    return RunRecord(origin, commit, files)


def _record_of_run(run_id: str) -> RunRecord:
    """The record that MLflow keeps with a run."""
    with TemporaryDirectory() as folder:
        files = read_record(reader(download_record(run_id, Path(folder))))
    if paths.LOCK not in files:
        raise ValueError(f"MLflow run {run_id} has no {paths.LOCK}: it ended before `track_run`")
    return _with_code_commit(f"MLflow run {run_id}", files, None)


def record_of_adapter(path: Path) -> RunRecord:
    """The record of the training that a file's header names: the workspace's, else that of a commit."""
    if not path.is_file():
        raise ValueError(
            f"{path} not found: `dvc pull {paths.EXPORT}` gets the adapter of the present dvc.lock"
        )
    require_safetensors(path)
    facts = read_lineage(path)
    digest = facts.get("dvc.train_lora")
    if digest is None:
        raise ValueError(
            f"{path} does not say what it was made from; those in {paths.EXPORT}/, of export_lora, do"
        )
    present = read_record(reader(Path()))
    if _training_digest_of(present) == digest:
        return _with_code_commit(f"{path.name}, recorded in the workspace", present, facts.get("git.commit"))
    for commit in commits_with(paths.LOCK):
        files = read_record(partial(text_at, commit))
        if _training_digest_of(files) == digest:
            return RunRecord(f"{path.name}, recorded in commit {commit[:12]}", commit, files)
    raise ValueError(
        f"no {paths.LOCK}, neither here nor in any commit or experiment, records the training of {path}: "
        "`git fetch` or `dvc exp pull` the one that does"
    )


def _with_code_commit(origin: str, files: _Texts, head: str | None) -> RunRecord:
    """A record that no commit holds, with the one that holds its code: its head, unless another fits better.

    Raises:
        ValueError: the commit is not in this repository.
    """
    stages = locked_stages(files[paths.LOCK])
    facts = yaml.safe_load(files.get(paths.LINEAGE, "{}"))
    named = head or str(facts.get(f"{PREFIX}git.commit", ""))
    tree = rev_parse(named)
    if tree is None:
        raise ValueError(
            f"{origin} was made at commit {named or '(unknown)'}, which is not here: `git fetch` it"
        )
    if _changed_code(tree, stages):
        fitting = (commit for commit in commits_with(paths.LOCK) if not _changed_code(commit, stages))
        tree = next(fitting, tree)
    return RunRecord(origin, tree, files)


def _changed_code(commit: str, stages: LockedStages) -> list[str]:
    """Code files of any stage in dvc.lock that differ from those of a commit."""
    used = {
        dep["path"]: dep["md5"]
        for entry in stages.values()
        for dep in entry.get("deps", [])
        if dep["path"].startswith(_CODE)
    }
    found = md5_at(commit, used)
    return sorted(path for path, digest in used.items() if found.get(path) != digest)


def read_record(read: Callable[[Path], str | None]) -> dict[Path, str]:
    """The files of a record that there are, but for reports that DVC's lock does not know as they are."""
    texts = {path: text for path in paths.RECORD if (text := read(path)) is not None}
    if paths.LOCK not in texts:
        return texts
    known = {
        out["path"]: out["md5"]
        for entry in locked_stages(texts[paths.LOCK]).values()
        for out in entry.get("outs", [])
    }
    return {
        path: text
        for path, text in texts.items()
        if known.get(path.as_posix(), _md5_of(text)) == _md5_of(text)
    }


def reader(folder: Path) -> Callable[[Path], str | None]:
    """Reads files below `folder`."""

    def read(path: Path) -> str | None:
        return (folder / path).read_text(encoding="utf-8") if (folder / path).is_file() else None

    return read


def _training_digest_of(files: _Texts) -> str | None:
    """What a record's training is told apart by; None if there was none."""
    entry = locked_stages(files.get(paths.LOCK, "")).get("train_lora")
    return None if entry is None else entry_digest(entry)


def _md5_of(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
