"""The picture in docs/architecture.md: stages with the files that they pass on, and the library's layers.

`python -m tests.support.architecture` writes it from dvc.yaml and the import contract in pyproject.toml.
"""

import ast
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = REPOSITORY / "docs/architecture.md"
PICTURE = re.compile(r"(?<=```mermaid\n).*?(?=```)", re.DOTALL)
TOP_DOWN = "    direction TB"
EVERYWHERE = {"runtime", "storage"}  # every stage imports them
READERS_OF_ALL = ("export_lora", "report_run", "track_run")
"""Stages that read nearly all results: an arrow for each would hide the others."""


def pipeline_stages() -> dict[str, dict[str, object]]:
    """Return the stages of dvc.yaml, in order."""
    stages: dict[str, dict[str, object]] = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    return stages


def layers() -> list[list[str]]:
    """Return the packages of each layer of the import contract, from the top; without stages and modules."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    contract = next(contract for contract in contracts if contract["type"] == "layers")
    names = [[name.strip().rpartition(".")[2] for name in layer.split("|")] for layer in contract["layers"]]
    return [[name for name in layer if (REPOSITORY / "src/sdxl_lora" / name).is_dir()] for layer in names]


def packages_of(stage: str) -> list[str]:
    """Return the packages that a stage's script imports, from the top layer down."""
    tree = ast.parse((REPOSITORY / f"stages/{stage}.py").read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {
        parts[1] for module in modules if len(parts := module.split(".")) > 2 and parts[0] == "sdxl_lora"
    }
    return [name for layer in layers() for name in layer if name in found - EVERYWHERE]


def outputs(stage: dict[str, object]) -> set[str]:
    """Return the paths that a stage writes."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind) or ()]  # type: ignore[attr-defined]
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def picture() -> str:
    """Return the diagram in Mermaid's language."""
    stages = pipeline_stages()
    lines = [
        "flowchart LR",
        '  subgraph pipeline["dvc.yaml: stages, and the files that they pass on"]',
        TOP_DOWN,
    ]
    for name in stages:
        lines.append(f'    {name}["<b>{name}</b><br/>{", ".join(packages_of(name))}"]')
    earlier: list[str] = []
    for name, stage in stages.items():
        deps = set(stage["deps"])  # type: ignore[call-overload]
        if name in READERS_OF_ALL:
            lines.append(f"    {earlier[-1]} -->|all results| {name}")
        else:
            for source in earlier:
                if shared := sorted(deps & outputs(stages[source])):
                    lines.append(f"    {source} -->|{'<br/>'.join(shared)}| {name}")
        earlier.append(name)
    lines += ["  end", '  subgraph library["src/sdxl_lora: packages, imports point down"]', TOP_DOWN]
    rows = [layer for layer in layers() if layer]
    for upper, lower in pairwise(rows):
        lines.append(f"    {' & '.join(upper)} --> {' & '.join(lower)}")
    return "\n".join([*lines, "  end", "  pipeline ~~~ library", ""])


if __name__ == "__main__":
    DOCUMENT.write_text(PICTURE.sub(lambda _: picture(), DOCUMENT.read_text()))
