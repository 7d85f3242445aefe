"""dvc.yaml must declare everything that a stage's result depends on, or DVC keeps stale results."""

import ast
import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from sdxl_lora import paths
from sdxl_lora.config import Params
from sdxl_lora.runtime.import_closure import import_closure, source_file
from tests.support.dvc_deps import DVC_YAML, code_behind, with_code_deps

REPOSITORY = Path(__file__).parents[2]
PIPELINE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]

WHOLE_FILE = "params.yaml:"


FROM_EVALUATION = {"evaluate_lora", "export_lora", "report_run", "track_run"}


def name_of(entry: str | dict[str, Any]) -> str:
    """An entry of dvc.yaml without its options."""
    return entry if isinstance(entry, str) else next(iter(entry))


def declared_params(stage: str) -> set[str]:
    """Dotted keys, or WHOLE_FILE."""
    entries = STAGES[stage].get("params", [])
    return {entry if isinstance(entry, str) else f"{name_of(entry)}:" for entry in entries}


def inputs_of(stage: str) -> set[str]:
    """Files and folders, code apart, that the stage reads."""
    return set(STAGES[stage]["deps"]) - declared_code(stage)


def declared_code(stage: str) -> set[str]:
    return {dep for dep in STAGES[stage]["deps"] if dep.endswith((".py", ".jinja"))}


def outputs_of(stage: str) -> set[str]:
    kinds = ("outs", "metrics", "plots")
    return {name_of(entry) for kind in kinds for entry in STAGES[stage].get(kind, [])}


def descendants(stages: set[str]) -> set[str]:
    """`stages` and all that read their outputs, directly or not."""
    outputs = {output for stage in stages for output in outputs_of(stage)}
    reached = stages | {stage for stage in STAGES if inputs_of(stage) & outputs}
    return reached if reached == stages else descendants(reached)


def script_of(stage: str) -> Path:
    return REPOSITORY / "stages" / f"{stage}.py"


