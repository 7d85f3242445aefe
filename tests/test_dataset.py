from pathlib import Path

import pytest
import torch

from sdxl_lora.dataset import Batch, EncodedDataset, Example, write_index, write_shard


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
