"""Upload of the exported adapter to the Hugging Face Hub.

Nothing else in this project publishes anything. The Hub's client finds the access token, from `hf auth login`
or HF_TOKEN.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import read_lineage, training_digest
from sdxl_lora.evaluation.gates import read_gate_failures

_REFUSED_STATUSES = (401, 403)


def upload_adapter(repository: str, public: bool, force: bool) -> str:
    """Upload adapter, card and images as one commit, without the images of earlier ones; return its address.

    Args:
        repository: `owner/name`; created if needed. An existing one keeps its visibility.
        public: whether everyone may read a new repository.
        force: publish an adapter that fails its gates. Its card says so.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: the adapter fails its gates, or the exported adapter is not that of dvc.lock.
        ConnectionError: the Hub refuses or cannot be reached.
    """
    failed = read_gate_failures(paths.GATES)
    if failed and not force:
        reasons = "\n  ".join(failed.values())
        raise ValueError(f"the adapter fails its gates; nothing was pushed:\n  {reasons}")
    _require_present(paths.EXPORTED_WEIGHTS, paths.CARD)
    if read_lineage(paths.EXPORTED_WEIGHTS).get("dvc.train_lora") != training_digest(paths.LOCK):
        raise ValueError(
            f"{paths.EXPORT}/ has another adapter than dvc.lock: `dvc repro` exports that of dvc.lock"
        )
    api = HfApi()
    with _explain_hub_errors():
        api.create_repo(repository, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=paths.EXPORT,
            delete_patterns="images/*",
            commit_message=f"Upload the adapter of training {training_digest(paths.LOCK)[:12]}",
        )
    return commit.commit_url


def _require_present(*files: Path) -> None:
    """Raise FileNotFoundError unless all files exist."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found: run `dvc repro export_lora` first")


@contextmanager
def _explain_hub_errors() -> Iterator[None]:
    """Turn the errors of the Hub's client into a ConnectionError that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        refused = status in _REFUSED_STATUSES
        remedy = "`hf auth login` with a token that has write access" if refused else "try again"
        raise ConnectionError(f"the Hub answers with status {status}: {remedy}") from error
    except (OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise ConnectionError(
            f"the Hub cannot be reached ({type(error).__name__}): "
            "check the network (HF_ENDPOINT, HF_HUB_OFFLINE)"
        ) from error
