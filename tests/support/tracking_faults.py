"""MLflow's server in trouble while a training tells it of its losses."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from mlflow import MlflowClient

from sdxl_lora import paths
from sdxl_lora.adapters.lora_file import saved_lora
from sdxl_lora.cli import ui
from sdxl_lora.config import Params, load_params
from sdxl_lora.storage.repository import file_digest
from sdxl_lora.tracking.connection import EXPERIMENT
from sdxl_lora.tracking.pipeline_run import track_run
from stages import train_lora
from tests.support.encoded import write_encoded_dataset
from tests.support.fault import Fault, at_step, news, project
from tests.support.patience import patience
from tests.support.small_disks import fill, small_disk
from tests.support.tracked import write_results
from tests.support.tracking_servers import PASSWORD, Gate, Trouble, gate, mlflow_server

STEPS = 12
POINTS = 4  # of the curve, in a batch
SLOW = 30  # seconds
SECONDS = patience(30)  # that the test waits at most


@contextmanager
def training_project(folder: Path) -> Iterator[tuple[Params, pytest.MonkeyPatch]]:
    """A working folder in which all is done but the training, of a dozen steps."""
    with project(folder) as (recipe, patch):
        write_results()
        recipe["training"].update(steps=STEPS, batch_size=1, warmup_steps=1, log_every=1, preview_every=None)
        recipe["model"]["text_encoders"] = "frozen"
        paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        params = load_params()
        shutil.rmtree(paths.ENCODED)
        write_encoded_dataset(paths.ENCODED, params.model)
        yield params, patch


@cache
def undisturbed_adapter() -> str:
    """Digest of what the training comes to where nothing goes wrong."""
    with TemporaryDirectory() as folder, training_project(Path(folder).resolve()):
        train_lora.main()
        return file_digest(saved_lora(paths.LORA))


def tracking_faults(folder: Path) -> Iterator[Fault]:
    """MLflow's server in trouble between two batches of losses, and well again after the training."""
    undisturbed = undisturbed_adapter()
    disk = folder / "disk"

    def slow(server: Gate) -> None:
        server.delay = SLOW

    def failing(server: Gate) -> None:
        server.status = 500

    def full(_: Gate) -> None:
        fill(disk)

    troubles: dict[str, Trouble] = {
        "MLflow's server stops during training": Gate.close,
        "MLflow answers with status 500": failing,
        "MLflow's disk is full": full,
        f"MLflow takes {SLOW} s to answer": slow,  # last, as a request that waits goes on to do so
    }
    with small_disk(disk, "64m"), mlflow_server(disk) as port:
        server = MlflowClient(f"http://{ui.HOST}:{port}")
        for number, (name, trouble) in enumerate(troubles.items()):
            with training_project(folder / str(number)) as (params, patch), gate(port, trouble) as before:
                patch.setenv("MLFLOW_TRACKING_URI", before.address)
                if trouble != slow:  # which alone is to exhaust it; a busy machine is not
                    patch.setattr("sdxl_lora.tracking.live_run.PATIENCE_SECONDS", SECONDS)
                with news() as said:
                    seconds = train_into(before, patch)
                assert seconds < SLOW, "training waited for an answer"
                lost = [] if file_digest(saved_lora(paths.LORA)) == undisturbed else ["the adapter"]
                (disk / "ballast").unlink(missing_ok=True)
                assert steps_shown(server) == list(range(1, POINTS + 1)), "the trouble began elsewhere"
                patch.setenv("MLFLOW_TRACKING_URI", server.tracking_uri)
                track_run(params)
                lost += [] if steps_shown(server) == list(range(1, STEPS + 1)) else ["points of the curve"]
                yield Fault(name, "; ".join(said), lost, "track_run logs the results")
        told = [path for path in disk.rglob("*") if path.is_file() and PASSWORD.encode() in path.read_bytes()]
        assert told == [], "the server was told its own password"


def train_into(server: Gate, patch: pytest.MonkeyPatch) -> float:
    """Trains, with the trouble in the middle of it; the seconds from there to the end."""
    begin: list[float] = []

    def wait_for_trouble() -> None:
        assert server.in_trouble.wait(SECONDS)
        begin.append(time.monotonic())

    with at_step(POINTS + 1, patch, wait_for_trouble):
        train_lora.main()
    return time.monotonic() - begin[0]


def steps_shown(client: MlflowClient) -> list[int]:
    """The points of the newest run's loss curve."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    order = ["attributes.start_time DESC"]
    (run,) = client.search_runs([experiment.experiment_id], order_by=order, max_results=1)
    return sorted(point.step for point in client.get_metric_history(run.info.run_id, "train/loss"))
