"""A data set shaped like lambdalabs/naruto-blip-captions: one parquet file, columns `image` and `text`."""

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.patterns import pattern

CARD = """---
license: other
dataset_info:
  features:
  - name: image
    dtype: image
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 1
    num_examples: {}
---
"""


def png(number: int, side: int = 160) -> bytes:
    """A picture of its own for each number."""
    buffer = io.BytesIO()
    pattern(number, (side, side + number)).save(buffer, "PNG")
    return buffer.getvalue()


def write_naruto(
    folder: Path, captions: Sequence[str | None], images: Sequence[bytes] | None = None
) -> list[bytes]:
    """Writes the data set as the Hub keeps it, an image for each caption; returns the images' files.

    Args:
        images: the images' files; None: a picture for each caption.
    """
    images = [png(number) for number in range(len(captions))] if images is None else list(images)
    structs = [{"bytes": image, "path": None} for image in images]
    (folder / "data").mkdir(parents=True)
    table = pa.table({"image": structs, "text": list(captions)})
    pq.write_table(table, folder / "data" / "train-00000-of-00001-0123456789abcdef.parquet")
    (folder / "README.md").write_text(CARD.format(len(captions)))
    return images
