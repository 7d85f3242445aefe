import hashlib
from collections import Counter
from pathlib import Path

import pytest

from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import Example, data_digest
from sdxl_lora.data.encoding_report import EncodingReport, ImageFinding
from sdxl_lora.reporting.dataset_card import dataset_card

CONFIG = load_params(Path("recipes/demo.yaml")).encoding
SOURCE = {
    "repository": "owner/name",
    "requested_revision": "main",
    "revision": "a" * 40,
    "licence": ["mit", "cc-by-4.0"],
    "examples": 5,
}
EXAMPLES = [
    Example("0", "0.png", "a man", "train", "train-00000.safetensors", 0, "d0"),
    Example("1", "1.png", "a dog", "train", "train-00000.safetensors", 1, "d1"),
    Example("2", "2.png", "a fox", "held_out", "held_out-00000.safetensors", 0, "d2"),
]
FINDINGS = [
    ImageFinding("3.png", "damaged", True, "image file is truncated"),
    ImageFinding("4.png", "damaged", True, "image file is truncated"),
    ImageFinding("0.png", "upscaled", False, "enlarged 2 times"),
]


@pytest.fixture
def card(tmp_path: Path) -> str:
    (tmp_path / "train-00000.safetensors").write_bytes(b"tensors")
    encoded_sizes = Counter([(128, 128), (96, 160), (96, 160)])
    report = EncodingReport(FINDINGS, EXAMPLES, [(64, 100), (200, 100), (300, 500)], encoded_sizes)
    return dataset_card(SOURCE, report, CONFIG, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "| repository | owner/name |",
        f"| revision | {'a' * 40} |",
        "| revision asked for | main |",
        "| licence | mit, cc-by-4.0 |",
        "| downloaded | 5 |",
        "| trained on | 2 |",
        "| held out | 1 |",
        "| images left out: damaged | 2 |",
        "| images flagged: upscaled | 1 |",
        "| original width: least, median, most | 64, 200, 300 |",
        "| original height: least, median, most | 100, 100, 500 |",
        "| aspect ratios, crop | square, center |",
        "| mirrored as well | no |",
        "| encoded at 96 x 160 | 2 |",
        "| encoded at 128 x 128 | 1 |",
        f"| train | {data_digest(EXAMPLES[:2])} |",
        f"| held_out | {data_digest(EXAMPLES[2:])} |",
        f"| both | {data_digest(EXAMPLES)} |",
        f"| train-00000.safetensors | 7 bytes, sha256 {hashlib.sha256(b'tensors').hexdigest()} |",
    ],
)
def test_card_says(card: str, line: str) -> None:
    assert line in card.splitlines()


def test_licence_that_nobody_stated_is_not_made_up(tmp_path: Path) -> None:
    report = EncodingReport(FINDINGS, EXAMPLES, [(64, 100)])
    card = dataset_card({**SOURCE, "licence": None}, report, CONFIG, tmp_path)
    assert "| licence | not stated by the source |" in card


def test_text_of_others_cannot_leave_its_cell(tmp_path: Path) -> None:
    report = EncodingReport(FINDINGS, EXAMPLES, [(64, 100)])
    hostile = "a | b\n<script>`x`[y](https://z)"
    card = dataset_card({**SOURCE, "repository": hostile}, report, CONFIG, tmp_path)
    assert r"| repository | a \| b &lt;script&gt;\`x\`\[y\](https:\//z) |" in card.splitlines()
