"""dvc.lock: DVC's record of each stage's last run, with the MD5 of its code, inputs and outputs."""

from pathlib import Path
from typing import Any

import yaml

LockedStages = dict[str, dict[str, Any]]


def locked_stages(text: str) -> LockedStages:
    """Return the entries of a dvc.lock by stage; none for an empty text, which a full disk leaves."""
    stages: LockedStages = (yaml.safe_load(text) or {}).get("stages", {})
    return stages


def read_lock(path: Path) -> LockedStages:
    """Read the entries of a dvc.lock by stage; none if the file is missing, as before the first run."""
    return locked_stages(path.read_text(encoding="utf-8")) if path.is_file() else {}
