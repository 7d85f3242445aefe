"""DVC as this project asks it: its command line, its cache, and whether its remote can be written.

The command line is the public interface to most of that: `dvc.api`, in Python, only reads tracked data.
"""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

_OF_ANOTHER_PROJECT = (
    "DVC_ROOT",
    "DVC_STAGE",
    "DVC_EXP_NAME",
    "DVC_EXP_BASELINE_REV",
    "MLFLOW_TRACKING_URI",
)
"""Variables of the DVC command that may run this process. By them, stages of a clone would write into that
command's project, or show the clone's run on its tracking server."""


def dvc_environment(project: Path) -> dict[str, str]:
    """Return the variables with which a command uses this interpreter's packages and `project`'s library."""
    inherited = {name: value for name, value in os.environ.items() if name not in _OF_ANOTHER_PROJECT}
    first = {"PATH": [Path(sys.executable).parent], "PYTHONPATH": [project / "src", project]}
    return inherited | {
        name: os.pathsep.join([*map(str, places), *filter(None, [inherited.get(name)])])
        for name, places in first.items()
    }


def run_dvc(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a DVC command in `project`; return its status, and what it printed, as text."""
    command = ["dvc", *arguments]
    environment = dvc_environment(project.absolute())
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def cache_folder(project: Path) -> Path | None:
    """Return the folder of DVC's cache; None if `project` is not a DVC project."""
    result = run_dvc(project, "cache", "dir")
    return Path(result.stdout.strip()) if result.returncode == 0 else None


def cached_folder_digests(digest: str) -> set[str] | None:
    """Return the MD5 of each file in a folder that dvc.lock knows by `digest`; None if not in the cache.

    Reads the cache alone: `dvc.api.DVCFileSystem` would ask the remote for a list that the cache lacks. The
    layout is documented under "Structure of the cache directory" on dvc.org, in "Internal files".

    Args:
        digest: hash of the folder, `<MD5>.dir`.
    """
    cache = cache_folder(Path())
    listing = None if cache is None else cache / "files/md5" / digest[:2] / digest[2:]
    if listing is None or not listing.is_file():
        return None
    return {entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8"))}


def write_to_remote(project: Path) -> str:
    """Write an empty file to the default remote and delete it; return the remote's name.

    Goes through DVC's own objects, which are not public (pyproject.toml limits DVC's version): no command
    writes to a remote and cleans up. `dvc status --cloud` only reads, and asks nothing before the first
    run. `dvc push` would leave its file there.

    Raises:
        DvcException, OSError: there is no remote, or it refuses.
    """
    from dvc.repo import Repo  # 0.4 s, of which nothing else here has a use

    with Repo(str(project)) as repository:
        name: str = repository.config["core"].get("remote")
        remote = repository.cloud.get_remote(name)
        path = remote.fs.join(remote.path, f"doctor-{uuid.uuid4().hex}")
        remote.fs.makedirs(remote.path, exist_ok=True)
        remote.fs.pipe_file(path, b"")
        remote.fs.remove(path)
    return name
