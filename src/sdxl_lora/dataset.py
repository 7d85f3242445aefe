"""The encoded data set: what training reads instead of images and captions.

A folder of safetensors shards and an index. All tensors of one example lie in the same row of the same
shard, so latents cannot meet another image's caption. Batches are a function of (seed, step): nothing to
save, nothing to restart wrongly on a resume.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sdxl_lora.files import require_safetensors, write_bytes, write_text
from sdxl_lora.randomness import generator
from sdxl_lora.sources import DIGEST_PREFIX

Split = Literal["train", "held_out"]
INDEX = "index.jsonl"


@dataclass(frozen=True)
class Example:
    """One row of the index."""

    id: str
    """SHA-256 of the image file."""
    image: str
    """File name of the image."""
    caption: str
    split: Split
    shard: str
    """File name of the shard."""
    row: int
    digest: str = ""
    """Hash of the row's tensors; empty: unknown, and not checked when the row is read."""


@dataclass(frozen=True)
class Batch:
    """Encoded examples side by side. An example alone is a batch of one."""

    latents_mean: Tensor
    """Mean of the VAE's posterior, scaled, (B, 4, H/8, W/8)."""
    latents_std: Tensor
    """Its standard deviation, scaled likewise, (B, 4, H/8, W/8)."""
    token_ids: Tensor
    """Of both tokenizers, int64, (B, 2, 77)."""
    time_ids: Tensor
    """Original (h, w), crop (top, left), target (h, w), pixels, int32, (B, 6)."""
    prompt_embeds: Tensor | None
    """(B, 77, 2048), once the text encoders are frozen."""
    pooled_prompt_embeds: Tensor | None
    """(B, 1280), once the text encoders are frozen."""

    def __len__(self) -> int:
        return len(self.latents_mean)

    def to(self, device: torch.device) -> Self:
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor.to(device) for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor | None]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def digest(self) -> str:
        """A hash of names, types, shapes and bits of all tensors."""
        digest = hashlib.sha256()
        for name, tensor in self.tensors().items():
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """The examples of all `batches`, in their order."""
        columns = zip(*(batch.tensors().values() for batch in batches), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


class EncodedDataset:
    """One split of an encoded data set on disk; reads an example's bytes when it is asked for."""

    def __init__(self, folder: Path, split: Split) -> None:
        """Opens the index.

        Raises:
            FileNotFoundError: nothing was encoded into `folder`.
            ValueError: the split is empty, or a shard is something else.
        """
        index = folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{index} not found: run `dvc repro encode_dataset` first")
        rows = (Example(**json.loads(line)) for line in index.read_text(encoding="utf-8").splitlines())
        self.examples = [example for example in rows if example.split == split]
        if not self.examples:
            raise ValueError(f"{folder}/ has no {split} example: add images, or change encoding.held_out")
        shards = {example.shard for example in self.examples}
        for name in shards:
            require_safetensors(folder / name)
        self._shards: dict[str, Any] = {name: safe_open(folder / name, "pt") for name in shards}
        self._embeddings: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Batch:
        """Example `index` as a batch of one.

        Raises:
            ValueError: its tensors are not those that were encoded.
        """
        example = self.examples[index]
        shard, names = self._shards[example.shard], self._shards[example.shard].keys()
        rows = slice(example.row, example.row + 1)
        columns: dict[str, Any] = {
            field.name: shard.get_slice(field.name)[rows] if field.name in names else None
            for field in fields(Batch)
        }
        batch = Batch(**columns)
        if example.digest and batch.digest() != example.digest:
            raise ValueError(
                f"{example.shard}: row {example.row} ({example.image}) is not what was encoded: "
                "run `dvc checkout data/encoded`, or `dvc repro -f encode_dataset`"
            )
        return replace(batch, **{name: tensor[[index]] for name, tensor in self._embeddings.items()})

    @property
    def images(self) -> list[str]:
        """File names of the images, in the examples' order."""
        return [example.image for example in self.examples]

    def batch(self, indices: Iterable[int]) -> Batch:
        return Batch.cat([self[index] for index in indices])

    def with_embeddings(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Self:
        """The same examples with these embeddings, a row each, in place of any on disk."""
        dataset = copy(self)
        dataset._embeddings = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        return dataset


def example_order(num_examples: int, seed: int, start: int) -> Iterator[int]:
    """Indices of examples from position `start` of an endless sequence of shuffled epochs.

    Every epoch visits every example once, in an order of its own; batches run on across its end.
    """
    epoch, position = divmod(start, num_examples)
    while True:
        order = torch.randperm(num_examples, generator=generator(seed, "order", epoch))
        yield from order[position:].tolist()
        epoch, position = epoch + 1, 0


def data_digest(examples: Iterable[Example]) -> str:
    """`sha256:` and the Merkle root over examples: ids, captions and tensors, whatever their order or shards.

    Leaves and inner nodes are told apart as in RFC 6962, section 2.1; a node without a sibling moves up.
    """
    leaves = sorted((example.id, example.caption, example.digest) for example in examples)
    nodes = [hashlib.sha256(b"\0" + json.dumps(leaf).encode()).digest() for leaf in leaves]
    while len(nodes) > 1:
        pairs = [nodes[start : start + 2] for start in range(0, len(nodes), 2)]
        nodes = [hashlib.sha256(b"\1" + b"".join(pair)).digest() if pair[1:] else pair[0] for pair in pairs]
    return DIGEST_PREFIX + (nodes[0] if nodes else hashlib.sha256().digest()).hex()


def write_shard(folder: Path, name: str, batch: Batch) -> None:
    """Writes the examples of `batch` as rows 0, 1, ... of shard `name`."""
    tensors = {key: tensor.contiguous() for key, tensor in batch.tensors().items() if tensor is not None}
    write_bytes(folder / name, save(tensors))


def write_index(folder: Path, examples: Iterable[Example]) -> None:
    lines = (json.dumps(asdict(example), ensure_ascii=False, sort_keys=True) + "\n" for example in examples)
    write_text(folder / INDEX, "".join(lines))
