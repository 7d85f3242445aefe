"""An adapter file verified against a project; each test breaks one thing that its header names."""

import hashlib
import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from sdxl_lora import paths
from sdxl_lora.adapters.export import export_lora
from sdxl_lora.adapters.lineage import lineage
from sdxl_lora.cli.main import app
from sdxl_lora.config import load_params
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.data.shard_writer import write_index
from sdxl_lora.models.base_config import layers_per_block
from sdxl_lora.models.weights import weight_digests
from sdxl_lora.reproducibility.checklist import Check, exit_status
from sdxl_lora.reproducibility.verify import verify
from sdxl_lora.storage.safetensors_io import read_header, write_tensors
from tests.support.adapters import write_adapter
from tests.support.encoded import write_encoded_dataset

REPOSITORY = Path(__file__).parents[2]
CODE = Path("src/sdxl_lora/training/trainer.py")
ADAPTER = paths.EXPORTED_WEIGHTS


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write_lock(params: dict[str, Any]) -> None:
    """What DVC would know of the training."""
    entry = {
        "deps": [
            {"path": "data/encoded", "md5": "1.dir"},
            {"path": str(CODE), "md5": hashlib.md5(CODE.read_bytes()).hexdigest()},
        ],
        "params": {"params.yaml": {"lora": params["lora"], "training": params["training"]}},
        "outs": [{"path": "data/lora", "md5": "2.dir"}],
    }
    paths.LOCK.write_text(yaml.safe_dump({"stages": {"train_lora": entry}}), encoding="utf-8")


