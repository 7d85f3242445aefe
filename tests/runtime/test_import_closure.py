"""The import closure and the digest of code, on a small project in a folder."""

from pathlib import Path
from textwrap import dedent

import pytest

from sdxl_lora.runtime import import_closure as subject
from sdxl_lora.runtime.import_closure import code_digest, import_closure


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the repository: stage `stages.run`, package `lib`."""
    monkeypatch.setattr(subject, "REPOSITORY", tmp_path)
    write(tmp_path, "stages/__init__.py", "import os\nos.environ['A'] = '1'\n")
    write(tmp_path, "stages/run.py", "from lib import a\nimport json\n")
    write(tmp_path, "src/lib/__init__.py", '"""A package without code."""\n')
    write(tmp_path, "src/lib/a.py", "import lib.b\n")
    write(tmp_path, "src/lib/b.py", "def f(x):\n    return x + 1\n")
    write(tmp_path, "src/lib/c.py", "")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.usefixtures("project")
def test_closure_holds_what_is_imported_and_nothing_else() -> None:
    assert import_closure("stages.run") == ["lib.a", "lib.b", "stages.__init__", "stages.run"]


@pytest.mark.parametrize(
    "text",
    [
        "import lib.c",
        "import lib.c as other",
        "from lib import c",
        "from lib.c import anything",
        "from .c import anything",
        "from . import c",
        "def f():\n    from lib import c",
        "try:\n    import lib.c\nexcept ImportError:\n    pass",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lib.c",
    ],
)
def test_import_counts_wherever_it_stands(project: Path, text: str) -> None:
    write(project, "src/lib/b.py", text)
    assert "lib.c" in import_closure("stages.run")


def test_package_counts_once_it_has_code(project: Path) -> None:
    write(project, "src/lib/__init__.py", '"""A package with code."""\nfrom lib import c\n')
    assert {"lib.__init__", "lib.c"} <= set(import_closure("lib.b"))


def test_modules_that_import_each_other_are_found(project: Path) -> None:
    write(project, "src/lib/b.py", "from lib import a, c")
    assert import_closure("lib.b") == ["lib.a", "lib.b", "lib.c"]


@pytest.mark.parametrize(
    ("without", "found"),
    [
        ("lib.b", ["lib.a", "stages.__init__", "stages.run"]),
        ("lib.a", ["stages.__init__", "stages.run"]),
        ("lib", ["stages.__init__", "stages.run"]),
        ("stages.__init__", ["lib.a", "lib.b", "stages.run"]),
    ],
)
@pytest.mark.usefixtures("project")
def test_search_stops_at_modules_that_are_left_out(without: str, found: list[str]) -> None:
    assert import_closure("stages.run", without={without}) == found


@pytest.mark.usefixtures("project")
def test_root_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"lib\.d is not a module below"):
        import_closure("lib.d")


CODE = '''
"""A module."""

from dataclasses import dataclass

LIMIT = 3
"""Of something."""


@dataclass(frozen=True)
class Point:
    """A point."""

    x: int = 1
    y: int = 2


def f(point: Point, *, scale: float = 1.0) -> str:
    """Return something."""
    total = (point.x + point.y) * scale  # a comment
    return f"{total:{LIMIT}.2f} of {'a'}"
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a comment", "another comment"),
        ('"""A module."""', '"""Another\n\ntext."""'),
        ('    """Return something."""\n', ""),
        ('"""Of something."""', '"""Of something else."""'),
        ('    """A point."""\n\n', ""),
        ("(point.x + point.y) * scale", "(\n        (point.x + point.y)\n        * scale\n    )"),
        ("{'a'}", "{u'a'}"),
        ("LIMIT = 3", "LIMIT = 0x3"),
    ],
)
def test_digest_is_blind_to_comments_docstrings_and_formatting(project: Path, old: str, new: str) -> None:
    assert edited(project, old, new) == edited(project, "", "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("point.x + point.y", "point.x - point.y"),
        ("point.x + point.y) * scale", "point.x + point.y * scale)"),
        ("LIMIT = 3", "LIMIT = 3.0"),
        ("x: int = 1", "x: int = True"),
        ("x: int = 1", "x: float = 1"),
        ("x: int = 1\n    y: int = 2", "y: int = 2\n    x: int = 1"),
        ("frozen=True", "frozen=False"),
        ("*, scale", "scale"),
        (".2f} of", ".3f} of"),
        ("} of {", "} off {"),
    ],
)
def test_digest_changes_with_the_code(project: Path, old: str, new: str) -> None:
    assert edited(project, old, new) != edited(project, "", "")


def edited(project: Path, old: str, new: str) -> str:
    """Return the digest of CODE with one thing replaced."""
    assert not old or CODE.count(old) == 1
    write(project, "src/lib/c.py", CODE.replace(old, new) if old else CODE)
    return code_digest(["lib.c"])


def test_digest_changes_with_the_modules_name_and_not_with_their_order(project: Path) -> None:
    write(project, "src/lib/c.py", dedent((project / "src/lib/b.py").read_text()))
    assert code_digest(["lib.b"]) != code_digest(["lib.c"])
    assert code_digest(["lib.a", "lib.b"]) == code_digest(["lib.b", "lib.a"])
