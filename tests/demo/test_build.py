"""How the demo was built: a pipeline whose stages declare what they read, and that runs from end to end."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPModel

from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]
BUILD = REPOSITORY / "demo/build"
STAGES: dict[str, dict[str, Any]] = yaml.safe_load((BUILD / "dvc.yaml").read_text())["stages"]
# They open and check files, and cannot change what a network learns.
INERT = {
    REPOSITORY / f"src/sdxl_lora/{name}.py"
    for name in (
        "config",
        "models/weights",
        "paths",
        "runtime/device",
        "runtime/distributed",
        "storage/hub_client",
        "storage/repository",
    )
}
TIMEOUT = patience(300)  # seconds for the whole pipeline

NUM_IMAGES = 6
SMALL: dict[str, dict[str, Any]] = {
    "emoji": {
        "max_labels": 60,
        "finetune_images": NUM_IMAGES,
        "evaluation_labels": 4,
        "base_labels": 20,
        "held_out_pairs": 3,
        "showcase": ["grinning face"],
    },
    "vae": {"report_every": 1, "compile": False},
    "evaluator": {"report_every": 1},
    "base": {"report_every": 1},
}
SHORT = {"steps": 2, "batch_size": 8, "warmup_steps": 1}


def script_of(stage: str) -> Path:
    """The Python file that a stage ends by running."""
    commands = STAGES[stage]["cmd"]
    last = commands if isinstance(commands, str) else commands[-1]
    return BUILD / last.removeprefix("python ")


def imports_of(file: Path) -> Iterator[Path]:
    """The files of the project that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
        for name in names:
            for root in (BUILD, REPOSITORY / "src"):
                path = root.joinpath(*name.split(".")).with_suffix(".py")
                if path.is_file():
                    yield path


def code_behind(script: Path) -> set[Path]:
    """`script` and all project files that it imports, directly or not."""
    found, pending = set(), [script]
    while pending:
        file = pending.pop()
        if file not in found:
            found.add(file)
            pending += imports_of(file)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_stage_declares_the_code_that_it_imports(stage: str) -> None:
    declared = {(BUILD / name).resolve() for name in STAGES[stage]["deps"] if name.endswith(".py")}
    assert declared - INERT == code_behind(script_of(stage)) - INERT


@pytest.mark.parametrize("stage", STAGES)
def test_stage_declares_the_params_and_results_that_it_reads(stage: str) -> None:
    source = "".join(file.read_text() for file in code_behind(script_of(stage)) if file.parent == BUILD)
    own = script_of(stage).read_text()
    assert set(re.findall(r'read_text\(\)\)\["(\w+)"\]', own)) == set(STAGES[stage].get("params", []))
    results = {out for other in STAGES.values() for out in other["outs"] if f'"{out}' in own}
    declared = {name for name in STAGES[stage]["deps"] if name.startswith("out/")}
    assert results - set(STAGES[stage]["outs"]) <= declared
    for name in declared:
        assert name.rpartition("/")[2] in source, name


def test_every_package_is_pinned_by_its_content() -> None:
    wanted = json.loads((BUILD / "package.json").read_text())["dependencies"]
    locked = json.loads((BUILD / "package-lock.json").read_text())["packages"]
    for name, version in wanted.items():
        entry = locked[f"node_modules/{name}"]
        assert entry["version"] == version
        assert entry["integrity"].startswith("sha512-")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo folder that the whole pipeline makes from few images, with two steps for each network."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    pytest.importorskip("resvg_py", reason="needs demo/build/requirements.txt")
    root = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("node_modules", "out", "__pycache__", "tmp", "cache")
    shutil.copytree(BUILD, root / "demo/build", ignore=ignored)
    shutil.copytree(REPOSITORY / "src", root / "src", ignore=ignored)
    params_file = root / "demo/build/params.yaml"
    params = yaml.safe_load(params_file.read_text())
    for section, changes in SMALL.items():
        params[section].update(changes)
        if "budget" in params[section]:
            params[section]["budget"].update(SHORT)
    params_file.write_text(yaml.safe_dump(params))
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    dvc = Path(sys.executable).with_name("dvc")
    subprocess.run([dvc, "repro"], cwd=root / "demo/build", check=True, timeout=TIMEOUT)
    return root / "demo"


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_pipeline_makes_folders_that_diffusers_and_transformers_load(built: Path) -> None:
    assert StableDiffusionXLPipeline.from_pretrained(built / "base_model").unet is not None
    assert CLIPModel.from_pretrained(built / "evaluator").logit_scale.isfinite()
    lines = (built / "dataset/metadata.jsonl").read_text().splitlines()
    assert len(lines) == NUM_IMAGES
    assert len(list((built / "dataset/images").iterdir())) == len(lines)


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT)
def test_pipeline_judges_what_it_made(built: Path) -> None:
    scores = json.loads((built / "build/out/evaluation/scores.json").read_text())
    assert {"seen", "seen_shaded", "held_out", "target"} <= scores.keys()
    with Image.open(built / "build/out/evaluation/samples.png") as samples:
        assert samples.width > 128
