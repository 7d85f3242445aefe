"""`sdxl-lora recipe`: copies recipes/<name>.yaml to params.yaml, and loses no edit of it.

A recipe is a complete params file. Files with the same values and comments count as equal, because DVC
rewrites params.yaml in another form.
"""

import re
import subprocess
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

import yaml

from sdxl_lora.config import load_params
from sdxl_lora.paths import PARAMS, RECIPES
from sdxl_lora.runtime.git import experiments, text_at
from sdxl_lora.storage.atomic_io import write_text

BACKUP = PARAMS.with_suffix(".yaml.orig")


def run_recipe(name: str | None, force: bool) -> None:
    """Print the recipes, or select one and print what changed. Raises as `select`."""
    print(listing() if name is None else select(name, force))


def listing() -> str:
    """Return one line per recipe: its name, a star if params.yaml is a copy of it, and its first comment."""
    present = _content(_present_text())
    names = {name: f"{name} *" if _content(text) == present else name for name, text in _recipes().items()}
    width = max(map(len, names.values()), default=0)
    lines = [f"  {names[name]:{width}}  {_first_comment(text)}" for name, text in _recipes().items()]
    return "\n".join([f"Recipes (* is what {PARAMS} is now):", *lines])


def select(name: str, force: bool = False) -> str:
    """Make params.yaml a copy of a recipe, and return what changed and how to go back.

    Args:
        force: also replace a params.yaml with edits that exist nowhere else; keeps it as params.yaml.orig.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it does not fit the schema, or params.yaml has edits that would be lost.
    """
    recipe = _find_recipe(name)
    before, after = _present_text(), recipe.read_text(encoding="utf-8")
    if _content(before) == _content(after):
        return f"{PARAMS} is the recipe `{name}` already."
    changes = _difference(recipe)
    back = next((command for command, text in _copies() if _content(text) == _content(before)), None)
    if not PARAMS.is_file():
        back = f"git checkout {PARAMS}"
    if back is None:
        if not force:
            raise ValueError(
                f"{PARAMS} has edits that are neither committed nor part of a recipe or an experiment. "
                f"The recipe `{name}` would replace them:\n{changes}"
                f"Commit them, copy {PARAMS} to {RECIPES}/<new name>.yaml, or replace them with "
                f"`sdxl-lora recipe {name} --force`, which keeps the old file as {BACKUP}"
            )
        write_text(BACKUP, before)
        back = f"cp {BACKUP} {PARAMS}"
    write_text(PARAMS, after)
    return f"{changes}\n{PARAMS} is now the recipe `{name}`. To go back: {back}"


def _recipes() -> dict[str, str]:
    """Return the text of each params file in recipes/, by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(RECIPES.glob("*.yaml"))}


def _find_recipe(name: str) -> Path:
    """Return the file of a recipe that fits the schema.

    Raises:
        FileNotFoundError: there is no such recipe; lists those that exist.
        ValueError: it does not fit the schema.
    """
    if name not in (known := _recipes()):
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise FileNotFoundError(f"there is no recipe `{name}`{hint}\n{listing()}")
    path = RECIPES / f"{name}.yaml"
    load_params(path)
    return path


def _first_comment(text: str) -> str:
    """Return the comment that opens a recipe."""
    return text.partition("\n")[0].lstrip("# ")


def _present_text() -> str:
    """Return the text of params.yaml; empty if there is none."""
    return PARAMS.read_text(encoding="utf-8") if PARAMS.is_file() else ""


def _copies() -> Iterator[tuple[str, str]]:
    """Yield every text that params.yaml can be brought back to, after the command that does so."""
    yield f"git checkout {PARAMS}", text_at("HEAD", PARAMS) or ""
    for name, text in _recipes().items():
        yield f"sdxl-lora recipe {name}", text
    for name, commit in experiments().items():
        yield f"dvc exp apply {name}", text_at(commit, PARAMS) or ""


def _content(text: str) -> tuple[object, list[str]]:
    """Return what a params file says in whatever form: its values, and its comments in order.

    A text that is not YAML counts as its only value.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = text
    return values, re.findall(r"(?:^|\s)#\s*(.*?)\s*$", text, re.MULTILINE)


def _difference(recipe: Path) -> str:
    """Return git's diff from params.yaml to a recipe, with one line of context around each change."""
    before = PARAMS if PARAMS.is_file() else Path("/dev/null")
    command = ["git", "diff", "--no-index", "--no-color", "--no-ext-diff", "--unified=1"]
    files = [str(before), str(recipe)]
    result = subprocess.run([*command, *files], capture_output=True, encoding="utf-8", check=False)
    return result.stdout