def record_export() -> None:
    """What DVC would know of the exported files: their list in its cache, under its hash."""
    files = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.name}
        for path in sorted(paths.EXPORT.iterdir())
    ]
    text = json.dumps(files)
    digest = f"{hashlib.md5(text.encode()).hexdigest()}.dir"
    listing = Path(".dvc/cache/files/md5", digest[:2], digest[2:])
    listing.parent.mkdir(parents=True)
    listing.write_text(text, encoding="utf-8")
    Path(".dvc/config").touch()
    lock = yaml.safe_load(paths.LOCK.read_text(encoding="utf-8"))
    lock["stages"]["export_lora"] = {"outs": [{"path": str(paths.EXPORT), "md5": digest}]}
    paths.LOCK.write_text(yaml.safe_dump(lock), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has trained and exported an adapter, uncommitted."""
    root = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        shutil.copytree(REPOSITORY / "demo/base_model", root / "demo/base_model")
        shutil.copytree(REPOSITORY / "demo/dataset", root / "demo/dataset")
        shutil.copy(REPOSITORY / "recipes/demo.yaml", paths.PARAMS)
        CODE.parent.mkdir(parents=True)
        CODE.write_text("first = True\n")
        Path(".gitignore").write_text("/demo/\n/data/\n")
        git("init", "--quiet", "--initial-branch=main")
        git("add", "--all")
        git("commit", "--quiet", "--message=start")
        params = load_params()
        paths.RAW.mkdir(parents=True)
        source = {"repository": params.download.repository, "revision": params.download.revision}
        paths.RAW_SOURCE.write_text(json.dumps(source), encoding="utf-8")
        encoded = write_encoded_dataset(paths.ENCODED, params.model)
        examples = [
            replace(example, digest=dataset[row].digest())
            for dataset in (encoded, EncodedDataset(paths.ENCODED, "held_out"))
            for row, example in enumerate(dataset.examples)
        ]
        write_index(paths.ENCODED, examples)
        write_adapter(paths.LORA, params.model, params.lora)
        write_lock(yaml.safe_load(paths.PARAMS.read_text(encoding="utf-8")))
        facts = lineage(
            params.model, weight_digests(params.model), paths.RAW_SOURCE, paths.ENCODED_INDEX, paths.LOCK
        )
        export_lora(paths.LORA, paths.EXPORT, params.export, facts, layers_per_block(params.model))
        record_export()
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working folder."""
    shutil.copytree(finished, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def found(path: Path = ADAPTER) -> dict[str, Check]:
    return {check.name: check for check in verify(path)}


@pytest.mark.usefixtures("project")
def test_everything_passes_where_it_was_made() -> None:
    for name in ("pytorch_lora_weights.safetensors", "fluent-3d-emoji.safetensors"):
        checks = found(paths.EXPORT / name)
        assert {check.status for check in checks.values()} == {"pass"}, checks
        assert set(checks) == {
            "weights", "commit", "record", "bytes", "code", "params", "data source", "data", "base model"
        }  # fmt: skip


def edit_weights() -> None:
    tensors = load_file(ADAPTER)
    name = next(iter(tensors))
    write_tensors(ADAPTER, {**tensors, name: tensors[name] + 1e-6}, read_header(ADAPTER))


def edit_header(**facts: str) -> None:
    changed = {f"sdxl_lora.{name.replace('_', '.', 1)}": fact for name, fact in facts.items()}
    write_tensors(ADAPTER, load_file(ADAPTER), {**read_header(ADAPTER), **changed})


def train_with_other_code() -> None:
    """As if the code had been changed for the training, and put back."""
    git("commit", "--quiet", "--allow-empty", "--message=other code")
    CODE.write_text("first = False\n")
    git("add", str(CODE))
    git("commit", "--quiet", "--amend", "--message=other code")
    edit_header(git_commit=git("rev-parse", "HEAD"))


def edit_shard() -> None:
    shard = paths.ENCODED / "train-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def edit_base() -> None:
    weights = Path("demo/base_model/unet/diffusion_pytorch_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def edit_params() -> None:
    text = paths.PARAMS.read_text(encoding="utf-8")
    paths.PARAMS.write_text(text.replace("rank: 16", "rank: 8"), encoding="utf-8")


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("damage", "name", "words"),
    [
        (edit_weights, "weights", "not those that were exported"),
        (train_with_other_code, "code", str(CODE)),
        (edit_params, "params", "has other values than dvc.lock"),
        (lambda: edit_header(params_sha256="0" * 64), "params", "not that of the record"),
        (lambda: Path("demo/dataset/metadata.jsonl").write_text("{}"), "data source", "./demo/dataset"),
        (edit_shard, "data", "is not what was encoded"),
        (lambda: paths.ENCODED_INDEX.write_text("{}\n"), "data", "is not what dvc.lock records"),
        (edit_base, "base model", "unet: not the weights"),
    ],
    ids=["weights", "code", "params", "header", "source", "shard", "index", "base"],
)
def test_damage_fails_the_line_that_is_about_it(damage: Callable[[], object], name: str, words: str) -> None:
    damage()
    checks = found()
    assert {check.name for check in checks.values() if check.status == "fail"} == {name}
    assert words in checks[name].detail
    assert checks[name].remedy
    assert exit_status(checks.values()) == 1


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("loss", "name", "words"),
    [
        (lambda: edit_header(git_commit="0" * 40), "commit", "not in this repository"),
        (lambda: edit_header(note="mine"), "bytes", "or an edited file"),
        (lambda: shutil.rmtree(".dvc/cache"), "bytes", "has no list"),
        (lambda: paths.LOCK.unlink(), "record", "of the workspace, a commit or an experiment"),
        (lambda: shutil.rmtree(paths.ENCODED), "data", "is missing"),
        (lambda: shutil.rmtree("demo/dataset"), "data source", "is missing or incomplete"),
        (lambda: shutil.rmtree("demo/base_model"), "base model", "is missing"),
    ],
    ids=["commit", "header", "cache", "record", "data", "source", "base"],
)
def test_what_is_not_here_warns_and_does_not_fail(loss: Callable[[], object], name: str, words: str) -> None:
    loss()
    checks = found()
    assert checks[name].status == "warn"
    assert words in checks[name].detail
    assert exit_status(checks.values()) == 0


@pytest.mark.usefixtures("project")
def test_data_of_another_run_is_no_damage() -> None:
    git("add", "--force", str(paths.LOCK), str(paths.PARAMS))
    git("commit", "--quiet", "--message=results")
    paths.LOCK.write_text(paths.LOCK.read_text().replace("1.dir", "9.dir"))
    paths.ENCODED_INDEX.write_text("{}\n")
    check = found()["data"]
    assert (check.status, check.detail) == ("warn", "data/encoded/ is that of another run")
    assert f"git checkout {git('rev-parse', 'HEAD')[:12]} -- dvc.lock" in check.remedy


@pytest.mark.usefixtures("project")
def test_file_without_lineage_or_tensors_fails() -> None:
    (check,) = verify(paths.LORA / "pytorch_lora_weights.safetensors")
    assert (check.status, "does not say what it was trained on" in check.detail) == ("fail", True)
    ADAPTER.write_bytes(pickle.dumps({"weights": 1}))
    (check,) = verify(ADAPTER)
    assert (check.status, "is a pickle, which can run any code" in check.detail) == ("fail", True)
    ADAPTER.unlink()
    (check,) = verify(ADAPTER)
    assert check.status == "fail"


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("damage", "status"), [(lambda: None, 0), (edit_weights, 1)], ids=["none", "weights"]
)
def test_commands_status_says_whether_a_check_failed(
    damage: Callable[[], object],
    status: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage()
    with pytest.raises(SystemExit) as stop:
        app(["verify", str(ADAPTER), "--json"])
    assert stop.value.code == status
    weights = {check["name"]: check["status"] for check in json.loads(capsys.readouterr().out)}["weights"]
    assert weights == ("fail" if status else "pass")
    with pytest.raises(SystemExit):
        app(["verify", str(ADAPTER)])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{weights}  weights      ")
    assert printed[-1].endswith(f"{status} failed")
