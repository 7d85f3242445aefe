"""The doctor on the demo, where all is well, and on one thing broken at a time, for real."""

import json
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sdxl_lora.adapters.lora import save_lora
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.cli.doctor import dry_run, resources, services, smoke_tests, software
from sdxl_lora.cli.doctor.checks import CHECKS, run_checks
from sdxl_lora.cli.doctor.context import CheckFunction, RunContext
from sdxl_lora.config import Params, load_params
from sdxl_lora.models.vae import load_vae
from sdxl_lora.reproducibility.checklist import Check, exit_status, format_check, passed, warned
from sdxl_lora.storage.atomic_io import GIB
from sdxl_lora.storage.repository import folder_digest
from sdxl_lora.training.train_step import TrainStep
from tests.support.command import COMMAND
from tests.support.hub import Hub
from tests.support.patience import patience

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo recipe, in a project of its own that has not run yet."""
    root = tmp_path / "project"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(services, "ANSWER_SECONDS", patience(5))
    (root / "demo").symlink_to(REPOSITORY / "demo")
    for name in ("requirements.lock", ".dvc/config"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copy(REPOSITORY / "recipes/demo.yaml", root / "params.yaml")
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def context(**sections: dict[str, Any]) -> RunContext:
    """The demo with changed params."""
    params = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for section, changes in sections.items():
        params[section].update(changes)
    return RunContext(Params.model_validate(params), CPU)


def found(examination: CheckFunction, someone: RunContext | None = None) -> Check:
    """The line of one check."""
    (check,) = examination(someone or context())
    return check


def test_healthy_project_passes_every_check() -> None:
    someone = context()
    checks = list(run_checks(someone))
    assert {check.status for check in checks} == {"pass"}, checks
    assert len(checks) == len(CHECKS)
    someone.cleanup()
    assert not list(Path(".dvc/tmp").glob("doctor-*"))


@pytest.mark.slow
def test_command_passes_every_check_and_prints_json() -> None:
    command = [COMMAND, "doctor", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "SDXL_LORA_DEVICE": "cpu"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=patience(60), check=False
    )
    assert {check["status"] for check in json.loads(result.stdout)} == {"pass"}, result.stdout
    assert result.returncode == 0
    assert not list(Path(".dvc/tmp").glob("doctor-*"))


def test_check_that_breaks_down_is_a_finding_and_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_something(_: RunContext) -> Iterator[Check]:
        raise RuntimeError("all\nwrong")

    examinations = [software.check_python, check_something, software.check_libraries]
    monkeypatch.setattr("sdxl_lora.cli.doctor.checks.CHECKS", examinations)
    statuses = [(check.name, check.status, check.detail) for check in run_checks(context())]
    assert statuses[1] == ("something", "fail", "RuntimeError: all wrong")
    assert [name for name, _, _ in statuses] == ["python", "something", "libraries"]


def test_line_has_the_remedy_below_it_and_a_warning_fails_no_script() -> None:
    checks = [passed("disk", "fine"), warned("mlflow", "is down", "start it")]
    assert format_check(checks[1], 10) == "warn  mlflow      is down\n                  -> start it"
    assert exit_status(checks) == 0


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 9), "fail"), ((3, 11, 0), "pass"), ((3, 13, 5), "pass"), ((3, 14, 0), "fail")],
)
def test_python_that_the_project_is_not_made_for_fails(version: tuple[int, ...], status: str) -> None:
    (check,) = software.check_python(context(), version)
    assert check.status == status


def test_other_version_than_the_locks_warns_and_a_missing_package_fails() -> None:
    lock = Path("requirements.lock")
    text = lock.read_text(encoding="utf-8")
    pinned = software.pinned_versions(text)["torch"]
    assert pinned == torch.__version__.partition("+")[0]
    lock.write_text(text.replace(f"torch=={pinned}", "torch==2.9.9"), encoding="utf-8")
    check = found(software.check_libraries)
    assert (check.status, f"torch {torch.__version__} (lock: 2.9.9)" in check.detail) == ("warn", True)


def test_package_that_is_not_installed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "NUMERICAL_LIBRARIES", ("torch", "no-such-package"))
    Path("requirements.lock").write_text("torch==2.13.0\nno-such-package==1.0\n", encoding="utf-8")
    check = found(software.check_libraries)
    assert (check.status, check.detail) == ("fail", "not installed: no-such-package")


@pytest.mark.parametrize(
    ("capability", "runs"),
    [((6, 0), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 1), True)],
    ids=["P100", "T4", "A100", "RTX 4090", "H100", "GB10"],
)
def test_cards_without_kernels_are_known(capability: tuple[int, int], runs: bool) -> None:
    kernels = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert software.has_kernels(capability, kernels) == runs
    assert not software.has_kernels((8, 0), ["sm_86"]), "made for a later minor version"


def test_recipe_for_a_gpu_fails_without_one_and_its_trial_is_not_tried() -> None:
    someone = context(training={"vram_gib": 13.8})
    check = found(software.check_gpu, someone)
    assert (check.status, "PyTorch finds no GPU" in check.detail) == ("fail", True)
    statuses = {check.name: check for check in examine_only(someone, "gpu_memory", "vae", "gradient")}
    assert {check.status for check in statuses.values()} == {"warn"}
    assert statuses["gradient"].detail.startswith("not tried: there is no GPU")


def examine_only(someone: RunContext, *names: str) -> Iterator[Check]:
    with pytest.MonkeyPatch.context() as patch:
        chosen = [e for e in CHECKS if e.__name__.removeprefix("check_") in names]
        patch.setattr("sdxl_lora.cli.doctor.checks.CHECKS", chosen)
        yield from run_checks(someone)


@pytest.mark.parametrize(("precision", "status"), [("fp16", "fail"), ("bf16", "warn"), ("fp32", "pass")])
def test_precision_that_the_device_lacks_is_told(precision: str, status: str) -> None:
    check = found(software.check_precision, context(training={"precision": precision}))
    assert check.status == status
    assert precision == "fp32" or "training.precision" in check.detail


@pytest.mark.parametrize(
    ("examination", "resource", "change"),
    [
        (resources.check_memory, "psutil.virtual_memory", {"available": 2**20}),
        (resources.check_disk, "shutil.disk_usage", {"free": 2**20}),
    ],
    ids=["memory", "disk"],
)
def test_less_than_the_forecast_fails(
    examination: CheckFunction, resource: str, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(examination).status == "pass"
    module, _, function = resource.partition(".")
    real = getattr(getattr(resources, module), function)
    monkeypatch.setattr(getattr(resources, module), function, lambda *a: real(*a)._replace(**change))
    check = found(examination)
    assert (check.status, check.detail.startswith("0.00 GiB free")) == ("fail", True)


def test_forecast_of_memory_is_that_of_the_plan() -> None:
    someone = context()
    assert resources.needed_gpu_memory(someone) == someone.plan.forecast.total + 0.9 * GIB


def test_mirrored_images_take_their_room_on_the_disk() -> None:
    plain, mirrored = context(encoding={"flip": False}), context(encoding={"flip": True})
    more = resources.example_bytes(mirrored.shapes, mirrored.params) - resources.example_bytes(
        plain.shapes, plain.params
    )
    assert more == 2 * 4 * (128 // 8) ** 2 * 4


def test_disk_of_an_unknown_data_set_warns() -> None:
    check = found(resources.check_disk, context(download={"repository": "owner/data", "max_examples": None}))
    assert check.status == "warn"


def own_base(change: Any = None) -> dict[str, Any]:
    """The demo's base model as a copy in the project, changed in place; its params."""
    shutil.copytree(REPOSITORY / "demo/base_model", "base")
    pin = folder_digest(Path("base"))
    if change is not None:
        change()
    return {"base": "./base", "revision": pin}


