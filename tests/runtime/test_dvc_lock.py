from pathlib import Path

import pytest

from sdxl_lora.runtime.dvc_lock import read_lock


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        (None, {}),
        ("", {}),  # as a full disk leaves it
        ("schema: '2.0'\nstages: {a: {cmd: x}}\n", {"a": {"cmd": "x"}}),
    ],
)
def test_entries_are_those_of_the_stages_that_ran(
    tmp_path: Path, text: str | None, stages: dict[str, object]
) -> None:
    if text is not None:
        (tmp_path / "dvc.lock").write_text(text)
    assert read_lock(tmp_path / "dvc.lock") == stages
