from pathlib import Path

import numpy as np
import pytest

from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.data.encoding_report import ImageFinding
from sdxl_lora.data.images import decode_image
from tests.support import bad_inputs
from tests.support.bad_inputs import CAPTIONS, DOCUMENT, CaptionCase, ImageCase

GOOD = bad_inputs.good_images()
BAD = [case for group in bad_inputs.image_cases().values() for case in group]
CASES = GOOD + BAD
NUMBERED = [pytest.param(number, case, id=case.name) for number, case in enumerate(CASES)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ImageFinding], set[str]]:
    """What was reported about all cases in one data set, and which images were encoded."""
    report, encoded = bad_inputs.encode_all(tmp_path_factory.mktemp("bad"), CASES)
    sides = [EncodedDataset(encoded, split) for split in ("train", "held_out")]
    return report.findings, {example.image for side in sides for example in side.examples}


@pytest.mark.parametrize(("number", "case"), NUMBERED)
def test_image_gets_what_it_should(
    results: tuple[list[ImageFinding], set[str]], number: int, case: ImageCase
) -> None:
    findings, encoded = results
    name = f"{number:03d}.img"
    own = [finding for finding in findings if finding.image == name]
    assert [finding.kind for finding in own] == ([case.kind] if case.kind else [])
    assert (name in encoded) == (case.becomes is not None)
    assert all(finding.left_out == (case.becomes is None) for finding in own)
    assert all(finding.detail for finding in own)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.becomes])
def test_unusual_image_becomes_what_a_viewer_shows(case: ImageCase) -> None:
    assert case.becomes is not None
    found, expected = decode_image(case.content), case.becomes
    assert (found.mode, found.size) == ("RGB", expected.size)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= case.tolerance


def test_all_good_pictures_are_encoded_beside_the_bad_ones(
    results: tuple[list[ImageFinding], set[str]],
) -> None:
    _, encoded = results
    assert {f"{number:03d}.img" for number in range(len(GOOD))} <= encoded


@pytest.mark.parametrize(
    ("number", "case"), [pytest.param(n, case, id=case.name) for n, case in enumerate(CAPTIONS)]
)
def test_caption_gets_what_it_should(number: int, case: CaptionCase) -> None:
    frame, report = bad_inputs.clean_all(CAPTIONS)
    cleaned = dict(zip(frame["image"], frame["caption"], strict=True))
    assert cleaned.get(str(number)) == case.clean
    rejected = {entry["image"] for entry in report.rejections}
    assert (str(number) in rejected) == (case.clean is None)


def test_page_says_what_happens_now() -> None:
    assert len(BAD) + len(CAPTIONS) >= 30
    assert Path(DOCUMENT).read_text(encoding="utf-8") == bad_inputs.document(), (
        "run `python -m tests.support.bad_inputs`"
    )
