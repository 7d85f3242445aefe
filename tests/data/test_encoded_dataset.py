import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_lora.data.encoded_dataset import (
    FIRST,
    Batch,
    EncodedDataset,
    Example,
    Variant,
    data_digest,
    text_digest,
)
from sdxl_lora.data.shard_writer import write_index, write_shard


def numbered(numbers: list[int], *, embeds: bool) -> Batch:
    """Examples that carry their number in every tensor."""

    def full(*shape: int) -> torch.Tensor:
        return torch.tensor(numbers).view(-1, *(1 for _ in shape)).expand(-1, *shape).contiguous()

    return Batch(
        latents_mean=full(4, 2, 2).float(),
        latents_std=full(4, 2, 2).float(),
        token_ids=full(2, 77),
        time_ids=full(6).int(),
        prompt_embeds=full(77, 8).float() if embeds else None,
        pooled_prompt_embeds=full(8).float() if embeds else None,
    )


@pytest.mark.parametrize("embeds", [True, False])
def test_examples_come_back_whole_from_any_shard_in_any_order(tmp_path: Path, embeds: bool) -> None:
    shards = {"a.safetensors": [0, 1, 2], "b.safetensors": [3, 4]}
    for name, numbers in shards.items():
        write_shard(tmp_path, name, numbered(numbers, embeds=embeds))
    examples = [
        Example(f"{number}", f"{number}.png", "ein Bär", "train", name, row)
        for name, numbers in shards.items()
        for row, number in enumerate(numbers)
    ]
    write_index(tmp_path, examples)
    dataset = EncodedDataset(tmp_path, "train")
    assert dataset.examples == examples
    batch = dataset.batch([4, 0, 3])
    for name, expected in numbered([4, 0, 3], embeds=embeds).tensors().items():
        found = batch.tensors()[name]
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("on_disk", [True, False])
def test_other_embeddings_keep_to_their_examples(tmp_path: Path, on_disk: bool) -> None:
    """Those of the data set that they were put into stay as they were."""
    write_shard(tmp_path, "a.safetensors", numbered([0, 1, 2], embeds=on_disk))
    write_index(tmp_path, [Example(str(n), f"{n}.png", "", "train", "a.safetensors", n) for n in range(3)])
    dataset = EncodedDataset(tmp_path, "train")
    prompt_embeds, pooled_prompt_embeds = torch.randn(3, 77, 8), torch.randn(3, 8)
    before, batch = (
        data.batch([2, 0]) for data in (dataset, dataset.with_embeddings(prompt_embeds, pooled_prompt_embeds))
    )
    assert batch.prompt_embeds is not None
    assert batch.pooled_prompt_embeds is not None
    assert torch.equal(batch.prompt_embeds, prompt_embeds[[2, 0]])
    assert torch.equal(batch.pooled_prompt_embeds, pooled_prompt_embeds[[2, 0]])
    assert torch.equal(batch.latents_mean, before.latents_mean)
    assert (before.prompt_embeds is None) != on_disk


def test_empty_split_names_the_key(tmp_path: Path) -> None:
    write_shard(tmp_path, "a.safetensors", numbered([0], embeds=False))
    write_index(tmp_path, [Example("0", "0.png", "", "train", "a.safetensors", 0)])
    with pytest.raises(ValueError, match=r"no held_out example.*encoding\.held_out"):
        EncodedDataset(tmp_path, "held_out")


@pytest.mark.parametrize("name", ["latents_std", "time_ids"])
def test_tensors_that_are_not_those_that_were_encoded_are_refused(tmp_path: Path, name: str) -> None:
    batch = numbered([0], embeds=False)
    write_index(tmp_path, [Example("0", "0.png", "", "train", "a.safetensors", 0, batch.digest())])
    write_shard(tmp_path, "a.safetensors", batch)
    assert len(EncodedDataset(tmp_path, "train")[0]) == 1
    tensor = batch.tensors()[name]
    assert tensor is not None
    tensor.view(-1)[-1] += 1
    write_shard(tmp_path, "a.safetensors", batch)
    with pytest.raises(ValueError, match=r"a\.safetensors: row 0 \(0\.png\) is not what was encoded"):
        EncodedDataset(tmp_path, "train")[0]


def test_mirrored_images_that_are_not_those_that_were_encoded_are_refused(tmp_path: Path) -> None:
    batch, mirrored = numbered([0], embeds=False), numbered([1], embeds=False)
    digests = batch.digest(), replace(mirrored, token_ids=batch.token_ids).digest()
    write_index(tmp_path, [Example("0", "0.png", "", "train", "a.safetensors", 0, *digests)])
    write_shard(tmp_path, "a.safetensors", batch, mirrored)
    dataset = EncodedDataset(tmp_path, "train")
    assert dataset.batch([0, 0], [Variant(flipped=True), FIRST]).time_ids[:, 0].tolist() == [1, 0]
    mirrored.latents_std.view(-1)[-1] += 1
    write_shard(tmp_path, "a.safetensors", batch, mirrored)
    damaged = EncodedDataset(tmp_path, "train")
    assert len(damaged[0]) == 1
    with pytest.raises(ValueError, match=r"a\.safetensors: row 0 \(0\.png\) is not what was encoded"):
        damaged.example(0, Variant(flipped=True))


