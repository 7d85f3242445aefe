"""Selects a recipe: copies recipes/<name>.yaml over params.yaml, and never loses an edit of it.

A recipe is a complete params file. Files with the same values and comments count as equal, since DVC writes
params.yaml in a form of its own. Run `python -m sdxl_lora.cli.recipe --help` from the project's root.
"""

import argparse
import re
import sys
from difflib import get_close_matches, unified_diff
from pathlib import Path

import yaml

from sdxl_lora.config import load_params
from sdxl_lora.paths import PARAMS, RECIPES
from sdxl_lora.runtime.git import experiments, text_at

BACKUP = PARAMS.with_suffix(".yaml.orig")


def _recipes() -> dict[str, Path]:
    """The params files in recipes/, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def _find_recipe(name: str) -> Path:
    """The file of a recipe, once it fits the schema.

    Raises:
        FileNotFoundError: there is no such recipe; lists those that exist.
        ValueError: it does not fit the schema.
    """
    known = _recipes()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise FileNotFoundError(f"there is no recipe `{name}`{hint}\n{listing()}")
    load_params(known[name])
    return known[name]


def listing() -> str:
    """A line a recipe: its name, a star if params.yaml is a copy of it, and what its first comment says."""
    names = [f"{name}{' *' if _is_copy_of(path) else ''}" for name, path in _recipes().items()]
    width = max((len(name) for name in names), default=0)
    lines = [
        f"  {name:{width}}  {_first_comment(path)}"
        for name, path in zip(names, _recipes().values(), strict=True)
    ]
    return "\n".join([f"Recipes (* is what {PARAMS} is now):", *lines])


def _first_comment(path: Path) -> str:
    """The comment that opens a recipe."""
    return path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _is_copy_of(recipe: Path) -> bool:
    """Whether params.yaml says what `recipe` says."""
    return PARAMS.is_file() and _content(PARAMS.read_text(encoding="utf-8")) == _content(
        recipe.read_text(encoding="utf-8")
    )


def _content(text: str) -> tuple[object, list[str]]:
    """What a params file says, whatever its form: its values, and its comments in their order.

    The text of a file that is no YAML counts as its only value.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = text
    return values, re.findall(r"(?:^|\s)#\s*(.*?)\s*$", text, re.MULTILINE)


def _way_back() -> str | None:
    """The command that brings the present params.yaml back; None if it has edits that nothing else holds."""
    if not PARAMS.is_file():
        return f"git checkout {PARAMS}"
    present = _content(PARAMS.read_text(encoding="utf-8"))

    def is_held_by(revision: str) -> bool:
        committed = text_at(revision, PARAMS)
        return committed is not None and _content(committed) == present

    if is_held_by("HEAD"):
        return f"git checkout {PARAMS}"
    name = next((name for name, path in _recipes().items() if _is_copy_of(path)), None)
    if name is not None:
        return f"make recipe NAME={name}"
    experiment = next((name for name, commit in experiments().items() if is_held_by(commit)), None)
    return experiment and f"dvc exp apply {experiment}"


def _difference(before: str, after: str, recipe: Path) -> str:
    """A unified diff of two params files, a line of context around each change."""
    lines = unified_diff(
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        fromfile=f"{PARAMS} (before)",
        tofile=str(recipe),
        n=1,
    )
    return "".join(lines)


def select(name: str, force: bool = False) -> str:
    """Makes params.yaml a copy of a recipe and says what changed and how to go back.

    Args:
        force: also replace a params.yaml whose edits nothing else holds; it is kept as params.yaml.orig.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it does not fit the schema, or params.yaml has edits that would be lost.
    """
    recipe = _find_recipe(name)
    if _is_copy_of(recipe):
        return f"{PARAMS} is the recipe `{name}` already."
    back = _way_back()
    before = PARAMS.read_text(encoding="utf-8") if PARAMS.is_file() else ""
    after = recipe.read_text(encoding="utf-8")
    changes = _difference(before, after, recipe)
    if back is None:
        if not force:
            raise ValueError(
                f"{PARAMS} has edits that are neither committed nor part of a recipe or an experiment; "
                f"the recipe `{name}` would replace them:\n{changes}"
                f"Commit them, copy {PARAMS} to {RECIPES}/<new name>.yaml, or replace them all the same with "
                f"`make recipe NAME={name} FORCE=1`, which keeps the old file as {BACKUP}"
            )
        BACKUP.write_text(before, encoding="utf-8")
        back = f"cp {BACKUP} {PARAMS}"
    PARAMS.write_text(after, encoding="utf-8")
    return f"{changes}\n{PARAMS} is now the recipe `{name}`. To go back: {back}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sdxl_lora.cli.recipe",
        description="Copy a recipe over params.yaml, show the difference, and say how to go back.",
        epilog="`make recipe NAME=demo` does the same.",
    )
    parser.add_argument("name", nargs="?", help="a file of recipes/ without .yaml; none: list them")
    parser.add_argument("--force", action="store_true", help=f"replace edits too; they are kept in {BACKUP}")
    arguments = parser.parse_args()
    if arguments.name is None:
        print(listing())
        return
    try:
        print(select(arguments.name, arguments.force))
    except (ValueError, OSError) as error:
        sys.exit(f"recipe: {error}")


if __name__ == "__main__":
    main()
