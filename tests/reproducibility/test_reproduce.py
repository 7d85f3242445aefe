"""Recorded runs reproduced by the command that a user runs, with the real DVC.

What makes an adapter is real in the first test and toy in those that are about what may go wrong.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from tests.support.patience import patience
from tests.support.project import REPOSITORY, Project, create_project

MAKING = ["download_dataset", "clean_captions", "encode_dataset", "train_lora"]
JUDGING = [*MAKING, "sample_images", "evaluate_lora", "export_lora", "report_run"]
CHOICES = {"attention": "math", "plan": {"micro_batch_size": 1, "checkpointing": 0, "recomputed": 0.0}}
TIMEOUT = patience(150)  # seconds


def small_recipe() -> dict[str, Any]:
    """The demo with few images and steps."""
    recipe: dict[str, Any] = yaml.safe_load((REPOSITORY / "recipes/demo.yaml").read_text(encoding="utf-8"))
    recipe["download"]["max_examples"] = 24
    recipe["training"].update(steps=3, batch_size=2, warmup_steps=1, log_every=1, preview_every=None)
    prompts = recipe["sampling"]["prompts"]
    recipe["sampling"].update(prompts=[prompts[0], prompts[1], prompts[10]], num_inference_steps=2)
    recipe["evaluation"].update(noises=1, resamples=20)
    recipe["evaluation"]["timesteps"] = [300]
    return recipe


def record_run(root: Path, stages: list[str], toy: bool, choices: dict[str, Any] | None = None) -> Project:
    """A project of these stages alone, each run once and committed with its results.

    Args:
        choices: what the training makes of `auto`; None: what it likes.
    """

    def keep(pipeline: dict[str, Any]) -> None:
        for name in set(pipeline) - set(stages):
            del pipeline[name]
        for name in stages if toy else []:
            pipeline[name]["cmd"] = f"python toy_stages.py {name}"

    root.mkdir()
    shutil.copy(Path(__file__).parents[1] / "support/toy_stages.py", root)
    ignored = shutil.ignore_patterns("build", *(["base_model", "evaluator"] if toy else []))
    shutil.copytree(REPOSITORY / "demo", root / "demo", ignore=ignored)
    library = {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    project = create_project(root, small_recipe(), library, keep)
    note = root / paths.RECORDED_TRAINING
    if choices is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(choices), encoding="utf-8")
    project.dvc("repro", "--quiet")
    note.unlink(missing_ok=True)
    commit(project, "results")
    return project


def commit(project: Project, message: str) -> None:
    project.git("add", "--all")
    project.git("commit", "--quiet", f"--message={message}")


def reproduce(project: Project, *arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    """Status, verdict and what is printed."""
    there = Project(project.root, {**project.environment, **environment})
    result = there.attempt("sdxl-lora", "reproduce", *arguments)
    assert (project.root / paths.REPRODUCTION).is_file(), result.stdout
    assert not list((project.root / ".dvc/tmp/reproduction").iterdir()), "the clone is still there"
    return result.returncode, project.read(str(paths.REPRODUCTION)), result.stdout


def states(verdict: dict[str, Any]) -> dict[str, str]:
    return {out["path"]: out["state"] for out in verdict["outs"]}


@pytest.mark.timeout(TIMEOUT)
def test_adapter_reproduced_in_a_fresh_clone_is_bit_identical(tmp_path: Path) -> None:
    """Also where the recorded training chose what this machine would not: here a note makes it."""
    project = record_run(tmp_path / "project", MAKING, toy=False, choices=CHOICES)
    assert project.read(str(paths.TRAINING_REPORT)).items() > CHOICES.items()
    clone = Project(tmp_path / "clone", {**project.environment, "PYTHONPATH": str(tmp_path / "clone/src")})
    project.git("clone", "--quiet", str(project.root), str(clone.root))
    status, verdict, printed = reproduce(clone, "HEAD")
    assert (status, verdict["outcome"], verdict["environment"]) == (0, "bit-identical", []), printed
    assert states(verdict)["data/encoded"] == states(verdict)["data/lora"] == "identical"
    assert states(verdict)[str(paths.LOSS_CURVE)] == "identical but for times"
    for stage in MAKING:
        assert f"Running stage '{stage}'" in printed, "nothing may come from a cache"
    assert not (clone.root / "data/lora").exists()
    assert not (clone.root / "mlflow.db").exists()
    assert verdict["choices"] == []


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_other_kernels_are_named_and_judged_by_the_figures(tmp_path: Path) -> None:
    project = record_run(tmp_path / "project", JUDGING, toy=False)
    status, verdict, printed = reproduce(project, str(paths.EXPORTED_WEIGHTS))
    assert (status, verdict["outcome"]) == (0, "bit-identical"), printed
    assert states(verdict)["data/export"] == "identical", "its header names the commit of the recorded run"
    status, verdict, printed = reproduce(project, "HEAD", ATEN_CPU_CAPABILITY="default")
    assert (status, verdict["outcome"]) == (0, "within tolerance"), printed
    assert verdict["first_difference"] == "encode_dataset"
    facts = {(fact["stage"], fact["name"], fact["found"]) for fact in verdict["environment"]}
    assert facts == {(stage, "cpu/instructions", "DEFAULT") for stage in ("encode_dataset", "train_lora")}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A run of toy stages, recorded and pushed; then the code of one changed, and a file of the library."""
    project = record_run(tmp_path_factory.mktemp("toys") / "project", MAKING, toy=True)
    project.dvc("push", "--quiet")
    script, module = project.root / "toy_stages.py", project.root / "src/sdxl_lora/data/captions.py"
    changed = script.read_text().replace(
        "value = str(", 'value = "changed " * (name == "clean_captions") + str('
    )
    assert changed != script.read_text()
    script.write_text(changed)
    module.write_text(f"{module.read_text()}\n# changed since\n")
    commit(project, "other code")
    return project


