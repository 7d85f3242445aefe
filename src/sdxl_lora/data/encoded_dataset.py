"""The encoded data set: what training reads instead of images and captions.

A folder of safetensors shards and an index. All tensors of one example lie in the same row of the same
shard, so latents cannot meet another image's caption. All latents of a shard have one size.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from sdxl_lora.storage.atomic_io import require_safetensors, write_bytes, write_text
from sdxl_lora.storage.repository import DIGEST_PREFIX

Split = Literal["train", "held_out"]
INDEX = "index.jsonl"
_OF_IMAGE = ("latents_mean", "latents_std", "time_ids")
"""What a mirrored image has of its own. Its caption's tensors are those of the image as it is."""
_OF_CAPTION = ("token_ids", "prompt_embeds", "pooled_prompt_embeds")
"""What a further caption of an image has of its own."""
FLIPPED, MORE = "flipped.", "more."
"""Before the names of what a shard holds of mirrored images, and of further captions."""


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
    flipped_digest: str = ""
    """The same with those of the mirrored image, if that was encoded too."""
    more_captions: tuple[str, ...] = ()
    """Further captions of the image."""
    more_row: int = 0
    """Row of the first of them, among those of the shard's further captions."""
    more_digests: tuple[str, ...] = ()
    """Hash of the tensors of each."""

    @classmethod
    def from_json(cls, line: str) -> Self:
        values: dict[str, Any] = json.loads(line)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | lists)


class Variant(NamedTuple):
    """Which of an example's images and captions."""

    flipped: bool = False
    """Whether the image is mirrored."""
    caption: int = 0
    """Number of the caption, 0 for the first."""


