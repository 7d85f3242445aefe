"""docs/architecture.md must be true: its picture, and the files that it names."""

import re

from tests.support.architecture import DOCUMENT, PICTURE, REPOSITORY, layers, picture

LIBRARY = REPOSITORY / "src/sdxl_lora"


def test_picture_is_that_of_the_pipeline_and_the_import_contract() -> None:
    found = PICTURE.search(DOCUMENT.read_text())
    assert found is not None
    assert found.group() == picture(), "run `python -m tests.support.architecture`"


def test_every_package_stands_in_the_contract() -> None:
    packages = {path.parent.name for path in LIBRARY.glob("*/__init__.py")}
    assert packages == {name for layer in layers() for name in layer}


def test_files_that_the_page_names_exist() -> None:
    names = re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py)`", DOCUMENT.read_text())
    assert len(names) > 30
    missing = [name for name in names if not any(LIBRARY.glob(f"**/{name}"))]
    assert not missing
