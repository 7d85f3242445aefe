"""The 16 GB recipe as `dvc repro` runs it, all of its repositories on a Hub on the loopback, in miniature."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.support.hub import Hub, serving_hub
from tests.support.naruto import write_naruto
from tests.support.project import REPOSITORY, Project, create_project

CHROMIUM = shutil.which("chromium")
CAPTIONS = [
    "arafed  man with black hair",
    "a woman with pink hair and a red bow",
    "",
    "<script>document.title = 'owned'</script> a man with arafed hat",
    """<img src="x" onerror="document.title = 'owned'"> arafed""",
    *(f"a ninja number {number} in a forest" for number in range(11)),
]
ATTACK = "<script>document.title = 'owned'</script>"
SECRETS = {
    "HF_TOKEN": "hf_PlantedTokenOfTheHub",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDKEY",
    "AWS_SECRET_ACCESS_KEY": "PlantedSecretOfS3",
    "MLFLOW_TRACKING_TOKEN": "PlantedTokenOfMLflow",
    "MLFLOW_TRACKING_USERNAME": "planted-user-of-mlflow",
    "MLFLOW_TRACKING_PASSWORD": "PlantedPasswordOfMLflow",
}
HOST_NAME = "host-of-kagome"
SECRET_URL = "https://planted-user:PlantedPasswordOfTheRemote@storage.invalid/dvc"
SMALLER = {
    "encoding": {
        "resolution": 64,
        "vae_precision": "fp32",
        "text_precision": "fp32",
        "batch_size": 4,
        "shard_size": 8,
        "held_out": 0.3,
    },
    "lora": {"rank": 2, "alpha": 2.0},
    "training": {
        "steps": 2,
        "warmup_steps": 1,
        "precision": "fp32",
        "vram_gib": None,
        "log_every": 1,
        "preview_every": 2,
    },
    "sampling": {
        "prompts": [f"naruto style, a fox {ATTACK}"],
        "seeds": [0],
        "strengths": [0.0, 1.0],
        "num_inference_steps": 2,
        "resolution": 64,
        "precision": "fp32",
    },
    "evaluation": {"timesteps": [500], "noises": 1, "precision": "fp32"},
    "export": {"title": f"Naruto {ATTACK}"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """The recipe's four repositories: the embedded models in SDXL's layout and variants, a small data set."""
    folder = tmp_path_factory.mktemp("hub")
    demo = REPOSITORY / "demo"
    shutil.copytree(demo / "base_model", folder / "base", ignore=shutil.ignore_patterns("vae"))
    for weights in list((folder / "base").rglob("*.safetensors")):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
        weights.with_suffix(".bin").write_bytes(b"a pickle that nobody may load")
    shutil.copytree(
        demo / "base_model/vae", folder / "base/vae", ignore=shutil.ignore_patterns("*.safetensors")
    )
    shutil.copytree(demo / "base_model/vae", folder / "vae")
    shutil.copytree(demo / "evaluator", folder / "clip")
    write_naruto(folder / "naruto", CAPTIONS)
    with serving_hub() as server:
        server.add("stabilityai/stable-diffusion-xl-base-1.0", folder / "base")
        server.add("madebyollin/sdxl-vae-fp16-fix", folder / "vae")
        server.add("openai/clip-vit-large-patch14", folder / "clip")
        server.add("lambdalabs/naruto-blip-captions", folder / "naruto", "datasets")
        yield server


@pytest.fixture(scope="module")
def project(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The project with the recipe selected and nothing run, of a user with secrets."""
    params = yaml.safe_load((REPOSITORY / "recipes/sdxl-naruto-16gb.yaml").read_text(encoding="utf-8"))
    for section, changes in SMALLER.items():
        params[section].update(changes)
    model, evaluation = params["model"], params["evaluation"]
    model["revision"] = hub.repositories["models", model["base"]].commit
    model["vae_revision"] = hub.repositories["models", model["vae"]].commit
    evaluation["clip_revision"] = hub.repositories["models", evaluation["clip_model"]].commit
    folder = tmp_path_factory.mktemp("recipe")
    home = folder / "home-of-kagome"
    home.mkdir()
    places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "cache"), "HOME": str(home)}
    project = create_project(folder / "project", params, {**places, **SECRETS})
    project.dvc("remote", "add", "--local", "private", SECRET_URL)
    return project


@pytest.fixture(scope="module")
def output(project: Project) -> str:
    """What the whole pipeline printed, on a host with a name of its own where that can be given."""
    if os.geteuid() != 0:
        return project.dvc("repro")
    return project.run("unshare", "--uts", "sh", "-c", f"hostname {HOST_NAME} && exec dvc repro")


def test_data_set_is_recorded_with_the_commit_that_main_meant(
    hub: Hub, project: Project, output: str
) -> None:
    commit = hub.repositories["datasets", "lambdalabs/naruto-blip-captions"].commit
    assert project.read("data/raw/source.json")["revision"] == commit
    assert f"it is now {commit}" in output


def test_captions_are_cleaned_and_the_empty_one_is_rejected(project: Project, output: str) -> None:
    assert output
    lines = (project.root / "data/captions.jsonl").read_text().splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    assert captions[:2] == ["naruto style, man with black hair", f"naruto style, {CAPTIONS[1]}"]
    assert len(captions) == len(CAPTIONS) - 1


