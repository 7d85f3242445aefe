"""Disks that are full before or while a stage writes to them, or may not be written to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdxl_lora import paths
from stages import clean_captions, download_dataset, encode_dataset, train_lora
from tests.support.fault import Fault, contents, project, told
from tests.support.small_disks import fill, read_only, small_disk

IMAGES = 12
BATCH = 4
FREE = r"^[\w/.-]+ .*: free some space \(`dvc gc --workspace` deletes old results\), then run again"
ALLOW = r"^[\w/.-]+ cannot be written \(Read-only file system\): give this user write access"


def disk_faults(folder: Path) -> Iterator[Fault]:
    """All of them on one small disk, with the demo's first images."""
    with small_disk(folder / "disk", "64m") as disk, project(disk) as (recipe, patch):
        recipe["download"]["max_examples"] = IMAGES
        recipe["encoding"].update(batch_size=BATCH, resolution=64)
        recipe["model"]["text_encoders"] = "frozen"
        recipe["training"].update(steps=2, batch_size=1, warmup_steps=1, preview_every=None)
        paths.PARAMS.write_text(yaml.safe_dump(recipe), encoding="utf-8")

        download_dataset.main()
        with full_after(patch, download_dataset, "download_dataset", 3):
            yield fault("The disk fills up while images are downloaded", download_dataset.main, disk)
        clean_captions.main()
        almost_full = fill(disk)
        with almost_full.open("ab") as file:
            file.truncate(almost_full.stat().st_size - 2**16)
        yield fault("The disk is nearly full before images are encoded", encode_dataset.main, disk)
        with full_after(patch, encode_dataset, "encode_dataset", BATCH + 2):
            yield fault("The disk fills up while images are encoded", encode_dataset.main, disk)
        encode_dataset.main()
        with full_after(patch, encode_dataset, "encode_dataset", IMAGES + 1):
            yield fault("The disk fills up while shards are written", encode_dataset.main, disk)
        train_lora.main()
        for name, place in {"data": paths.DATA, ".dvc": Path(".dvc")}.items():
            with read_only(disk / place):
                yield fault(f"The folder {name} is read-only", train_lora.main, disk, ALLOW)


def fault(name: str, main: Callable[[], None], disk: Path, remedy: str = FREE) -> Fault:
    """Runs a stage that must fail, and frees the disk."""
    before = contents(disk)
    said = told(main)
    (disk / "ballast").unlink(missing_ok=True)
    after = contents(disk)
    lost = [name for name, digest in before.items() if name != "ballast" and after.get(name) != digest]
    return Fault(name, said, lost, remedy)


@contextmanager
def full_after(patch: pytest.MonkeyPatch, stage: Any, name: str, number: int) -> Iterator[None]:
    """Fills the disk as soon as the generator that does a stage's work has yielded so often."""
    work = getattr(stage, name)

    def filling(*arguments: Any) -> Iterator[Any]:
        for count, done in enumerate(work(*arguments), start=1):
            if count == number:
                fill(Path.cwd())
            yield done

    with patch.context() as inner:
        inner.setattr(stage, name, filling)
        yield