FIRST = Variant()


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
        return _tensors_digest(self.tensors())

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """The examples of all `batches`, in their order."""
        columns = zip(*(batch.tensors().values() for batch in batches), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _tensors_digest(tensors: Mapping[str, Tensor | None]) -> str:
    """A hash of names, types, shapes and bits; None is left out."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(batch: Batch) -> str:
    """A hash of what a caption was encoded to."""
    return _tensors_digest({name: getattr(batch, name) for name in _OF_CAPTION})


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
        rows = map(Example.from_json, index.read_text(encoding="utf-8").splitlines())
        self.examples = [example for example in rows if example.split == split]
        if not self.examples:
            raise ValueError(f"{folder}/ has no {split} example: add images, or change encoding.held_out")
        shards = {example.shard for example in self.examples}
        for name in shards:
            require_safetensors(folder / name)
        self._shards: dict[str, Any] = {name: safe_open(folder / name, "pt") for name in shards}
        slices = {name: shard.get_slice("latents_mean") for name, shard in self._shards.items()}
        latents = {name: torch.Size((1, *slice_.get_shape()[1:])) for name, slice_ in slices.items()}
        self.latents_shapes = [latents[example.shard] for example in self.examples]
        """Of each example, (1, 4, H/8, W/8)."""
        self._embeddings: dict[str, Any] = {}
        self._first_embedding: list[int] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Batch:
        """Example `index`, its image as it is with the first caption. Raises as `example`."""
        return self.example(index, FIRST)

    def example(self, index: int, variant: Variant) -> Batch:
        """Example `index` with that image and caption, as a batch of one.

        Raises:
            ValueError: its tensors are not those that were encoded.
        """
        example, (flipped, caption) = self.examples[index], variant
        prefix = FLIPPED if flipped else ""
        names = {name: (prefix if name in _OF_IMAGE else "") + name for name in (*_OF_IMAGE, *_OF_CAPTION)}
        batch = Batch(**self._read(example.shard, names, example.row))
        expected = example.flipped_digest if flipped else example.digest
        genuine = not expected or batch.digest() == expected
        if caption > 0:
            names = {name: MORE + name for name in _OF_CAPTION}
            batch = replace(batch, **self._read(example.shard, names, example.more_row + caption - 1))
            genuine = genuine and text_digest(batch) == example.more_digests[caption - 1]
        if not genuine:
            raise ValueError(
                f"{example.shard}: row {example.row} ({example.image}) is not what was encoded: "
                "run `dvc checkout data/encoded`, or `dvc repro -f encode_dataset`"
            )
        if self._embeddings:
            row = self._first_embedding[index] + caption
            batch = replace(batch, **{name: tensor[[row]] for name, tensor in self._embeddings.items()})
        return batch

    def _read(self, shard: str, names: Mapping[str, str], row: int) -> dict[str, Any]:
        """One row of a shard's tensors, by the names that they are stored under; None if it lacks them."""
        file = self._shards[shard]
        stored = file.keys()
        return {
            name: file.get_slice(key)[row : row + 1] if key in stored else None for name, key in names.items()
        }

    @property
    def images(self) -> list[str]:
        """File names of the images, in the examples' order."""
        return [example.image for example in self.examples]

    @property
    def largest_latents(self) -> torch.Size:
        """Shape of the latents of an example with the most pixels, (1, 4, H/8, W/8)."""
        return max(self.latents_shapes, key=lambda shape: shape.numel())

    def batch(self, indices: Sequence[int], variants: Sequence[Variant] | None = None) -> Batch:
        """Examples whose latents have one size.

        Args:
            variants: which of each one's images and captions; None: the first.
        """
        variants = [FIRST] * len(indices) if variants is None else variants
        return Batch.cat([self.example(*key) for key in zip(indices, variants, strict=True)])

    def token_ids(self) -> Tensor:
        """Of every caption, in the order of the examples and of the captions of each, (N, 2, 77).

        Not compared with their hash, which is of whole examples: `example` does that.
        """
        rows = []
        for example in self.examples:
            shard, start, count = self._shards[example.shard], example.more_row, len(example.more_captions)
            rows.append(shard.get_slice("token_ids")[example.row : example.row + 1])
            if count:
                rows.append(shard.get_slice(f"{MORE}token_ids")[start : start + count])
        return torch.cat(rows)

    def with_embeddings(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Self:
        """The same examples with these embeddings in place of any on disk: rows as those of `token_ids`."""
        dataset = copy(self)
        counts = [1 + len(example.more_captions) for example in self.examples]
        dataset._first_embedding = list(accumulate(counts, initial=0))
        dataset._embeddings = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
        return dataset


def data_digest(examples: Iterable[Example]) -> str:
    """`sha256:` and the Merkle root over examples: ids, captions and tensors, whatever their order or shards.

    Leaves and inner nodes are told apart as in RFC 6962, section 2.1; a node without a sibling moves up.
    """
    leaves = sorted(
        (e.id, e.caption, e.digest, *filter(None, [e.flipped_digest]), *e.more_captions, *e.more_digests)
        for e in examples
    )
    nodes = [hashlib.sha256(b"\0" + json.dumps(leaf).encode()).digest() for leaf in leaves]
    while len(nodes) > 1:
        pairs = [nodes[start : start + 2] for start in range(0, len(nodes), 2)]
        nodes = [hashlib.sha256(b"\1" + b"".join(pair)).digest() if pair[1:] else pair[0] for pair in pairs]
    return DIGEST_PREFIX + (nodes[0] if nodes else hashlib.sha256().digest()).hex()


def write_shard(
    folder: Path, name: str, batch: Batch, flipped: Batch | None = None, more: Batch | None = None
) -> None:
    """Writes the examples of `batch` as rows 0, 1, ... of shard `name`.

    Args:
        flipped: the same examples with their images mirrored.
        more: examples with their further captions, those of the first example first.
    """
    stored = batch.tensors()
    if flipped is not None:
        stored |= {FLIPPED + key: getattr(flipped, key) for key in _OF_IMAGE}
    if more is not None:
        stored |= {MORE + key: getattr(more, key) for key in _OF_CAPTION}
    tensors = {key: tensor.contiguous() for key, tensor in stored.items() if tensor is not None}
    write_bytes(folder / name, save(tensors))


def write_index(folder: Path, examples: Iterable[Example]) -> None:
    lines = (json.dumps(asdict(example), ensure_ascii=False, sort_keys=True) + "\n" for example in examples)
    write_text(folder / INDEX, "".join(lines))
