"""Download of a data set from the Hub or a folder: original bytes, original captions, recorded origin.

Nothing is decoded, re-encoded or executed. From the Hub only parquet files with embedded images are read:
no script, no pickle, and no path from the data set reaches the file system.
"""

import csv
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import metadata_load

from sdxl_lora.config import DownloadConfig
from sdxl_lora.paths import RAW_CAPTIONS, RAW_IMAGES, RAW_SOURCE
from sdxl_lora.storage.atomic_io import require_disk_space, write_bytes, write_text
from sdxl_lora.storage.hub_client import download_size, resolve_hub_revision
from sdxl_lora.storage.repository import is_local_folder, open_folder, open_repository

_KEY = "download.repository"
_CARD_FILE = "README.md"
_METADATA_FILES = ("metadata.jsonl", "metadata.csv")
HUB_FILES = (_CARD_FILE, "*.parquet")
_PARQUET_BRANCH = "refs/convert/parquet"  # the Hub converts every public data set to parquet there
_IMAGE_SUFFIXES = {
    b"\x89PNG": ".png",
    b"\xff\xd8\xff": ".jpg",
    b"RIFF": ".webp",
    b"GIF8": ".gif",
    b"BM": ".bmp",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RawExample:
    """An image file's content and its captions; an image without a caption has one empty string."""

    image: bytes
    captions: Sequence[str]


@dataclass(frozen=True)
class _Source:
    """A data set that was found, with its examples still to be read."""

    repository: str
    requested_revision: str
    revision: str
    """The commit that the Hub resolved, or the folder's digest."""
    licence: str | list[str] | None
    """As stated in the data set's card."""
    num_bytes: int
    """Size of the files that hold the examples; about what the images written will take."""
    num_examples: int | None
    """None if the number is unknown before all examples are read."""
    examples: Iterator[RawExample]


def open_source(config: DownloadConfig) -> _Source:
    """Find the data set that `config` names; download it unless it is in the Hub's cache.

    Raises:
        FileNotFoundError: no such folder, repository or revision, or a folder without metadata.
        ConnectionError: the Hub cannot be reached and the data set is not in its cache.
        PermissionError: the repository is gated, or the access token is refused.
        ValueError: a column or split is missing, or a folder's content differs from its pinned revision.
        OSError: the disk has too little space.
    """
    return _open_local_source(config) if is_local_folder(config.repository) else _open_hub_source(config)


def download_dataset(source: _Source, folder: Path) -> Iterator[RawExample]:
    """Write images/, captions.jsonl (one line a caption) and source.json; yield each example once written.

    `folder` appears when it is complete; an interrupted download leaves nothing behind.

    Raises:
        OSError: the disk has too little space.
        ValueError: the data set is empty, an example has no image, or a caption is not text.
    """
    require_disk_space(folder, source.num_bytes)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
        complete = Path(scratch) / folder.name
        images = complete / RAW_IMAGES.name
        images.mkdir(parents=True)
        lines: list[str] = []
        number = 0
        for number, example in enumerate(source.examples, start=1):
            digest = hashlib.sha256(example.image).hexdigest()
            name = f"{number - 1:05d}-{digest[:12]}{_image_suffix(example.image)}"
            write_bytes(images / name, example.image)
            for caption in example.captions:
                line = {"id": digest, "image": name, "caption": caption}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            yield example
        if number == 0:
            raise ValueError(
                f"{_KEY}: {source.repository} has no examples: choose another download.split or data set"
            )
        write_text(complete / RAW_CAPTIONS.name, "".join(lines))
        write_text(complete / RAW_SOURCE.name, _provenance(source, number))
        # A folder cannot be renamed onto a non-empty one. Both renames stay on one file system and are quick.
        if folder.exists():
            folder.replace(Path(scratch) / "previous")
        complete.replace(folder)


def _provenance(source: _Source, num_examples: int) -> str:
    """Return the content of source.json; of an absolute path only the last name, since paths are private."""
    repository = source.repository
    record = {
        "repository": Path(repository).name if repository.startswith("/") else repository,
        "requested_revision": source.requested_revision,
        "revision": source.revision,
        "licence": source.licence,
        "examples": num_examples,
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _open_hub_source(config: DownloadConfig) -> _Source:
    """Return a data set on the Hub: one split of the parquet files in the Hub's cache, read row by row."""
    repository = config.repository
    commit = resolve_hub_revision(repository, config.revision, _KEY, "dataset")
    if commit != config.revision:
        logger.warning(
            "download.revision %r can move to another commit; it is now %s. To be able to reproduce this "
            "data set, set download.revision to that commit in params.yaml",
            config.revision,
            commit,
        )
    # Twice: the Hub's cache, and the images written from it.
    require_disk_space(RAW_IMAGES.parent, 2 * download_size(repository, commit, _KEY, HUB_FILES, "dataset"))
    snapshot = open_repository(repository, commit, _KEY, HUB_FILES, "dataset")
    files = list(snapshot.rglob("*.parquet"))
    if not files:
        raise ValueError(
            f"{_KEY}: {repository} at revision {config.revision} has no parquet file, the only format that "
            f"is read. The Hub converts public data sets: set download.revision to {_PARQUET_BRANCH}"
        )
    import datasets  # half a second, which a folder need not wait for

    datasets.config.TORCH_AVAILABLE = False  # else it loads torch, for DataLoaders
    try:
        # Streaming reads row by row instead of writing an Arrow copy; decode(False) leaves images as bytes.
        dataset = datasets.load_dataset(str(snapshot), split=config.split, streaming=True).decode(False)
    except ValueError as error:
        raise ValueError(
            f"{_KEY}: {repository} has no data for download.split {config.split!r}: {error}"
        ) from error
    _require_columns(dataset.column_names, config)
    splits = dataset.info.splits or {}
    total = splits[config.split].num_examples if config.split in splits else None
    return _Source(
        repository=repository,
        requested_revision=config.revision,
        revision=commit,
        licence=_licence(snapshot),
        num_bytes=sum(file.stat().st_size for file in files),
        num_examples=total and min(total, config.max_examples or total),
        examples=_hub_examples(islice(dataset, config.max_examples), config),
    )


def _hub_examples(rows: Iterable[dict[str, Any]], config: DownloadConfig) -> Iterator[RawExample]:
    for number, row in enumerate(rows):
        image = row[config.image_column]
        content = image.get("bytes") if isinstance(image, dict) else image
        if not isinstance(content, bytes):
            raise ValueError(
                f"download.image_column: row {number} of {config.repository} has no image bytes in "
                f"{config.image_column!r} but {type(content).__name__}; images must be embedded in the file"
            )
        yield RawExample(content, _captions_of(row, number, config))


def _open_local_source(config: DownloadConfig) -> _Source:
    """Return a folder of images with a table of their captions (the `imagefolder` format of `datasets`)."""
    if config.split != "train":
        raise ValueError(
            f"download.split is {config.split!r}, but a folder has only `train`: set download.split to train"
        )
    folder = open_folder(config.repository, config.revision, _KEY)
    rows = _read_metadata(folder, config)[: config.max_examples]
    paths = [_image_file(folder, row, number, config) for number, row in enumerate(rows)]
    captions = [_captions_of(row, number, config) for number, row in enumerate(rows)]
    return _Source(
        repository=config.repository,
        requested_revision=config.revision,
        revision=config.revision,
        licence=_licence(folder),
        num_bytes=sum(path.stat().st_size for path in paths),
        num_examples=len(rows),
        examples=(RawExample(path.read_bytes(), texts) for path, texts in zip(paths, captions, strict=True)),
    )


def _read_metadata(folder: Path, config: DownloadConfig) -> list[dict[str, Any]]:
    """Read the table that gives each image of a folder its caption.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it cannot be read, or lacks a column.
    """
    path = next((folder / name for name in _METADATA_FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{_KEY}: {config.repository} has neither {' nor '.join(_METADATA_FILES)}: write one with the "
            f"columns {config.image_column!r} and {config.caption_column!r}, one row an image"
        )
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [
                _parse_line(line, f"{path}:{number}") for number, line in enumerate(file, 1) if line.strip()
            ]
    for row in rows:
        _require_columns(list(row), config)
    return rows


def _parse_line(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be a JSON object, {{...}}, not {line.strip()[:40]}")
    return row


def _image_file(folder: Path, row: dict[str, Any], number: int, config: DownloadConfig) -> Path:
    """Return the path of the image that a row of the metadata names.

    Raises:
        ValueError: the name is not text, points out of the folder, is hidden (the folder's digest ignores
            hidden files), or cannot be a file name.
        FileNotFoundError: there is no such file.
    """
    name = row[config.image_column]
    if not isinstance(name, str):
        raise ValueError(
            f"download.image_column: row {number} of {folder} has {name!r} instead of a file name: correct it"
        )
    path = folder / name
    hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
    try:
        outside, found = not path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError) as error:  # too long, or with a NUL
        raise ValueError(
            f"{_KEY}: row {number} of {folder} names {name[:99]!r}, which cannot be a file name: correct it"
        ) from error
    if hidden or outside:
        raise ValueError(
            f"{_KEY}: {name!r} in the metadata of {folder} is hidden or outside the folder: move the image "
            "into the folder, under a name without a leading dot"
        )
    if not found:
        raise FileNotFoundError(
            f"{_KEY}: {folder} has no {name!r}, which its metadata names: add the image or remove the row"
        )
    return path


def _captions_of(row: dict[str, Any], number: int, config: DownloadConfig) -> list[str]:
    """Return the captions of a row, which holds one or a list of them; null becomes an empty string."""
    value = row[config.caption_column]
    captions = (value or [""]) if isinstance(value, list) else [value]
    for caption in captions:
        if not isinstance(caption, str | None):
            raise ValueError(
                f"download.caption_column: row {number} of {config.repository} has no text in "
                f"{config.caption_column!r} but {type(caption).__name__}: name a column of captions"
            )
    return [caption or "" for caption in captions]


def _require_columns(columns: Iterable[str] | None, config: DownloadConfig) -> None:
    known = list(columns or ())
    for key in ("image_column", "caption_column"):
        column = getattr(config, key)
        if column not in known:
            raise ValueError(
                f"download.{key} is {column!r}, but {config.repository} has only {', '.join(known)}: "
                "name one of these"
            )


def _licence(folder: Path) -> str | list[str] | None:
    """Return the licence stated in the header of the data set's card; None if it states none."""
    card = folder / _CARD_FILE
    header = metadata_load(card) if card.is_file() else None
    return (header or {}).get("license")


def _image_suffix(image: bytes) -> str:
    """Return the usual file name suffix for an image file's content; `.img` for an unknown format."""
    return next((ending for magic, ending in _IMAGE_SUFFIXES.items() if image.startswith(magic)), ".img")
