"""Report files for people, DVC and MLflow: numbers as JSON, tables as CSV."""

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
    """Write a nested mapping of numbers as JSON, which DVC shows as metrics."""
    write_text(path, json.dumps(numbers, indent=2) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write rows as CSV with these columns, which DVC plots; text that looks like a formula is quoted."""
    write_text(path, pd.DataFrame(rows, columns=list(columns)).map(_as_text).to_csv(index=False))


def _as_text(value: object) -> object:
    """Prefix text that a spreadsheet would evaluate with an apostrophe (OWASP, "CSV Injection")."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def write_records(
    path: Path, kind: "type[DataclassInstance]", records: "Sequence[DataclassInstance]"
) -> None:
    """Write instances of one dataclass as CSV with its fields as columns; an empty list gives the header."""
    write_table(path, [asdict(record) for record in records], [field.name for field in fields(kind)])


def read_numbers(path: Path, stage: str) -> dict[str, object]:
    """Read a report of `write_numbers`.

    Args:
        stage: the stage that writes it, for the error message.

    Raises:
        FileNotFoundError: the report does not exist; names the stage to run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro {stage}` first")
    numbers: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return numbers


def flatten(tree: Mapping[str, Any], separator: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested mapping under joined keys: {"a": {"b": 1}} -> ("a/b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, separator, f"{prefix}{key}{separator}")
        else:
            yield f"{prefix}{key}", value
