"""A data set as large as the default recipe's, with faults as collections have them: reports find all."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from sdxl_lora.data.encoded_dataset import EncodedDataset
from stages import clean_captions, download_dataset, encode_dataset
from tests.support.hub import Hub
from tests.support.naruto import write_naruto
from tests.support.patterns import pattern

REPOSITORY = Path(__file__).parents[2]
NARUTO = "lambdalabs/naruto-blip-captions"
COUNT = 1221
SIDE = 64
DUPLICATES = range(100, 1100, 100)  # each repeats the image before it
NEAR_DUPLICATES = range(150, 1150, 200)  # each is the image before it as a JPEG of another size
TRUNCATED = range(170, 1170, 200)
PEOPLE = ("a man", "a woman", "a boy", "an old man", "two people")
LOOKS = ("with black hair", "with pink hair", "in a red cloak", "in a forest", "with a sword", "on a roof")
DIRTY = {
    10: "arafed man with a red hat",
    11: "there is an arafed image of a fox",
    12: "an araffe woman with a sword",
    13: "a man in a hat in a hat in a hat",
    14: "a a boy with with a sword",
    15: "a caf\u00c3\u00a9 in the rain",
    16: "Naruto&#39;s friend in a forest",
    17: "a man  with   black hair",
    18: "a woman , smiling , in a cloak",
    19: "a fox\x00 in a forest",
    20: "a red car, a red car and a red car",
    21: "\u201ca man\u201d on a roof",
    22: "  a boy in the rain",
    23: "a girl in the rain\n",
    24: "cafe\u0301 at night",
    25: "",
    26: "arafed",
    27: "cat",
    28: "   ",
    29: None,
}


@dataclass(frozen=True)
class Results:
    """What the three stages reported about the data set, by position of the example in it."""

    findings: dict[str, set[int]]
    changed: set[int]
    rejected: set[int]
    numbers: dict[str, Any]


def saved(number: int, kind: str, size: tuple[int, int] = (SIDE, SIDE), **options: Any) -> bytes:
    buffer = io.BytesIO()
    pattern(number, size).save(buffer, kind, **options)
    return buffer.getvalue()


def image(number: int) -> bytes:
    if number in DUPLICATES:
        return saved(number - 1, "PNG")
    if number in NEAR_DUPLICATES:
        return saved(number - 1, "JPEG", (SIDE + 26, SIDE + 26), quality=85)
    content = saved(number, "PNG")
    return content[: len(content) // 2] if number in TRUNCATED else content


def caption(number: int) -> str | None:
    if number in DIRTY:
        return DIRTY[number]
    return f"{PEOPLE[number % 5]} {LOOKS[number % 6]}, number {number}"


def position(name: str) -> int:
    """Of an example in the data set; image files are named after it."""
    return int(name.split("-")[0])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture
def results(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    images = [image(number) for number in range(COUNT)]
    write_naruto(tmp_path / "naruto", [caption(number) for number in range(COUNT)], images)
    commit = hub.add(NARUTO, tmp_path / "naruto", "datasets").commit
    project = tmp_path / "project"
    project.mkdir()
    (project / "demo").symlink_to(REPOSITORY / "demo")
    params = yaml.safe_load((REPOSITORY / "recipes/sdxl-naruto-16gb.yaml").read_text(encoding="utf-8"))
    demo = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    params["download"]["revision"] = commit
    params["model"] = demo["model"] | {"text_encoders": "trained"}
    params["encoding"] |= {"resolution": SIDE, "vae_precision": "fp32", "text_precision": "fp32"}
    params["encoding"] |= {"batch_size": 16}
    monkeypatch.chdir(project)
    monkeypatch.setenv("DVC_ROOT", str(project))
    monkeypatch.setenv("SDXL_LORA_DEVICE", "cpu")
    paths.PARAMS.write_text(yaml.safe_dump(params), encoding="utf-8")
    for stage in (download_dataset, clean_captions, encode_dataset):
        stage.main()
    findings: dict[str, set[int]] = {}
    for finding in table(paths.IMAGE_FINDINGS):
        findings.setdefault(finding["kind"], set()).add(position(finding["image"]))
    return Results(
        findings,
        {position(row["image"]) for row in table(paths.CAPTION_CHANGES)},
        {position(row["image"]) for row in table(paths.CAPTION_REJECTIONS)},
        json.loads(paths.ENCODING_REPORT.read_text(encoding="utf-8")),
    )


def test_reports_find_every_fault_and_nothing_else(results: Results) -> None:
    assert results.findings["duplicate"] == set(DUPLICATES)
    assert results.findings["damaged"] == set(TRUNCATED)
    leaked = results.findings.get("leakage", set())
    near = results.findings["near_duplicate"] | leaked  # of a pair across the split, the held-out one
    assert sorted(number + (number not in NEAR_DUPLICATES) for number in near) == list(NEAR_DUPLICATES)
    assert results.findings.keys() <= {"duplicate", "damaged", "near_duplicate", "leakage"}
    assert results.changed | results.rejected == set(DIRTY)
    assert results.rejected == {25, 26, 27, 28, 29}
    sides = [EncodedDataset(paths.ENCODED, split) for split in ("train", "held_out")]
    kept = {position(example.image) for side in sides for example in side.examples}
    assert kept == set(range(COUNT)) - {*DUPLICATES, *TRUNCATED} - results.rejected - leaked
    assert results.numbers["left_out"] == len(DUPLICATES) + len(TRUNCATED) + len(leaked)
