import re
from pathlib import Path

import pytest

from tests.support.faults import DOCUMENT, GROUPS, section
from tests.support.small_disks import needs_mounts
from tests.support.tracking_servers import PASSWORD

PAGE = DOCUMENT.read_text(encoding="utf-8")


@needs_mounts
@pytest.mark.parametrize("title", GROUPS)
def test_faults_cost_nothing_and_say_what_to_do(
    title: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faults = list(GROUPS[title](tmp_path))
    assert PASSWORD not in "".join(capfd.readouterr())
    for fault in faults:
        assert fault.lost == [], fault.name
        assert re.search(fault.remedy, fault.said), fault
    assert section(title, faults) in PAGE, "run `python -m tests.support.faults`"


def test_page_has_no_other_groups() -> None:
    assert re.findall("^## (.*)$", PAGE, re.MULTILINE) == list(GROUPS)
