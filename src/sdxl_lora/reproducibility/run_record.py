"""The record of a finished run (code, params, results), found by a commit, experiment, MLflow run or file.

Two commits belong to a run. The recorded head was checked out while it ran; the adapter's header names it.
The code commit has the code that ran. They differ if the code was committed after the run: `dvc exp run`
commits code and results together, on top of the head that it started from.
"""

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
    """The code, params and recorded results of a run."""

    origin: str
    """Where it was found, in words."""
    code_commit: str
    """The commit whose code is that of the run, as far as there is one: see `changed_code`."""
    files: _Texts
    """The text of each file of `paths.RECORD` that the record has."""

    @cached_property
    def stages(self) -> LockedStages:
        """The entries of dvc.lock by stage; none before a stage has run."""
        return locked_stages(self.files.get(paths.LOCK, ""))

    @property
    def recorded_head(self) -> str:
        """The commit that was checked out when the run ended; `code_commit` if none is recorded here."""
        facts = yaml.safe_load(self.files.get(paths.LINEAGE, "{}"))
        return rev_parse(str(facts.get(f"{PREFIX}git.commit", ""))) or self.code_commit

    def changed_code(self) -> list[str]:
        """Return the code files that the run used in another version than `code_commit` has."""
        return _changed_code(self.code_commit, self.stages)

    def outs(self, stage: str) -> dict[str, str]:
        """Return the MD5 of each output of a stage, by path."""
        return {out["path"]: out["md5"] for out in self.stages.get(stage, {}).get("outs", [])}


def find_record(name: str) -> RunRecord:
    """Return the record of a run.

    Args:
        name: a git revision, a DVC experiment, the id of an MLflow run, or an exported adapter file.

    Raises:
        ValueError: `name` is unknown or has no record; the error names the remedy.
        ConnectionError: MLflow cannot be reached, or does not have the run.
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
        f"{name!r} is not a git revision, DVC experiment, MLflow run id or adapter file. "
        "`git log`, `dvc exp list --all-commits` and `make ui` list them; `git fetch` and `dvc exp pull` "
        "download those of others"
    )


def _record_of_commit(commit: str, origin: str) -> RunRecord:
    """Return the record that a commit holds."""
    files = read_record(partial(text_at, commit))
    if not {paths.LOCK, paths.PARAMS} <= files.keys():
        raise ValueError(
            f"{origin} has no {paths.LOCK}, which records a run's results. After `dvc repro`, commit "
            f"{paths.LOCK}, {paths.PARAMS} and {paths.REPORTS}/; or name an experiment, an MLflow run or the "
            f"adapter file in {paths.EXPORT}/"
        )
    return RunRecord(origin, commit, files)


def _record_of_run(run_id: str) -> RunRecord:
    """Return the record that MLflow keeps with a run."""
    with TemporaryDirectory() as folder:
        files = read_record(reader(download_record(run_id, Path(folder))))
    if paths.LOCK not in files:
        raise ValueError(
            f"MLflow run {run_id} has no {paths.LOCK}, because it ended before `track_run`: name a run that "
            "finished"
        )
    return _with_code_commit(f"MLflow run {run_id}", files, None)


def record_of_adapter(path: Path) -> RunRecord:
    """Return the record of the training that an adapter's header names, from the workspace or else a commit.

    Raises:
        ValueError: the file is missing, not an exported adapter, or its training is recorded nowhere here.
    """
    if not path.is_file():
        raise ValueError(
            f"{path} not found: `dvc pull {paths.EXPORT}` downloads the adapter of the current dvc.lock"
        )
    require_safetensors(path)
    facts = read_lineage(path)
    digest = facts.get("dvc.train_lora")
    if digest is None:
        raise ValueError(
            f"{path} does not say what it was trained on: use a file of {paths.EXPORT}/, from export_lora"
        )
    present = read_record(reader(Path()))
    if _training_digest_of(present) == digest:
        return _with_code_commit(f"{path.name}, recorded in the workspace", present, facts.get("git.commit"))
    for commit in commits_with(paths.LOCK):
        files = read_record(partial(text_at, commit))
        if _training_digest_of(files) == digest:
            return RunRecord(f"{path.name}, recorded in commit {commit[:12]}", commit, files)
    raise ValueError(
        f"no {paths.LOCK} of the workspace, a commit or an experiment records the training of {path}: "
        "`git fetch` or `dvc exp pull` the one that does"
    )


def _with_code_commit(origin: str, files: _Texts, head: str | None) -> RunRecord:
    """Return a record whose files come from outside git, with the commit that has its code.

    That is the recorded head, unless the code was committed later: then the newest commit that changed
    dvc.lock and has every code file by the MD5 in the record. If none has, it is the head after all, and
    `RunRecord.changed_code` tells.

    Args:
        head: the commit that was checked out when the run ended; None: read it from the record's lineage.

    Raises:
        ValueError: the head is not in this repository.
    """
    stages = locked_stages(files[paths.LOCK])
    facts = yaml.safe_load(files.get(paths.LINEAGE, "{}"))
    named = head or str(facts.get(f"{PREFIX}git.commit", ""))
    commit = rev_parse(named)
    if commit is None:
        raise ValueError(
            f"{origin} was made at commit {named or '(unknown)'}, which is not in this repository: "
            "`git fetch` it"
        )
    if _changed_code(commit, stages):
        fitting = (other for other in commits_with(paths.LOCK) if not _changed_code(other, stages))
        commit = next(fitting, commit)
    return RunRecord(origin, commit, files)


def _changed_code(commit: str, stages: LockedStages) -> list[str]:
    """Return the code files of all stages in dvc.lock whose MD5 is not that of a commit."""
    used = {
        dep["path"]: dep["md5"]
        for entry in stages.values()
        for dep in entry.get("deps", [])
        if dep["path"].startswith(_CODE)
    }
    found = md5_at(commit, used)
    return sorted(path for path, digest in used.items() if found.get(path) != digest)


def read_record(read: Callable[[Path], str | None]) -> dict[Path, str]:
    """Return the files of a record that exist, except reports that differ from their MD5 in dvc.lock.

    Such a report was edited, or committed at another time than dvc.lock, and belongs to another run.

    Args:
        read: returns the text of a file, or None if it does not exist.
    """
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
    """Return a function that reads files below `folder`."""

    def read(path: Path) -> str | None:
        return (folder / path).read_text(encoding="utf-8") if (folder / path).is_file() else None

    return read


def _training_digest_of(files: _Texts) -> str | None:
    """Return the digest that identifies the record's training; None if train_lora has not run."""
    entry = locked_stages(files.get(paths.LOCK, "")).get("train_lora")
    return None if entry is None else entry_digest(entry)


def _md5_of(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
