from pathlib import Path

import pytest

from tests.support.elsewhere import NUMERICAL, Variation, find_files, run, variations

TESTS = """
import os

import pytest


def test_that_passes():
    assert os.environ.get("KERNELS") == "old"


def test_that_fails():
    assert 1 + 1 == 3


@pytest.mark.skip
def test_that_is_skipped():
    pass
"""


def test_every_numerical_file_is_there() -> None:
    assert len(find_files(NUMERICAL)) == len(set(NUMERICAL))
    with pytest.raises(FileNotFoundError, match=r"nothing not found: correct NUMERICAL"):
        find_files(["nothing"])


def test_names_of_variations_differ_and_an_interpreter_adds_one() -> None:
    names = [variation.name for variation in variations(["/usr/bin/python3"])]
    assert len(set(names)) == len(names) > 8
    assert names[-1] == "/usr/bin/python3"


def test_run_counts_the_tests_of_its_environment_and_names_those_that_fail(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    outcome = run(Variation("old", {"KERNELS": "old"}), [str(tmp_path / "test_it.py")])
    assert (outcome.passed, outcome.skipped) == (1, 1)
    assert [name.rpartition("::")[2] for name in outcome.failed] == ["test_that_fails"]


def test_run_without_tests_is_a_failure(tmp_path: Path) -> None:
    assert run(Variation("as it is"), [str(tmp_path / "test_missing.py")]).failed
