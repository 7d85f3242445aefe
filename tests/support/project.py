"""A copy of the project in a git and DVC repository of its own, and commands as a user runs them there."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]
COPIED = (".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml", "recipes", "src", "stages")
TIMEOUT = patience(60)  # seconds that a command may take
# A stage must not see what the command that runs the tests set for its own children.
FOREIGN = ("DVC_ROOT", "DVC_EXP_NAME", "MLFLOW_TRACKING_URI", "MAKEFLAGS", "HF_ENDPOINT", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Project:
    """A working copy at `root`."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the process's own."""

    def run(self, *command: str) -> str:
        """What a command prints, both streams together; it must succeed."""
        result = self.attempt(*command)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            **self.environment,
        }
        # A file and no pipe: DVC's queue leaves workers behind that would keep a pipe open.
        with TemporaryFile("w+", encoding="utf-8") as output:
            result = subprocess.run(
                command,
                cwd=self.root,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, result.returncode, stdout=output.read())

    def dvc(self, *arguments: str) -> str:
        return self.run("dvc", *arguments)

    def git(self, *arguments: str) -> str:
        return self.run("git", "-c", "user.name=Test", "-c", "user.email=test@localhost", *arguments)

    def read(self, path: str) -> Any:
        """A YAML or JSON file."""
        return yaml.safe_load((self.root / path).read_text(encoding="utf-8"))


def create_project(
    root: Path,
    params: dict[str, Any],
    environment: dict[str, str] | None = None,
    change_stages: Callable[[dict[str, Any]], None] | None = None,
) -> Project:
    """Copies the project to `root`, with these params, and commits it.

    Args:
        change_stages: edits the stages of dvc.yaml in place.
    """
    for name in COPIED:
        source, target = REPOSITORY / name, root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    project = Project(root, environment or {})
    pipeline = project.read("dvc.yaml")
    if change_stages is not None:
        change_stages(pipeline["stages"])
    for name, content in {"dvc.yaml": pipeline, "params.yaml": params}.items():
        (root / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    project.git("init", "--quiet", "--initial-branch=main")
    project.git("add", "--all")
    project.git("commit", "--quiet", "--message=start")
    return project