def test_adapter_pictures_and_metrics_are_there(project: Project, output: str) -> None:
    assert output
    assert (project.root / "data/lora/pytorch_lora_weights.safetensors").stat().st_size > 0
    with Image.open(project.root / "data/samples/grid.png") as grid:
        assert grid.width > 128
    metrics = project.read("data/reports/metrics.json")
    assert metrics["held_out_loss"]["adapter"] != metrics["held_out_loss"]["base"]
    assert project.read("data/reports/mlflow.json")["mlflow"]["id"]


def test_only_safetensors_were_downloaded(hub: Hub, project: Project, output: str) -> None:
    assert project.root.is_dir()
    assert output
    endings = {Path(name).suffix for name in hub.downloads()}
    assert ".safetensors" in endings
    assert endings <= {".safetensors", ".json", ".parquet", ".md", ".txt"}


def test_downloads_and_stages_show_their_progress_and_libraries_keep_quiet(hub: Hub, output: str) -> None:
    for _, name in hub.repositories:
        assert f"downloading {name} (" in output, name
    assert len(re.findall(r"Fetching \d+ files: 100%.*\[\d\d:\d\d<00:00, ", output)) >= len(hub.repositories)
    for stage in ("download_dataset", "encode_dataset", "train_lora", "sample_images"):
        assert re.search(rf"{stage}: 100%.*\[\d\d:\d\d<00:00, ", output), stage
    assert "`make ui` shows it" in output
    libraries = {
        "MLflow": "INFO",
        "alembic": "Context impl",
        "transformers": "Loading weights",
        "bitsandbytes": "kernels",
    }
    assert not [library for library, news in libraries.items() if news in output]


def test_nothing_that_lasts_holds_a_path_of_the_machine(project: Project, output: str) -> None:
    assert output
    files = [
        path for path in (project.root / "data").rglob("*") if path.suffix in (".json", ".jsonl", ".csv")
    ]
    files += [project.root / "dvc.lock", project.root / "data/lora/pytorch_lora_weights.safetensors"]
    for path in files:
        assert str(project.root.parent).encode() not in path.read_bytes(), path


def test_no_secret_is_written_or_said(project: Project, output: str) -> None:
    assert SECRET_URL in (project.root / ".dvc/config.local").read_text()
    home = Path(project.environment["HOME"])
    secrets = [*SECRETS.values(), "PlantedPasswordOfTheRemote", "planted-user", home.name, HOST_NAME]
    folders = [project.root, Path(project.environment["HF_HOME"]), home]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    written = {path: path.read_bytes() for path in files if path.name != "config.local"}
    for place in ("mlflow.db", "mlruns", "data/lora", "data/reports", "data/export", "dvc.lock", ".dvc/tmp"):
        assert any(path.is_relative_to(project.root / place) for path in written), place
    for secret in secrets:
        assert secret not in output
        assert [path for path, content in written.items() if secret.encode() in content] == [], secret


def without_code(markdown: str) -> str:
    """Markdown without its header and its blocks of code, where no HTML is looked for."""
    return re.sub("\\A---\n.*?\n---\n|```.*?```", "", markdown, flags=re.DOTALL)


def test_markdown_holds_nothing_that_a_stranger_wrote_as_html(project: Project, output: str) -> None:
    assert output
    for page in ("data/export/README.md", "data/reports/dataset.md"):
        text = (project.root / page).read_text(encoding="utf-8")
        assert "owned" in text or page.endswith("dataset.md")
        assert not re.search(r"(?<!\\)<(script|img)", without_code(text))


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("policy", [True, False], ids=["as it is", "without the page's own policy"])
@pytest.mark.parametrize("name", ["captions.html", "index.html"])
def test_pages_run_nothing_that_a_stranger_wrote(
    project: Project, output: str, name: str, policy: bool
) -> None:
    assert output
    html = (project.root / "data/reports" / name).read_text(encoding="utf-8")
    assert html.count("http-equiv") == 1
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content(html if policy else html.replace("http-equiv", "data-was"))
        page.wait_for_timeout(200)  # pictures that do not load would have said so
        shown, title = page.inner_text("body"), page.title()
        elements = page.evaluate("document.querySelectorAll('script, [onerror], [src=x]').length")
        browser.close()
    assert title != "owned"
    assert ATTACK in shown
    assert elements == 0


def test_second_run_has_nothing_to_do(hub: Hub, project: Project, output: str) -> None:
    assert output
    hub.requests.clear()
    assert "Data and pipelines are up to date" in project.dvc("repro")
    assert hub.requests == []


def test_stage_runs_from_the_cache_when_the_hub_is_gone(project: Project, output: str) -> None:
    assert output
    offline = Project(project.root, {**project.environment, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "clean_captions" in offline.dvc("repro", "--force", "--single-item", "clean_captions")


def test_empty_cache_without_a_network_names_the_recipe_that_needs_none(
    project: Project, tmp_path: Path
) -> None:
    bare = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}  # else the client tries again for 20 s
    result = Project(project.root, bare).attempt("python", "-m", "stages.clean_captions")
    assert result.returncode == 1
    assert "model.base: stabilityai/stable-diffusion-xl-base-1.0" in result.stdout
    assert "make recipe NAME=demo" in result.stdout
    assert "Traceback" not in result.stdout
