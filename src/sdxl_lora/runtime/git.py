"""Queries to git: revisions, DVC's experiments, and files as they were in a commit."""

import hashlib
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def _run_git(*arguments: str) -> str | None:
    """Return what a git command prints, without newlines at its ends; None if it fails."""
    output = _git_output(*arguments)
    return None if output is None else output.decode("utf-8", "replace").strip("\n")


def _git_output(*arguments: str) -> bytes | None:
    """Return the bytes that a git command prints; None if it fails."""
    result = subprocess.run(["git", *arguments], capture_output=True, check=False)
    return result.stdout if result.returncode == 0 else None


def rev_parse(revision: str) -> str | None:
    """Return the commit that a revision means; None if this repository does not have it."""
    # --end-of-options: the revision may come from a user or a file's header, and start with a dash.
    return _run_git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")


def head_commit() -> str:
    """Return the commit that is checked out; empty outside a repository or before its first commit."""
    return _run_git("rev-parse", "HEAD") or ""


def experiments() -> dict[str, str]:
    """Return the commits of DVC's experiments by name, newest first."""
    # DVC keeps an experiment as refs/exps/<2 digits of its baseline>/<the rest>/<name>.
    form = "--format=%(refname:lstrip=4) %(objectname)"
    found: dict[str, str] = {}
    for line in (
        _run_git("for-each-ref", "--sort=-committerdate", form, "refs/exps/*/*/*") or ""
    ).splitlines():
        name, commit = line.split(" ")
        found.setdefault(name, commit)  # names are unique per baseline only: the newest wins
    return found


def commits_with(path: Path) -> list[str]:
    """Return all commits that changed the file, including experiments, newest first."""
    return (_run_git("log", "--all", "--format=%H", "--", str(path)) or "").splitlines()


def text_at(revision: str, path: Path) -> str | None:
    """Return the text of a file, relative to the current folder, in a revision; None if it is not there."""
    content = _git_output("show", f"{revision}:./{path.as_posix()}")
    return None if content is None else content.decode("utf-8")


def md5_at(revision: str, files: Iterable[str]) -> dict[str, str]:
    """Return the MD5 of those of `files` that a revision has, by path. DVC identifies files by MD5."""
    listed = (_run_git("ls-tree", "-r", revision, "--", *files) or "").splitlines()
    entries = (line.split("\t", 1) for line in listed)  # "<mode> <type> <object>", tab, "<path>"
    return {path: _blob_md5(entry.split()[2]) for entry, path in entries}


@cache  # commits share most of their blobs, and each costs a process
def _blob_md5(blob: str) -> str:
    content = subprocess.run(["git", "cat-file", "blob", blob], capture_output=True, check=True).stdout
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