def write_captioned(folder: Path, texts: Batch) -> EncodedDataset:
    """Two examples with one and two further captions; those of the second are in the order of `texts`."""
    first, more = numbered([0, 1], embeds=True), Batch.cat([numbered([4], embeds=True), texts])
    write_shard(folder, "a.safetensors", first, more=more)
    four, five, six = (text_digest(numbered([n], embeds=True)) for n in (4, 5, 6))
    examples = [
        Example("0", "0.png", "", "train", "a.safetensors", 0, "", "", ("four",), 0, (four,)),
        Example("1", "1.png", "", "train", "a.safetensors", 1, "", "", ("five", "six"), 1, (five, six)),
    ]
    write_index(folder, examples)
    dataset = EncodedDataset(folder, "train")
    assert dataset.examples == examples
    return dataset


def test_further_captions_are_read_with_their_image_and_checked(tmp_path: Path) -> None:
    dataset = write_captioned(tmp_path, numbered([5, 6], embeds=True))
    batch = dataset.batch([1, 0, 1], [Variant(caption=2), FIRST, Variant(caption=1)])
    assert batch.token_ids[:, 0, 0].tolist() == [6, 0, 5]
    assert batch.latents_mean[:, 0, 0, 0].tolist() == [1, 0, 1]
    assert batch.prompt_embeds is not None
    assert batch.prompt_embeds[:, 0, 0].tolist() == [6, 0, 5]
    swapped = write_captioned(tmp_path, numbered([6, 5], embeds=True))
    assert len(swapped[1]) == 1
    with pytest.raises(ValueError, match=r"row 1 \(1\.png\) is not what was encoded"):
        swapped.example(1, Variant(caption=1))


def test_token_ids_are_those_of_every_caption_in_order(tmp_path: Path) -> None:
    dataset = write_captioned(tmp_path, numbered([5, 6], embeds=True))
    assert dataset.token_ids().shape == (5, 2, 77)
    assert dataset.token_ids()[:, 0, 0].tolist() == [0, 4, 1, 5, 6]


def test_other_embeddings_keep_to_their_captions(tmp_path: Path) -> None:
    dataset = write_captioned(tmp_path, numbered([5, 6], embeds=True))
    rows = torch.arange(5.0)
    embedded = dataset.with_embeddings(rows.view(5, 1, 1).expand(5, 77, 8), rows.view(5, 1).expand(5, 8))
    batch = embedded.batch([1, 0, 1, 0], [Variant(caption=2), FIRST, FIRST, Variant(caption=1)])
    assert batch.prompt_embeds is not None
    assert batch.prompt_embeds[:, 0, 0].tolist() == [4, 0, 2, 1]


EXAMPLES = [
    Example(f"id-{n}", f"{n}.png", f"caption {n}", "train", "a.safetensors", n, f"digest-{n}")
    for n in range(7)
]


def rfc_6962_root(leaves: list[bytes]) -> bytes:
    """The tree hash of RFC 6962, section 2.1, as its recursive definition has it."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    middle = 1
    while 2 * middle < len(leaves):
        middle *= 2
    left, right = rfc_6962_root(leaves[:middle]), rfc_6962_root(leaves[middle:])
    return hashlib.sha256(b"\1" + left + right).digest()


@given(st.permutations(range(7)), st.integers(1, 7))
def test_data_digest_is_the_merkle_root_whatever_the_order_and_the_shards(
    order: list[int], count: int
) -> None:
    leaves = [json.dumps([e.id, e.caption, e.digest]).encode() for e in EXAMPLES[:count]]
    shuffled = [replace(EXAMPLES[n], shard="b", row=0) for n in order if n < count]
    assert data_digest(shuffled) == f"sha256:{rfc_6962_root(leaves).hex()}"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"caption": "x"},
        {"digest": "x"},
        {"flipped_digest": "x"},
        {"more_captions": ("x",)},
        {"more_digests": ("x",)},
    ],
)
def test_data_digest_changes_with_every_part_of_an_example(change: dict[str, object]) -> None:
    changed = [*EXAMPLES[:3], replace(EXAMPLES[3], **change), *EXAMPLES[4:]]  # type: ignore[arg-type]
    assert data_digest(changed) != data_digest(EXAMPLES)
    assert data_digest(EXAMPLES[:-1]) != data_digest(EXAMPLES)
