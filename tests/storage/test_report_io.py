import csv
from pathlib import Path

import pytest

from sdxl_lora.storage.report_io import read_numbers, write_numbers, write_table


def test_table_has_the_columns_asked_for_in_their_order(tmp_path: Path) -> None:
    write_table(tmp_path / "new/a.csv", [{"b": 1, "a": 'x, "y"'}, {"a": "z\nz", "b": -0.5}], ["a", "b"])
    with (tmp_path / "new/a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"a": 'x, "y"', "b": "1.0"}, {"a": "z\nz", "b": "-0.5"}]


@pytest.mark.parametrize("text", ['=HYPERLINK("http://x")', "+1", "-1", "@SUM(A1)", "\t=1"])
def test_captions_cannot_be_formulas(tmp_path: Path, text: str) -> None:
    write_table(tmp_path / "a.csv", [{"caption": text}], ["caption"])
    with (tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"caption": f"'{text}"}]


def test_numbers_come_back_and_missing_ones_name_the_stage(tmp_path: Path) -> None:
    write_numbers(tmp_path / "a.json", {"group": {"value": 0.5}})
    assert read_numbers(tmp_path / "a.json", "train_lora") == {"group": {"value": 0.5}}
    with pytest.raises(FileNotFoundError, match="dvc repro train_lora"):
        read_numbers(tmp_path / "b.json", "train_lora")