def imported_names(file: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def params_key(chain: list[str]) -> str:
    """The part of `params.a.b.c` that is a key of params.yaml: attributes beyond it belong to its value."""
    model: type[BaseModel] | None = Params
    key = []
    for name in chain:
        if model is None or name not in model.model_fields:
            break
        key.append(name)
        annotation = model.model_fields[name].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return ".".join(key)


def keys_read(script: Path) -> set[str]:
    """Dotted keys that a stage names as `params.<key>`; keys below another one that it names are left out."""
    keys = set()
    for node in ast.walk(ast.parse(script.read_text())):
        chain: list[str] = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        if chain and isinstance(node, ast.Name) and node.id == "params":
            keys.add(params_key(chain))
    # Walking a.b.c meets a.b as well: only a key that is used by itself may stand for those below it.
    nested = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    whole = {key for key in nested if reads_whole(script, key)}
    return {key for key in keys - nested if not any(key.startswith(f"{parent}.") for parent in whole)} | whole


def reads_whole(script: Path, key: str) -> bool:
    """Whether `params.<key>` is used in `script` other than to get at a key below it."""
    tree = ast.parse(script.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    return any(
        ast.unparse(node) == f"params.{key}" and not isinstance(parents[node], ast.Attribute)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    )


def receivers_of_all_params(script: Path) -> set[str]:
    """Functions that get the whole of `params`; `?` stands for any other use of it."""
    tree = ast.parse(script.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    uses = [
        parents[node]
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "params" and isinstance(node.ctx, ast.Load)
    ]
    others = [use for use in uses if not isinstance(use, ast.Attribute)]
    return {ast.unparse(use.func) if isinstance(use, ast.Call) else "?" for use in others}


@pytest.mark.parametrize("stage", STAGES)
class TestStage:
    def test_declares_its_code(self, stage: str) -> None:
        assert declared_code(stage) == code_behind(script_of(stage)), "run `make dvc-deps`"

    def test_closure_is_that_of_the_compiled_code(self, stage: str) -> None:
        """Python's own search goes through bytecode, where ours goes through the source."""
        finder = ModuleFinder(path=[str(REPOSITORY), str(REPOSITORY / "src")])
        finder.run_script(str(script_of(stage)))
        finder.import_hook("stages")  # the package that `python -m stages.<name>` runs first
        names = [vars(module)["__file__"] for module in finder.modules.values()]
        found = {Path(name) for name in names if name}
        assert closure_of(stage) == {file for file in found if has_code(file)}

    def test_declares_its_params(self, stage: str) -> None:
        declared = declared_params(stage)
        if declared == {WHOLE_FILE}:
            assert receivers_of_all_params(script_of(stage))
        else:
            assert declared == keys_read(script_of(stage))

    def test_gives_all_params_to_nothing_but_tracking(self, stage: str) -> None:
        imported = set(imported_names(script_of(stage)))
        receivers = receivers_of_all_params(script_of(stage))
        views = {
            f"sdxl_lora.tracking.{module}.{r}" for r in receivers for module in ("live_run", "pipeline_run")
        }
        assert len(views & imported) == len(receivers)

    def test_knows_no_other_stage(self, stage: str) -> None:
        code = code_behind(script_of(stage))
        assert {path for path in code if path.startswith("stages/")} == {f"stages/{stage}.py"}

    def test_runs_its_own_script(self, stage: str) -> None:
        launchers = ("python", r"\${SDXL_LORA_LAUNCH:-python}")
        assert STAGES[stage]["cmd"] in [f"{launcher} -m stages.{stage}" for launcher in launchers]

    def test_reads_what_an_earlier_stage_writes(self, stage: str) -> None:
        earlier = list(STAGES)[: list(STAGES).index(stage)]
        assert inputs_of(stage) <= {output for other in earlier for output in outputs_of(other)}

    def test_says_what_it_does(self, stage: str) -> None:
        assert STAGES[stage]["desc"]


def test_closure_holds_all_that_a_stage_imports_as_it_starts() -> None:
    imported = modules_at_start()
    assert set(imported) == set(STAGES)
    for stage, files in imported.items():
        assert script_of(stage) in files
        assert {file for file in files if has_code(file)} <= closure_of(stage)


def modules_at_start() -> dict[str, set[Path]]:
    """Return the project's files in `sys.modules` after each stage's imports.

    They are imported in copies of one process that has the large libraries, whose import takes seconds.
    """
    program = f"""
import importlib, json, os, sys
import datasets, diffusers, mlflow, peft, torch, transformers
for stage in {list(STAGES)}:
    if os.fork() == 0:
        importlib.import_module(f"stages.{{stage}}")
        modules = [m for name, m in sys.modules.items() if name.partition(".")[0] in ("sdxl_lora", "stages")]
        print(json.dumps([stage, [m.__file__ for m in modules]]), flush=True)
        os._exit(0)
    os.wait()
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return {stage: set(map(Path, files)) for stage, files in map(json.loads, result.stdout.splitlines())}


def closure_of(stage: str) -> set[Path]:
    """Return the files that a stage imports, directly or not, inert ones as well."""
    files = {source_file(module) for module in import_closure(f"stages.{stage}")}
    return {file for file in files if file is not None}


def has_code(file: Path) -> bool:
    """Return whether a file is more than the mark of a package."""
    return file.name != "__init__.py" or "import" in file.read_text()


def test_command_writes_the_code_that_is_missing_and_removes_the_rest() -> None:
    text = DVC_YAML.read_text()
    code = "      - src/sdxl_lora/data/captions.py\n"
    assert text.count(code) > 0
    assert with_code_deps(text.replace(code, "      - src/sdxl_lora/data/no_such_module.py\n")) == text
    assert with_code_deps(text.replace(code, "")) == text
    assert with_code_deps(text) == text


def test_every_script_is_a_stage() -> None:
    scripts = {path.stem for path in (REPOSITORY / "stages").glob("*.py")} - {"__init__"}
    assert scripts == set(STAGES)


def test_every_path_is_a_constant_of_paths() -> None:
    known = {str(value) for value in vars(paths).values() if isinstance(value, Path)}
    in_stages = {path for stage in STAGES for path in inputs_of(stage) | outputs_of(stage)}
    elsewhere = {name_of(plot) for plot in PIPELINE["plots"]}
    elsewhere |= {artifact["path"] for artifact in PIPELINE["artifacts"].values()}
    assert in_stages | elsewhere <= known


def test_only_the_pointer_to_mlflow_persists() -> None:
    """A checkpoint that persisted would be resumed by a run with other params."""
    entries = [
        e for stage in STAGES.values() for kind in ("outs", "metrics", "plots") for e in stage.get(kind, [])
    ]
    options = {name_of(entry): entry[name_of(entry)] for entry in entries if isinstance(entry, dict)}
    assert {name for name, value in options.items() if value.get("persist")} == {str(paths.MLFLOW_POINTER)}


def dvc(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 or not check, result.stderr
    return result


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as if every stage had just run: placeholders for its files, and their dvc.lock."""
    project = tmp_path_factory.mktemp("finished")
    with contextlib.chdir(project):
        shutil.copy(REPOSITORY / "dvc.yaml", "dvc.yaml")
        shutil.copy(REPOSITORY / "recipes" / "sdxl-naruto-16gb.yaml", "params.yaml")
        for stage in STAGES:
            for name in {*STAGES[stage]["deps"], *outputs_of(stage)}:
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_text("{}")
        git("init", "--quiet")
        dvc("init", "--quiet")
        dvc("commit", "--quiet", "--force")
        git("add", ".")
        git("commit", "--quiet", "--message", "start")
    return project


@pytest.fixture
def up_to_date(finished_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of it as the working folder."""
    shutil.copytree(finished_project, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def stale_stages() -> set[str]:
    """The stages that `dvc repro` would run, if those above them gave new results."""
    changed = json.loads(dvc("status", "--json").stdout)
    return descendants(set(changed))


@pytest.mark.usefixtures("up_to_date")
@pytest.mark.parametrize(
    ("old", "new", "stale"),
    [
        ("  rank: 16", "  rank: 8", {"train_lora", "sample_images", *FROM_EVALUATION}),
        ("guidance_scale: 7.0", "guidance_scale: 5.0", {"sample_images", *FROM_EVALUATION}),
        ("  noises: 2", "  noises: 4", FROM_EVALUATION),
        ("  title: Naruto style", "  title: Another", FROM_EVALUATION - {"evaluate_lora"}),
        ("  min_words: 2", "  min_words: 3", set(STAGES) - {"download_dataset"}),
        ("# words that BLIP invents", "# another comment", set()),
    ],
)
def test_change_makes_stale_only_what_depends_on_it(old: str, new: str, stale: set[str]) -> None:
    text = Path("params.yaml").read_text()
    assert text.count(old.strip()) == 1
    Path("params.yaml").write_text(text.replace(old.strip(), new.strip()))
    assert stale_stages() == stale


@pytest.mark.usefixtures("up_to_date")
def test_set_param_changes_one_value_and_keeps_comments() -> None:
    before = Path("params.yaml").read_text()
    dvc("exp", "run", "--queue", "--name", "rank-8", "--set-param", "lora.rank=8")
    queued = git("show", "refs/exps/celery/stash:params.yaml")
    assert yaml.safe_load(queued) == yaml.safe_load(before.replace("  rank: 16", "  rank: 8"))
    assert re.findall("#.*", queued) == re.findall("#.*", before)


@pytest.mark.usefixtures("up_to_date")
def test_set_param_refuses_an_unknown_key() -> None:
    refused = dvc("exp", "run", "--queue", "--set-param", "lora.rnak=8", check=False)
    assert refused.returncode != 0
    assert "rnak" in refused.stderr
