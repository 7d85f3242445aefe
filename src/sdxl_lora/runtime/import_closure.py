"""Which of the project's modules a module imports, and a hash of what they compute.

Keys of checkpoints and of encoded examples, and the `deps` of dvc.yaml, come from here. Files are parsed,
never executed. Imports by a computed name (`importlib.import_module`) are not seen: a test compares the
result with what Python imports.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Set
from functools import lru_cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[3]
_ROOTS = ("src", ".")  # of the library, and of the stages

INERT: dict[str, str] = {
    "sdxl_lora.config": "holds values, which keys and dvc.yaml name one by one",
    "sdxl_lora.paths": "says where files lie, not what is in them",
    "sdxl_lora.runtime.dvc_execution": "tells DVC's runs apart",
    "sdxl_lora.runtime.environment": "describes the machine for the record",
    "sdxl_lora.runtime.import_closure": "computes keys: if it changes, old entries are not found",
    "sdxl_lora.runtime.stage": "starts and ends a stage, and records how it ended",
    "sdxl_lora.tracking": "shows results in MLflow once they are there",
    "stages.__init__": "sets import path, logging and cuBLAS's workspace, which is in a training's key",
}
"""Modules and packages that cannot change a stage's result, and why. The search stops at them."""


def source_file(module: str) -> Path | None:
    """Return the file of a module, or a package's `__init__.py`; None unless it is part of this project."""
    for root in _ROOTS:
        path = REPOSITORY / root / Path(*module.split("."))
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def import_closure(*modules: str, without: Set[str] = frozenset()) -> list[str]:
    """Return the project's modules that `modules` import, directly or not, and themselves, sorted.

    Imports count anywhere in a file, also in functions (Triton's kernels are imported where they run) and for
    type checkers. A package counts, as `package.__init__`, if that file has code: Python runs it first.

    Args:
        modules: dotted names.
        without: modules and packages at which the search stops.

    Raises:
        ModuleNotFoundError: one of `modules` is not part of this project.
    """
    for module in modules:
        if source_file(module) is None:
            raise ModuleNotFoundError(f"{module} is not a module below {REPOSITORY}", name=module)
    found: set[str] = set()
    pending = [name for module in modules for name in _with_packages(module)]
    while pending:
        module = pending.pop()
        file = source_file(module)
        if file is None:
            continue
        is_package = file.name == "__init__.py"
        name = f"{module}.__init__" if is_package and not module.endswith(".__init__") else module
        if name in found or not without.isdisjoint(_with_packages(name)):
            continue
        tree = _parse(file.read_bytes())
        if not is_package or not all(map(_is_docstring, tree.body)):
            found.add(name)
        for imported in _imported_names(tree, name.rpartition(".")[0]):
            pending += _with_packages(imported)
    return sorted(found)


def code_digest(modules: Iterable[str]) -> str:
    """Return a hash of the code of `modules`, blind to comments, docstrings and formatting.

    Annotations count, since dataclasses and pydantic compute with them, and so do names of local variables. A
    version of Python that parses the code to another tree gives another digest. Versions 3.11 to 3.13 gave
    all files of this project the same.

    Args:
        modules: dotted names of modules of this project, such as `import_closure` returns.
    """
    digest = hashlib.sha256()
    for module in sorted(modules):
        file = source_file(module)
        assert file is not None, module
        digest.update(f"{module} {_code_digest(file.read_bytes())}\n".encode())
    return digest.hexdigest()


def _with_packages(module: str) -> list[str]:
    """Return `a`, `a.b` and `a.b.c` for `a.b.c`: importing it runs them in this order."""
    parts = module.split(".")
    return [".".join(parts[: number + 1]) for number in range(len(parts))]


def _imported_names(tree: ast.Module, package: str) -> Iterator[str]:
    """Yield dotted names of all that a file imports; some name a class or function, which is nobody's module.

    Args:
        package: the package that relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@lru_cache(maxsize=512)
def _parse(source: bytes) -> ast.Module:
    # By content, so that an edited file is read as it is now; parsing the library takes a second.
    return ast.parse(source)


@lru_cache(maxsize=512)
def _code_digest(source: bytes) -> str:
    return hashlib.sha256("".join(_dump(_parse(source))).encode()).hexdigest()


def _dump(value: object) -> Iterator[str]:
    """Yield a tree as text, as `ast.dump` does, in one form for all versions of Python.

    `ast.dump` writes empty fields until 3.12 and leaves them out from 3.13 on; 3.12 added `type_params`.
    """
    if isinstance(value, ast.AST):
        yield f"{type(value).__name__}("
        for name, field in ast.iter_fields(value):
            if isinstance(
                value, ast.JoinedStr
            ):  # 3.12 puts an empty string next to a nested format, f"{a:{b}}"
                field = [part for part in field if not (isinstance(part, ast.Constant) and part.value == "")]
            # `kind` is the u of u"text": formatting.
            if field is not None and field != [] and not (isinstance(value, ast.Constant) and name == "kind"):
                yield f"{name}="
                yield from _dump(field)
                yield ","
        yield ")"
    elif isinstance(value, list):
        yield "["
        for item in value:
            if not _is_docstring(item):
                yield from _dump(item)
                yield ","
        yield "]"
    else:
        yield repr(value)  # tells 1, 1.0 and True apart


def _is_docstring(node: object) -> bool:
    """Return whether `node` is a string that stands alone: a docstring, of fields as well."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
