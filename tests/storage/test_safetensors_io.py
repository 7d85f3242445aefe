import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora.storage.safetensors_io import content_digest, read_header, write_tensors

HEADER = {"title": "naïve 寿司", "b": "2", "a": "1", "format": "pt"}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {
        "up": torch.arange(6.0).view(2, 3),
        "alpha": torch.tensor(4.0),
        "down": torch.ones(3, dtype=torch.half),
    }


def test_safetensors_reads_what_was_written(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, HEADER)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    with safe_open(path, "pt") as file:
        assert file.metadata() == HEADER
    assert read_header(path) == HEADER
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_equal_tensors_and_headers_are_equal_bytes_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path;"
        "from sdxl_lora.storage.safetensors_io import write_tensors;"
        "write_tensors(Path(sys.argv[1]), {'x': torch.ones(3), 'y': torch.zeros(1)}, "
        "{key: key for key in {'a', 'b', 'c', 'd', 'e', 'f'}})"
    )
    for name in ("1", "2", "3"):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / name],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": name},
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes()


def test_digest_is_of_the_bytes_after_the_header(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, tensors, HEADER)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    assert content_digest(tensors) == hashlib.sha256(data[start:]).hexdigest()
