"""Every package that the library or a stage imports is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
OURS = {"sdxl_lora", "stages"}


def declared_packages() -> set[str]:
    """Return the names of all dependencies, optional ones included, normalized."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normalized(re.split(r"[^\w.-]", line)[0]) for group in groups for line in group}


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the top-level name of each module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_every_imported_package_is_declared() -> None:
    files = [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "stages").glob("*.py")]
    modules = {module for file in files for module in imported_modules(file)}
    packages, declared = packages_distributions(), declared_packages()
    foreign = modules - sys.stdlib_module_names - OURS - {"_typeshed"}
    assert {"torch", "yaml", "PIL"} <= foreign
    undeclared = {
        module
        for module in foreign
        if not {normalized(name) for name in packages.get(module, [module])} & declared
    }
    assert undeclared == set()
