"""What git keeps of the project: revisions, DVC's experiments, and files as they were."""

import hashlib
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def _run_git(*arguments: str) -> str | None:
    """What a git command prints, without the line's end; None if it fails."""
    result = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return result.stdout.decode("utf-8", "replace").strip("\n") if result.returncode == 0 else None


def rev_parse(revision: str) -> str | None:
    """The commit that a revision stands for; None if there is none in this repository."""
    return _run_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")


def head_commit() -> str:
    """Return the commit that is checked out; empty outside a repository."""
    return _run_git("rev-parse", "HEAD") or ""


def experiments() -> dict[str, str]:
    """The commits of DVC's experiments by their names, newest first."""
    form = "--format=%(refname:lstrip=4) %(objectname)"
    found: dict[str, str] = {}
    for line in (
        _run_git("for-each-ref", "--sort=-committerdate", form, "refs/exps/*/*/*") or ""
    ).splitlines():
        name, commit = line.split(" ")
        found.setdefault(name, commit)
    return found


def commits_with(path: Path) -> list[str]:
    """All commits that changed the file, experiments among them, newest first."""
    return (_run_git("log", "--all", "--format=%H", "--", str(path)) or "").splitlines()


def text_at(revision: str, path: Path) -> str | None:
    """A file of the present folder as it was; None if it was not there."""
    command = ["git", "show", f"{revision}:./{path.as_posix()}"]
    result = subprocess.run(command, capture_output=True, check=False)
    return result.stdout.decode("utf-8") if result.returncode == 0 else None


def md5_at(revision: str, files: Iterable[str]) -> dict[str, str]:
    """MD5 of those of `files` that were there, by path: what DVC knows a file by."""
    listed = (_run_git("ls-tree", "-r", revision, "--", *files) or "").splitlines()
    entries = (line.split("\t", 1) for line in listed)  # mode, kind and object, then the path
    return {path: _blob_md5(entry.split()[2]) for entry, path in entries}


@cache
def _blob_md5(blob: str) -> str:
    content = subprocess.run(["git", "cat-file", "blob", blob], capture_output=True, check=True).stdout
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
