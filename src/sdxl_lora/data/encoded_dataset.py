"""The encoded data set: what training reads instead of images and captions.

A folder of safetensors shards and an index with one line an example. `shard_writer` writes it. All tensors of
an example lie in the same row of the same shard, so latents cannot meet another image's caption. All latents
of a shard have one size. Each field of `Batch` is a tensor of the shard, whose row r belongs to example r:

    latents_mean, ..., token_ids, ...    the image with its first caption
    flipped.latents_mean, ...            the mirrored image, which shares the captions' tensors
    more.token_ids, ...                  further captions of all examples, one after the other: rows of their
                                         own, which Example.more_row finds
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
from safetensors import safe_open
from torch import Tensor

from sdxl_lora.storage.atomic_io import require_safetensors
from sdxl_lora.storage.repository import DIGEST_PREFIX

Split = Literal["train", "held_out"]
INDEX = "index.jsonl"
IMAGE_TENSORS = ("latents_mean", "latents_std", "time_ids")
"""Fields of Batch that depend on the image: stored again for a mirrored image."""
CAPTION_TENSORS = ("token_ids", "prompt_embeds", "pooled_prompt_embeds")
"""Fields of Batch that depend on the caption: stored again for each further caption."""
FLIPPED_PREFIX, MORE_PREFIX = "flipped.", "more."
"""Before the names of a shard's tensors of mirrored images, and of further captions."""


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
    """The same with the tensors of the mirrored image; empty if it was not encoded."""
    more_captions: tuple[str, ...] = ()
    """Further captions of the image."""
    more_row: int = 0
    """Row of the first further caption among those of the shard."""
    more_digests: tuple[str, ...] = ()
    """Hash of each further caption's tensors."""

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
    """Encoded examples, stacked. A single example is a batch of one."""

    latents_mean: Tensor
    """Mean of the VAE's posterior, scaled, (B, 4, H/8, W/8)."""
    latents_std: Tensor
    """Its standard deviation, scaled likewise, (B, 4, H/8, W/8)."""
    token_ids: Tensor
    """Of both tokenizers, int64, (B, 2, 77)."""
    time_ids: Tensor
    """Original (h, w), crop (top, left), target (h, w), pixels, int32, (B, 6)."""
    prompt_embeds: Tensor | None
    """(B, 77, 2048); None unless the text encoders are frozen."""
    pooled_prompt_embeds: Tensor | None
    """(B, 1280); None unless the text encoders are frozen."""

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
        """Return a hash of names, types, shapes and bits of all tensors."""
        return _tensors_digest(self.tensors())

    @classmethod
    def cat(cls, batches: Sequence[Self]) -> Self:
        """Concatenate the examples of all `batches`, in their order."""
        columns = zip(*(batch.tensors().values() for batch in batches), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def _tensors_digest(tensors: Mapping[str, Tensor | None]) -> str:
    """Return a hash of names, types, shapes and bits; None is left out."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(batch: Batch) -> str:
    """Return a hash of the caption's tensors."""
    return _tensors_digest({name: getattr(batch, name) for name in CAPTION_TENSORS})


@dataclass(frozen=True)
class _CaptionEmbeddings:
    """Embeddings of every caption of a split, kept in memory."""

    prompt_embeds: Tensor
    """(N, 77, 2048), a row for each caption."""
    pooled_prompt_embeds: Tensor
    """(N, 1280)."""
    first_rows: Sequence[int]
    """Row of each example's first caption; its further captions follow."""

    def put_into(self, batch: Batch, index: int, caption: int) -> Batch:
        """Replace the embeddings of `batch`, which is example `index` with that caption."""
        row = [self.first_rows[index] + caption]
        return replace(
            batch, prompt_embeds=self.prompt_embeds[row], pooled_prompt_embeds=self.pooled_prompt_embeds[row]
        )


class EncodedDataset:
    """One split of an encoded data set on disk. An example's bytes are read when it is asked for."""

    def __init__(self, folder: Path, split: Split, embeddings: _CaptionEmbeddings | None = None) -> None:
        """Open the index and map the shards.

        Args:
            embeddings: given by `with_embeddings`; None: those on disk, if there are any.

        Raises:
            FileNotFoundError: nothing was encoded into `folder`.
            ValueError: the split is empty, or a shard is not a safetensors file.
        """
        index = folder / INDEX
        if not index.is_file():
            raise FileNotFoundError(f"{index} not found: run `dvc repro encode_dataset` first")
        self._folder, self._split, self._embeddings = folder, split, embeddings
        rows = map(Example.from_json, index.read_text(encoding="utf-8").splitlines())
        self.examples = [example for example in rows if example.split == split]
        if not self.examples:
            raise ValueError(f"{folder}/ has no {split} example: add images, or change encoding.held_out")
        shards = {example.shard for example in self.examples}
        for name in shards:
            require_safetensors(folder / name)
        self._shards: dict[str, Any] = {name: safe_open(folder / name, "pt") for name in shards}
        # A slice knows its shape from the file's header: no latents are read here.
        slices = {name: shard.get_slice("latents_mean") for name, shard in self._shards.items()}
        latents = {name: torch.Size((1, *slice_.get_shape()[1:])) for name, slice_ in slices.items()}
        self.latents_shapes = [latents[example.shard] for example in self.examples]
        """Of each example, (1, 4, H/8, W/8)."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Batch:
        """Return example `index`, its image not mirrored, with the first caption. Raises as `example`."""
        return self.example(index, FIRST)

    def example(self, index: int, variant: Variant) -> Batch:
        """Return example `index` with that image and caption, as a batch of one.

        Raises:
            ValueError: its tensors differ from those that were encoded.
        """
        example = self.examples[index]
        batch = self._with_first_caption(example, variant.flipped)
        if variant.caption > 0:
            batch = self._with_further_caption(batch, example, variant.caption - 1)
        if self._embeddings is not None:
            batch = self._embeddings.put_into(batch, index, variant.caption)
        return batch

    def _with_first_caption(self, example: Example, flipped: bool) -> Batch:
        prefix = FLIPPED_PREFIX if flipped else ""
        image = self._read_row(example.shard, prefix, IMAGE_TENSORS, example.row)
        caption = self._read_row(example.shard, "", CAPTION_TENSORS, example.row)
        batch = Batch(**image, **caption)
        expected = example.flipped_digest if flipped else example.digest
        _require_unchanged(example, not expected or batch.digest() == expected)
        return batch

    def _with_further_caption(self, batch: Batch, example: Example, number: int) -> Batch:
        """Replace the caption of `batch` by the further caption `number`, counted from 0."""
        caption = self._read_row(example.shard, MORE_PREFIX, CAPTION_TENSORS, example.more_row + number)
        batch = replace(batch, **caption)
        _require_unchanged(example, text_digest(batch) == example.more_digests[number])
        return batch

    def _read_row(self, shard: str, prefix: str, names: Sequence[str], row: int) -> dict[str, Any]:
        """Read one row of a shard's tensors `prefix + name`, by name; None if the shard lacks a tensor."""
        file = self._shards[shard]
        stored = file.keys()
        return {
            name: file.get_slice(prefix + name)[row : row + 1] if prefix + name in stored else None
            for name in names
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
        """Return examples whose latents have one size as one batch.

        Args:
            variants: which image and caption of each example; None: the first.
        """
        variants = [FIRST] * len(indices) if variants is None else variants
        return Batch.cat([self.example(*key) for key in zip(indices, variants, strict=True)])

    def token_ids(self) -> Tensor:
        """Return the token ids of every caption, example by example, (N, 2, 77).

        They are not compared with their hash, which covers whole examples: `example` does that.
        """
        rows = []
        for example in self.examples:
            shard, start, count = self._shards[example.shard], example.more_row, len(example.more_captions)
            rows.append(shard.get_slice("token_ids")[example.row : example.row + 1])
            if count:
                rows.append(shard.get_slice(f"{MORE_PREFIX}token_ids")[start : start + count])
        return torch.cat(rows)

    def with_embeddings(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Self:
        """Return the same examples with these embeddings instead of those on disk.

        Training uses it once its text encoders are frozen. Rows are in the order of `token_ids`.
        """
        num_captions = [1 + len(example.more_captions) for example in self.examples]
        first_rows = list(accumulate(num_captions, initial=0))
        embeddings = _CaptionEmbeddings(prompt_embeds, pooled_prompt_embeds, first_rows)
        return type(self)(self._folder, self._split, embeddings)


def _require_unchanged(example: Example, unchanged: bool) -> None:
    if not unchanged:
        raise ValueError(
            f"{example.shard}: row {example.row} ({example.image}) is not what was encoded: "
            "run `dvc checkout data/encoded`, or `dvc repro -f encode_dataset`"
        )


def data_digest(examples: Iterable[Example]) -> str:
    """Return `sha256:` and the Merkle root over ids, captions and tensors of examples, in any order.

    Leaves and inner nodes have different prefixes, as in RFC 6962, section 2.1; a node without a sibling
    moves up one level unchanged.
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
