"""A data set shaped like lambdalabs/naruto-blip-captions: one parquet file, columns `image` and `text`."""

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
    colour = (37 * number % 256, 91 * number % 256, 151 * number % 256)
    Image.new("RGB", (side, side + number), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_naruto(folder: Path, captions: Sequence[str | None]) -> list[bytes]:
    """Writes the data set as the Hub keeps it, an image for each caption; returns the images' files."""
    images = [png(number) for number in range(len(captions))]
    structs = [{"bytes": image, "path": None} for image in images]
    (folder / "data").mkdir(parents=True)
    table = pa.table({"image": structs, "text": list(captions)})
    pq.write_table(table, folder / "data" / "train-00000-of-00001-0123456789abcdef.parquet")
    (folder / "README.md").write_text(CARD.format(len(captions)))
    return images
