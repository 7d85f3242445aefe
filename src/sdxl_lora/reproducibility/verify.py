"""Checks an adapter's header against the local tensors, code, params, data and base model, offline.

A check fails if two of them contradict each other, and warns if something to compare with is missing.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from sdxl_lora import paths
from sdxl_lora.adapters.lineage import json_digest, read_lineage
from sdxl_lora.config import ModelConfig, Params
from sdxl_lora.data.download import HUB_FILES
from sdxl_lora.data.encoded_dataset import EncodedDataset
from sdxl_lora.models.weights import file_digests, local_models, weight_files
from sdxl_lora.reproducibility.checklist import Check, failed, passed, warned
from sdxl_lora.reproducibility.integrity import check_pin
from sdxl_lora.reproducibility.run_record import RunRecord, record_of_adapter
from sdxl_lora.runtime.dvc_command import cached_folder_digests
from sdxl_lora.runtime.dvc_lock import LockedStages, read_lock
from sdxl_lora.runtime.git import rev_parse
from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.storage.repository import file_digest, find_local_copy, is_local_folder
from sdxl_lora.storage.safetensors_io import content_digest

_Facts = Mapping[str, str]


def verify(path: Path) -> Iterator[Check]:
    """Yield every check that the file's header allows, as soon as it is done."""
    if not path.is_file():
        yield failed("file", f"{path} not found", f"name an exported file, or `dvc pull {paths.EXPORT}`")
        return
    try:
        require_safetensors(path)
    except (ValueError, OSError) as error:
        yield failed("file", str(error), "download the file again from where it was published")
        return
    facts, weights = read_lineage(path), content_digest(load_file(path))
    if not facts:
        yield failed(
            "file",
            f"the header of {path} does not say what it was trained on",
            f"use the file in {paths.EXPORT}/: that in {paths.LORA}/ is for the pipeline only",
        )
        return
    yield _check_weights(weights, facts)
    yield _check_commit(facts)
    record = None
    try:
        record = record_of_adapter(path)
        yield passed("record", record.origin)
    except ValueError as error:
        yield warned(
            "record",
            str(error),
            "`dvc exp pull` or `git fetch` the record of the training, then verify again",
        )
    if record is not None:
        yield _check_bytes(path, record)
        yield _check_code(record)
        yield _check_params(record, facts)
    yield _check_source(facts)
    yield _check_data(record, facts)
    yield _check_base(record, facts)


def _check_weights(found: str, facts: _Facts) -> Check:
    """Check that the tensors are those that were exported."""
    if "weights.sha256" not in facts:
        return warned("weights", "the header has no hash of the tensors", "export the adapter again")
    if found != facts["weights.sha256"]:
        return failed(
            "weights",
            "the tensors are not those that were exported",
            "download the file again; this one was edited",
        )
    return passed("weights", f"sha256 {found[:12]}")


def _check_bytes(path: Path, record: RunRecord) -> Check:
    """Check that DVC recorded this file as exported, which detects an edited header as well."""
    exported = cached_folder_digests(record.outs("export_lora").get(str(paths.EXPORT), ""))
    if exported is None:
        return warned(
            "bytes", f"DVC's cache has no list of the files in the recorded {paths.EXPORT}/", "`dvc fetch`"
        )
    if hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() not in exported:
        return warned(
            "bytes",
            f"not a file of the recorded {paths.EXPORT}/: another export of this training, or an edited file",
            f"`dvc checkout {paths.EXPORT}` restores the recorded file",
        )
    return passed("bytes", f"a file of the recorded {paths.EXPORT}/, by its hash")


def _check_commit(facts: _Facts) -> Check:
    """Check that the commit in the header is in this repository."""
    commit = facts.get("git.commit", "")
    if not commit:
        return warned("commit", "the header has no commit", "export the adapter within a git repository")
    if rev_parse(commit) is None:
        return warned("commit", f"{commit[:12]} is not in this repository", "`git fetch` it")
    return passed("commit", commit[:12])


def _check_code(record: RunRecord) -> Check:
    """Check that the commit has the code that DVC recorded."""
    if changed := record.changed_code():
        return failed(
            "code",
            f"the run used other versions than commit {record.code_commit[:12]} has: {', '.join(changed)}",
            "commit that code and run the pipeline again; no commit here reproduces these results",
        )
    return passed("code", f"every file that a stage used is that of commit {record.code_commit[:12]}")


