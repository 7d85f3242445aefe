"""Selecting a recipe: what it changes, and that no edit is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lora.cli.recipe import BACKUP, listing, select
from tests.support.command import COMMAND

REPOSITORY = Path(__file__).parents[2]
DEFAULT = (REPOSITORY / "recipes" / "sdxl-naruto-16gb.yaml").read_text()
DEMO = (REPOSITORY / "recipes" / "demo.yaml").read_text()
PARAMS = Path("params.yaml")


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh clone: the default recipe, committed as params.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/sdxl-naruto-16gb.yaml").write_text(DEFAULT)
    Path("recipes/demo.yaml").write_text(DEMO)
    PARAMS.write_text(DEFAULT)
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "start")


def edit_params() -> str:
    edited = DEFAULT.replace("rank: 16", "rank: 17")
    assert edited != DEFAULT
    PARAMS.write_text(edited)
    return edited


def test_recipe_becomes_params_to_the_byte() -> None:
    select("demo")
    assert PARAMS.read_text() == DEMO


def test_difference_is_shown() -> None:
    message = select("demo")
    assert "-  resolution: 1024 # pixels a side\n+  resolution: 128 # pixels a side" in message


def test_second_time_changes_nothing() -> None:
    select("demo")
    assert "already" in select("demo")
    assert PARAMS.read_text() == DEMO


def test_way_back_leads_back() -> None:
    assert "To go back: git checkout params.yaml" in select("demo")
    git("checkout", "params.yaml")
    assert PARAMS.read_text() == DEFAULT


def test_copy_of_another_recipe_is_replaced() -> None:
    select("demo")
    assert "To go back: sdxl-lora recipe demo" in select("sdxl-naruto-16gb")
    assert PARAMS.read_text() == DEFAULT


def test_edits_are_not_replaced() -> None:
    edited = edit_params()
    with pytest.raises(ValueError, match="neither committed nor part of a recipe") as caught:
        select("demo")
    assert PARAMS.read_text() == edited
    assert "--force" in str(caught.value)


def test_edits_on_top_of_a_selected_recipe_are_not_replaced() -> None:
    PARAMS.write_text(DEMO.replace("  rank: 16", "  rank: 17"))
    with pytest.raises(ValueError, match="neither committed"):
        select("demo")


def test_forced_replacement_keeps_the_edits_beside() -> None:
    edited = edit_params()
    message = select("demo", force=True)
    assert PARAMS.read_text() == DEMO
    assert BACKUP.read_text() == edited
    assert f"To go back: cp {BACKUP} params.yaml" in message


@pytest.fixture
def _dvc() -> None:
    """DVC in the project, with a stage that reads params.yaml."""
    dvc("init", "--quiet")
    Path("dvc.yaml").write_text("stages: {train: {cmd: 'true', params: [lora]}}")
    git("add", ".")
    git("commit", "--quiet", "--message", "dvc")


def dvc(*arguments: str) -> None:
    subprocess.run([Path(sys.executable).parent / "dvc", *arguments], check=True, capture_output=True)


@pytest.mark.usefixtures("_dvc")
def test_params_that_dvc_only_wrote_in_another_form_are_no_edits() -> None:
    select("demo")
    dvc("exp", "run", "--quiet", "--set-param", "lora.rank=16")
    assert PARAMS.read_text() != DEMO
    assert "already" in select("demo")


@pytest.mark.usefixtures("_dvc")
def test_params_of_an_experiment_are_replaced_since_dvc_has_them() -> None:
    select("demo")
    dvc("exp", "run", "--quiet", "--name", "rank-8", "--set-param", "lora.rank=8")
    changed = PARAMS.read_text()
    assert "To go back: dvc exp apply rank-8" in select("demo")
    assert PARAMS.read_text() == DEMO
    dvc("exp", "apply", "--quiet", "rank-8")
    assert PARAMS.read_text() == changed


@pytest.mark.usefixtures("_dvc")
def test_edits_on_top_of_an_experiment_are_not_replaced() -> None:
    select("demo")
    dvc("exp", "run", "--quiet", "--set-param", "lora.rank=8")
    PARAMS.write_text(PARAMS.read_text().replace("  rank: 8", "  rank: 9"))
    with pytest.raises(ValueError, match="neither committed"):
        select("demo")


def test_comments_are_edits_too() -> None:
    PARAMS.write_text(DEFAULT + "# rank 17 was worse\n")
    with pytest.raises(ValueError, match="neither committed"):
        select("demo")


def test_file_that_is_no_yaml_is_not_lost() -> None:
    PARAMS.write_text("lora: [")
    with pytest.raises(ValueError, match="neither committed"):
        select("demo")


def test_committed_edits_are_replaced_as_git_has_them() -> None:
    edited = edit_params()
    git("commit", "--quiet", "--all", "--message", "rank 17")
    select("demo")
    git("checkout", "params.yaml")
    assert PARAMS.read_text() == edited


def test_missing_params_are_written() -> None:
    PARAMS.unlink()
    select("demo")
    assert PARAMS.read_text() == DEMO


def test_recipe_that_does_not_fit_the_schema_is_refused() -> None:
    Path("recipes/demo.yaml").write_text(DEMO.replace("  rank: ", "  rnak: "))
    with pytest.raises(ValueError, match=r"recipes/demo\.yaml") as caught:
        select("demo")
    assert "did you mean `rank`" in str(caught.value)
    assert PARAMS.read_text() == DEFAULT


def test_unknown_recipe_lists_those_that_exist() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean `demo`") as caught:
        select("demos")
    assert "sdxl-naruto-16gb *" in str(caught.value)


def test_listing_marks_the_recipe_in_use() -> None:
    select("demo")
    marked = [line for line in listing().splitlines()[1:] if " * " in line]
    assert [line.split()[0] for line in marked] == ["demo"]


def test_outside_git_edits_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / ".git").rename(tmp_path / "git-moved-away")
    edit_params()
    with pytest.raises(ValueError, match="neither committed"):
        select("demo")


@pytest.mark.parametrize(
    ("arguments", "status", "output"),
    [([], 0, "Recipes"), (["demo"], 0, "is now the recipe `demo`"), (["nothing"], 1, "no recipe `nothing`")],
)
def test_command(arguments: list[str], status: int, output: str) -> None:
    command = [COMMAND, "recipe", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert output in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
