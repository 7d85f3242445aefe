"""Small files for people, DVC and MLflow: numbers as JSON, tables as CSV."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sdxl_lora.storage.atomic_io import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write_numbers(path: Path, numbers: Mapping[str, object]) -> None:
    """A nested mapping of numbers as JSON, which DVC shows as metrics."""
    write_text(path, json.dumps(numbers, indent=2) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Rows as CSV with these columns, which DVC plots; no text can pass for a spreadsheet's formula."""
    write_text(path, pd.DataFrame(rows, columns=list(columns)).map(_as_text).to_csv(index=False))


def _as_text(value: object) -> object:
    """Puts an apostrophe before text that a spreadsheet would compute (OWASP, "CSV Injection")."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def write_records(
    path: Path, kind: "type[DataclassInstance]", records: "Sequence[DataclassInstance]"
) -> None:
    """Records of one dataclass as CSV with its fields as columns, also if there are none."""
    write_table(path, [asdict(record) for record in records], [field.name for field in fields(kind)])


def read_numbers(path: Path, stage: str) -> dict[str, object]:
    """What `write_numbers` wrote.

    Raises:
        FileNotFoundError: there is no such report; names the stage that writes it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro {stage}` first")
    numbers: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return numbers


def flatten(tree: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping under joined keys: {"a": {"b": 1}} -> ("a/b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value
