"""The code that each stage of dvc.yaml depends on: `make dvc-deps` writes it there."""

import re
from collections.abc import Iterator
from pathlib import Path

from sdxl_lora.runtime.import_closure import INERT, REPOSITORY, import_closure, source_file

DVC_YAML = REPOSITORY / "dvc.yaml"
CODE = (".py", ".jinja")


def code_behind(script: Path) -> set[str]:
    """Return the files of a stage's code and templates, relative to the repository; no inert ones."""
    files: set[Path] = set()
    for module in import_closure(f"stages.{script.stem}", without=INERT.keys()):
        file = source_file(module)
        assert file is not None
        files |= {file, *(file.parent / "templates").glob(f"{file.stem}.*.jinja")}
    return {file.relative_to(REPOSITORY).as_posix() for file in files}


def with_code_deps(text: str) -> str:
    """Return dvc.yaml's text with the code of every stage's `deps` as it is now, data first."""
    return "\n".join(_with_code_deps(text.split("\n")))


def _with_code_deps(lines: list[str]) -> Iterator[str]:
    code: list[str] = []  # of the stage at hand, until its `deps` have been written
    in_deps = False
    for line in lines:
        if in_deps and not line.startswith("      - "):
            yield from (f"      - {name}" for name in code)
            in_deps = False
        if stage := re.fullmatch(r"  (\w+):", line):
            script = REPOSITORY / "stages" / f"{stage[1]}.py"
            code = sorted(code_behind(script)) if script.is_file() else []
        if not in_deps or not line.endswith(CODE):
            yield line
        in_deps = in_deps or line == "    deps:"


def main() -> None:
    DVC_YAML.write_text(with_code_deps(DVC_YAML.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