@pytest.mark.timeout(TIMEOUT)
def test_results_that_the_commit_does_not_give_differ_from_the_first_stage_on(toys: Project) -> None:
    shutil.rmtree(toys.root / ".dvc/cache")  # what is pulled then comes from the remote
    status, verdict, printed = reproduce(toys, "HEAD", "--data=pull")
    assert (status, verdict["outcome"], verdict["first_difference"]) == (1, "different", "clean_captions")
    assert "Running stage 'download_dataset'" not in printed
    assert "code that its commit does not have: src/sdxl_lora/data/captions.py" in printed
    assert "# Different: commit" in printed
    assert states(verdict)["data/captions.jsonl"] == "different"


@pytest.mark.timeout(TIMEOUT)
def test_stage_that_fails_is_named_with_its_message(toys: Project) -> None:
    status, verdict, _ = reproduce(toys, "HEAD~1", "--data=pull", TOY_FAILS="encode_dataset")
    assert (status, verdict["outcome"], verdict["first_difference"]) == (1, "failed", "encode_dataset")
    assert "encode_dataset fails, as it was told to" in verdict["reasons"][0]
    assert states(verdict)["data/captions.jsonl"] == "identical"
    assert states(verdict)["data/lora"] == "missing"


def test_data_that_is_nowhere_is_refused_with_the_remedy(toys: Project) -> None:
    nowhere = Project(toys.root.with_name("nowhere"), toys.environment)
    toys.git("clone", "--quiet", str(toys.root), str(nowhere.root))
    result = nowhere.attempt("sdxl-lora", "reproduce", "HEAD", "--data=pull")
    assert result.returncode == 1
    assert "neither in DVC's cache nor in its remote" in result.stdout
    assert "`--data download` downloads it again" in result.stdout


def test_name_that_is_nothing_is_refused_before_anything_runs(toys: Project) -> None:
    result = toys.attempt("sdxl-lora", "reproduce", "nothing")
    assert result.returncode == 1
    assert result.stdout.startswith("reproduce: 'nothing' is not a git revision")
