"""dvc.lock: what DVC noted of each stage when it ran, its code, params, inputs and results by their MD5."""

from pathlib import Path
from typing import Any

import yaml

LockedStages = dict[str, dict[str, Any]]


def locked_stages(text: str) -> LockedStages:
    """The entries of a dvc.lock by stage; none if it is empty, as a full disk leaves it."""
    stages: LockedStages = (yaml.safe_load(text) or {}).get("stages", {})
    return stages


def read_lock(path: Path) -> LockedStages:
    """The entries of a file; none if there is none, as before the first stage has run."""
    return locked_stages(path.read_text(encoding="utf-8")) if path.is_file() else {}
