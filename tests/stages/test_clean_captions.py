import csv
import json
from pathlib import Path

import pytest
import yaml

from sdxl_lora import paths
from stages import clean_captions


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with the demo's model, and three captions that can be kept."""
    (tmp_path / "demo").symlink_to(Path("demo").resolve())
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["captions"]["trigger"] = "emoji style"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    paths.RAW.mkdir(parents=True)


def write_captions(*captions: str) -> None:
    lines = [
        {"id": f"{number:064x}", "image": f"{number}.png", "caption": caption}
        for number, caption in enumerate(captions)
    ]
    paths.RAW_CAPTIONS.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def test_captions_and_their_report_are_written() -> None:
    write_captions(
        "an arafed man", "", "a red apple", "caf\u00c3\u00a9 caf\u00c3\u00a9 noir", "2 / 2001-01-01"
    )
    clean_captions.main()
    rows = [json.loads(line) for line in paths.CAPTIONS.read_text(encoding="utf-8").splitlines()]
    assert [(row["image"], row["caption"]) for row in rows] == [
        ("0.png", "emoji style, a man"),
        ("2.png", "emoji style, a red apple"),
        ("3.png", "emoji style, café noir"),
        ("4.png", "emoji style, 2 / 2001-01-01"),
    ]
    assert rows[0]["id"] == "0" * 64
    report = json.loads(paths.CAPTIONS_REPORT.read_text(encoding="utf-8"))
    assert (report["kept"], report["rejected"], report["changed"]) == (4, 1, 2)
    changes = list(csv.DictReader(paths.CAPTION_CHANGES.read_text(encoding="utf-8").splitlines()))
    assert [change["rules"] for change in changes] == ["artefacts", "unicode, repeated_words"]
    rejections = list(csv.DictReader(paths.CAPTION_REJECTIONS.read_text(encoding="utf-8").splitlines()))
    assert "<ins>caf\u00e9</ins> noir" in paths.CAPTION_PAGE.read_text(encoding="utf-8")
    assert rejections == [{"image": "1.png", "caption": "", "reason": "empty"}]


def test_missing_captions_name_the_stage_to_run() -> None:
    with pytest.raises(FileNotFoundError, match="dvc repro download_dataset"):
        clean_captions.main()