def _check_params(record: RunRecord, facts: _Facts) -> Check:
    """Check that header, dvc.lock and params.yaml agree."""
    locked = record.stages["train_lora"].get("params", {})
    if json_digest(locked or None) != facts.get("params.sha256"):
        return failed("params", "the header's hash is not that of the record", "export the adapter again")
    written = yaml.safe_load(record.files[paths.PARAMS])
    try:
        agree = Params(**{**written, **locked.get("params.yaml", {})}) == Params(**written)
    except ValidationError:
        return warned(
            "params",
            "the recorded params do not fit this version of config.py",
            f"`git checkout {record.code_commit[:12]}`, then verify again",
        )
    if not agree:
        return failed(
            "params",
            f"{paths.PARAMS} of the record has other values than {paths.LOCK}",
            "`dvc repro` with them, or restore those of dvc.lock",
        )
    return passed("params", f"sha256 {facts['params.sha256'][:12]}, equal in {paths.LOCK} and {paths.PARAMS}")


def _check_source(facts: _Facts) -> Check:
    """Check that the downloaded data set still has its revision's content."""
    repository, revision = facts.get("data.repository", "(unknown)"), facts.get("data.revision", "")
    copy = find_local_copy(repository, revision, HUB_FILES, "dataset")
    return check_pin("data source", repository, revision, copy)


def _check_data(record: RunRecord | None, facts: _Facts) -> Check:
    """Check that the encoded examples, including each tensor, are those of the training."""
    if not paths.ENCODED_INDEX.is_file():
        return warned("data", f"{paths.ENCODED}/ is missing", f"`dvc pull {paths.ENCODED}`")
    if file_digest(paths.ENCODED_INDEX) != facts.get("data.sha256"):
        return _explain_other_data(record)
    try:
        counts = [len(_read_all(EncodedDataset(paths.ENCODED, split))) for split in ("train", "held_out")]
    except (ValueError, OSError, SafetensorError) as error:
        return failed("data", str(error), f"`dvc checkout --force {paths.ENCODED}`")
    return passed("data", f"{counts[0]} + {counts[1]} examples, every tensor as it was encoded")


def _explain_other_data(record: RunRecord | None) -> Check:
    """Return the check for an encoded data set that is not the adapter's: a damaged one, or another run's."""
    recorded = None if record is None else _dependency(record.stages, paths.ENCODED)
    if recorded is not None and recorded == _dependency(read_lock(paths.LOCK), paths.ENCODED):
        return failed(
            "data",
            f"{paths.ENCODED}/ is not what dvc.lock records",
            f"`dvc checkout --force {paths.ENCODED}`",
        )
    tree = "COMMIT" if record is None else record.code_commit[:12]
    return warned(
        "data",
        f"{paths.ENCODED}/ is that of another run",
        f"`git checkout {tree} -- {paths.LOCK} && dvc checkout {paths.ENCODED}`",
    )


def _dependency(stages: LockedStages, path: Path) -> str | None:
    """Return the recorded hash of what train_lora read at `path`."""
    deps = stages.get("train_lora", {}).get("deps", [])
    return next((dep["md5"] for dep in deps if dep["path"] == path.as_posix()), None)


def _read_all(dataset: EncodedDataset) -> EncodedDataset:
    """Read each example, which compares its tensors with their hash."""
    for index in range(len(dataset)):
        dataset[index]
    return dataset


def _check_base(record: RunRecord | None, facts: _Facts) -> Check:
    """Check that the weights of the base model are those that the adapter was trained on."""
    model, name = _model_of(record), facts.get("base.repository", "(unknown)")
    if model is None or model.revision != facts.get("base.revision"):
        return warned("base model", f"{name} is not the model of {paths.PARAMS}", "see the check `record`")
    models = local_models(model)
    if absent := [key for key, folder in models.items() if folder is None]:
        return warned(
            "base model", f"{', '.join(absent)} is missing", "the first stage that needs it downloads it"
        )
    base, vae = models["model.base"], models.get("model.vae")
    assert base is not None
    found = {part: file_digests(files) for part, files in weight_files(model, base, vae).items()}
    if others := [part for part, digest in found.items() if digest != facts.get(f"{part}.sha256")]:
        return failed(
            "base model",
            f"{', '.join(others)}: not the weights that the adapter was trained with",
            f"`git checkout {model.base}`"
            if is_local_folder(model.base)
            else "delete it from the Hub's cache",
        )
    return passed("base model", f"{name}: {', '.join(found)} by sha256")


def _model_of(record: RunRecord | None) -> ModelConfig | None:
    """Return the model of the recorded params, or else of params.yaml; None if this code cannot read them."""
    text = record.files[paths.PARAMS] if record else paths.PARAMS.read_text(encoding="utf-8")
    try:
        return ModelConfig(**yaml.safe_load(text)["model"])
    except ValidationError:
        return None