def break_vae() -> None:
    path = Path("base/vae/diffusion_pytorch_model.safetensors")
    tensors = load_file(path)
    tensors["encoder.conv_in.bias"] = torch.full_like(tensors["encoder.conv_in.bias"], float("nan"))
    save_file(tensors, path)


def test_model_that_is_not_what_is_pinned_fails() -> None:
    check = found(resources.check_models, context(model=own_base(break_vae)))
    assert (check.name, check.status) == ("model.base", "fail")


def test_model_that_is_not_here_warns_and_what_needs_it_is_not_tried() -> None:
    someone = context(model={"base": "./none"})
    assert found(resources.check_models, someone).status == "warn"
    (check,) = examine_only(someone, "gradient")
    assert (check.status, check.detail) == ("warn", "not tried: model.base is not downloaded yet")


def test_damaged_file_of_the_hubs_cache_fails(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/vae", REPOSITORY / "demo/base_model/vae")
    repository = hub.repositories["models", "owner/vae"]
    model = {"vae": "owner/vae", "vae_revision": repository.commit}
    assert [check.status for check in resources.check_models(context(model=model))] == ["pass", "warn"]
    load_vae(context(model=model).params.model, "fp32", CPU)  # downloads it
    assert [check.status for check in resources.check_models(context(model=model))] == ["pass", "pass"]
    (weights,) = (tmp_path / "hub-cache").rglob("diffusion_pytorch_model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.resolve().write_bytes(content)
    _, check = resources.check_models(context(model=model))
    assert (check.status, "diffusion_pytorch_model.safetensors" in check.detail) == ("fail", True)


def test_vae_whose_latents_are_not_finite_fails() -> None:
    model = own_base(break_vae)
    model["revision"] = folder_digest(Path("base"))
    check = found(smoke_tests.check_vae, context(model=model))
    assert (check.status, "are not finite in fp32" in check.detail) == ("fail", True)


def test_vae_is_tried_on_synthetic_images_without_a_data_set() -> None:
    check = found(smoke_tests.check_vae, context(download={"repository": "owner/data"}))
    assert (check.status, "3 images (synthetic" in check.detail) == ("pass", True)


def cut_off_the_middle() -> None:
    path = Path("base/unet/diffusion_pytorch_model.safetensors")
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("mid_block.attentions.0.proj_out"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path)


def test_adapters_that_no_gradient_reaches_are_named() -> None:
    model = own_base(cut_off_the_middle)
    model["revision"] = folder_digest(Path("base"))
    check = found(smoke_tests.check_gradient, context(model=model))
    assert (check.status, "unet.mid_block.attentions.0" in check.detail) == ("fail", True)
    assert check.detail.startswith("zero for 20 of 288")


def test_step_that_moves_nothing_fails() -> None:
    check = found(smoke_tests.check_step, context(training={"learning_rate": 0.0}))
    assert (check.status, "did not move" in check.detail) == ("fail", True)


def test_resume_that_forgets_something_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TrainStep.state_dict

    def forgetful(self: TrainStep[Any]) -> dict[str, Any]:
        return {name: value for name, value in real(self).items() if not name.startswith("optimizer.")}

    someone = context()
    someone.dry_run.step()
    monkeypatch.setattr(TrainStep, "state_dict", forgetful)
    assert found(smoke_tests.check_resume, someone).status == "fail"


def test_file_that_holds_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(folder: Path, parts: dict[str, Any]) -> None:
        save_lora(folder, parts)
        path = folder / WEIGHTS_FILE
        save_file({name: tensor.half().float() for name, tensor in load_file(path).items()}, path)

    monkeypatch.setattr(dry_run, "save_lora", rounded)
    someone = context()
    assert found(smoke_tests.check_save, someone).status == "fail"
    assert "dry_run" not in vars(someone), "the next checks need its memory"
    (check,) = examine_only(context(), "sample")
    assert (check.status, check.detail) == ("warn", "not tried: no adapter was saved")
    someone.cleanup()


class Failing(BaseHTTPRequestHandler):
    """A server that answers everything with an error."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def failing() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_mlflow_that_fails_warns_and_a_dead_one_does(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", failing)
    assert found(services.check_mlflow).status == "warn"


def test_service_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "ANSWER_SECONDS", 5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        check = found(services.check_mlflow)
    assert (check.status, check.detail) == ("warn", "no answer in 5 s")


def test_remote_that_cannot_be_written_fails(project: Path) -> None:
    assert found(services.check_remote).status == "pass"
    assert list((project / "dvc-remote").iterdir()) == []
    (project / "dvc-remote").rmdir()
    (project / "dvc-remote").write_text("a file where the folder should be")
    check = found(services.check_remote)
    assert (check.status, "Error" in check.detail) == ("fail", True)


def test_remote_on_a_dead_server_fails(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    settings = f"""['remote "local"']\n    url = s3://bucket\n    endpointurl = http://127.0.0.1:{closed}\n"""
    keys = "    access_key_id = a\n    secret_access_key = b\n"
    (project / ".dvc/config.local").write_text(settings + keys)
    check = found(services.check_remote)
    assert (check.status, "Could not connect to the endpoint" in check.detail) == ("fail", True)


def test_params_that_do_not_fit_end_the_command_with_the_key() -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text(encoding="utf-8").replace("  rank: 16", "  rnak: 16"), encoding="utf-8")
    with pytest.raises(ValueError, match="rnak"):
        load_params(path)
    command = [COMMAND, "doctor"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=patience(30), check=False
    )
    assert result.returncode == 1
    assert "doctor: params.yaml does not fit the schema" in result.stderr
