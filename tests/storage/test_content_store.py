import os
import time
from pathlib import Path

import pytest
import torch

from sdxl_lora.storage.content_store import UNUSED_SECONDS, ContentStore, content_key

KEY = content_key("latents", image="abc", size=64)


@pytest.fixture
def store(tmp_path: Path) -> ContentStore:
    return ContentStore(tmp_path / "store")


def files(store: ContentStore) -> list[Path]:
    return [path for path in store._folder.rglob("*") if path.is_file()]


def test_entries_come_back_to_the_bit(store: ContentStore) -> None:
    tensors = {
        "a": torch.randn(3, 4).half(),
        "b": torch.randn(2, 5).bfloat16().t(),
        "c": torch.arange(6, dtype=torch.int32),
    }
    assert KEY not in store
    assert store.get(KEY) is None
    store.put(KEY, tensors)
    assert KEY in store
    found = store.get(KEY)
    assert found is not None
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_every_part_of_the_key_counts() -> None:
    keys = {
        content_key("latents", image="abc", size=64),
        content_key("latents", image="abd", size=64),
        content_key("latents", image="abc", size=65),
        content_key("latents", image="abc", size="64"),
        content_key("text", image="abc", size=64),
    }
    assert len(keys) == 5
    assert content_key("latents", size=64, image="abc") == KEY


@pytest.mark.parametrize("position", [0, 40, -1])
def test_damaged_entry_is_not_returned_and_goes(store: ContentStore, position: int) -> None:
    store.put(KEY, {"a": torch.ones(9)})
    (file,) = files(store)
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert store.get(KEY) is None
    assert KEY not in store


def test_half_an_entry_is_not_returned(store: ContentStore) -> None:
    store.put(KEY, {"a": torch.ones(9)})
    (file,) = files(store)
    for length in (0, 10, 50):
        file.write_bytes(file.read_bytes()[:length])
        assert store.get(KEY) is None
        store.put(KEY, {"a": torch.ones(9)})


def test_entries_are_pruned_when_nobody_has_read_them_for_long(store: ContentStore) -> None:
    other = content_key("latents", image="other")
    for key in (KEY, other):
        store.put(key, {"a": torch.ones(1)})
    (store._folder / "latents/00").mkdir(exist_ok=True)
    half = store._folder / "latents/00/123.4.partial"
    half.write_bytes(b"half")
    long_ago = time.time() - UNUSED_SECONDS - 1
    for file in files(store):
        os.utime(file, (long_ago, long_ago))
    assert store.get(KEY) is not None
    store.prune()
    assert KEY in store
    assert other not in store
    assert not half.exists()
