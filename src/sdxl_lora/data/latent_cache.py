"""Encoded examples and the store: what each is called there, encoding what it lacks, reading it back.

Three entries make an example. `picture`: what is known of the image itself. `latents`: what the VAE makes of
it; a mirrored image has its own. `text`: what frozen text encoders make of the caption. Each has its own key,
so that a change encodes no more than what depends on it.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.aspect_ratio_buckets import Size
from sdxl_lora.data.caption_encoder import embed_captions
from sdxl_lora.data.encoded_dataset import FIRST, Batch, Variant
from sdxl_lora.data.encoders import Encoders
from sdxl_lora.data.image_encoder import encode_images
from sdxl_lora.data.image_loader import CaptionedImage, DecodedImage, View, decode_images
from sdxl_lora.data.images import BadImageError
from sdxl_lora.data.padding import pad_rows
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.tokenizers import tokenize
from sdxl_lora.runtime.device import compute_fingerprint
from sdxl_lora.runtime.import_closure import INERT, code_digest, import_closure
from sdxl_lora.runtime.transfers import copy_to_host_async, to_device
from sdxl_lora.storage.content_store import ContentStore, content_key

_IMAGE_CODE = ("sdxl_lora.data.image_loader",)
_LATENTS_CODE = (*_IMAGE_CODE, "sdxl_lora.data.image_encoder", "sdxl_lora.data.padding")
_TEXT_CODE = ("sdxl_lora.data.caption_encoder", "sdxl_lora.data.padding")
"""Modules that compute an entry of this kind: if they or their imports change, it is encoded again.

The tokenizers are not among them: the key of a text holds its token ids, not its words.
"""
_INERT = {
    **INERT,
    "sdxl_lora.models.weights": "says where weights lie; a key has their digest",
    "sdxl_lora.storage": "reads files; a key has the digests of the image and of the weights",
}
_IMAGE_LIBRARIES = ("pillow", "imagehash", "numpy")
_LAYER = "penultimate"
_IN_FLIGHT = 2
"""Batches that a GPU is left with while what came before them is written: it never waits for the next."""


@dataclass(frozen=True)
class _EncodeJob:
    """A view that is still to be encoded."""

    row: CaptionedImage
    flipped: bool
    view: View


class LatentCache:
    """The store as one configuration of models and params sees it."""

    def __init__(self, store: ContentStore, encoders: Encoders, config: EncodingConfig, images: Path) -> None:
        """Knows the store's keys.

        Args:
            images: folder of the image files.
        """
        self._store, self._encoders, self._config, self._images = store, encoders, config, images
        self._device = encoders.vae.device
        self._of_picture = {"code": _code_version(_IMAGE_CODE, _IMAGE_LIBRARIES)}
        self._of_latents = {
            **config.model_dump(
                include={"resolution", "aspect_ratios", "crop", "vae_precision", "vae_tile", "batch_size"}
            ),
            "vae": _weights_digest(encoders.vae),
            "machine": compute_fingerprint(self._device),
            "code": _code_version(_LATENTS_CODE, (*_IMAGE_LIBRARIES, "torch", "diffusers")),
        }
        self._of_text: dict[str, Any] | None = None
        if encoders.text_encoders is not None:
            self._of_text = {
                **config.model_dump(include={"text_precision", "batch_size"}),
                "encoders": [_weights_digest(encoder) for encoder in encoders.text_encoders],
                "layer": _LAYER,
                "machine": compute_fingerprint(self._device),
                "code": _code_version(_TEXT_CODE, ("torch", "transformers")),
            }

    def encode(self, rows: Sequence[CaptionedImage]) -> Iterator[tuple[CaptionedImage, BadImageError | None]]:
        """Puts what the store lacks of these rows into it, whole batches of one size at a time.

        Yields:
            Each row in order, as it goes by, and why its image was left out, if it was.

        Raises:
            ValueError: latents are not finite, or a batch does not fit into the GPU's memory.
            OSError: an image file is missing.
        """
        waiting: dict[torch.Size, list[_EncodeJob]] = defaultdict(list)
        captions: list[Tensor] = []
        unwritten: deque[Callable[[], None]] = deque()
        lacking = [row for row in rows if self._lacks_picture(row)]
        decoded = decode_images(lacking, self._images, self._config, self._lacks_picture)
        expected = {row.id for row in lacking}
        for row in rows:
            picture = next(decoded) if row.id in expected else None
            if isinstance(picture, BadImageError):
                yield row, picture
                continue
            for job in self._lacking_latents(row, picture) if picture is not None else ():
                jobs = waiting[job.view.levels.shape]
                jobs.append(job)
                if len(jobs) == self._config.batch_size:
                    unwritten.append(self._encode(waiting.pop(job.view.levels.shape)))
            for caption in row.captions:
                token_ids = self._token_ids(caption)
                if self._lacks_text(token_ids):
                    captions.append(token_ids)
                if len(captions) == self._config.batch_size:
                    unwritten.append(self._embed(captions))
                    captions = []
            while len(unwritten) > _IN_FLIGHT:
                unwritten.popleft()()
            yield row, None
        unwritten.extend(map(self._encode, waiting.values()))
        if captions:
            unwritten.append(self._embed(captions))
        for write in unwritten:
            write()

    def example(self, row: CaptionedImage, variant: Variant = FIRST) -> Batch:
        """The example of a row that was encoded, as a batch of one."""
        token_ids = self._token_ids(row.captions[variant.caption])
        latents = self._require(row, self._latents_key(row, variant.flipped))
        text = self._require(row, self._text_key(token_ids)) if self._of_text is not None else {}
        embeds = {"prompt_embeds": None, "pooled_prompt_embeds": None, **text}
        return Batch(**latents, token_ids=token_ids, **embeds)

    def size(self, row: CaptionedImage) -> Size:
        """Width and height that a row's image was encoded at, pixels."""
        if self._config.aspect_ratios == "square":
            return self._config.resolution, self._config.resolution
        height, width = self._require(row, self._latents_key(row))["time_ids"][0, 4:].tolist()
        return width, height

    def fingerprint(self, row: CaptionedImage) -> Tensor:
        """The perceptual hash of a row's image: packed bits, uint8, (24,)."""
        return self._require(row, self._picture_key(row))["fingerprint"]

    def num_bytes(self, row: CaptionedImage) -> int:
        """Upper bound of an encoded example's size."""
        latents = 2 * 4 * (self._config.resolution // 8) ** 2 * DTYPES[self._config.vae_precision].itemsize
        latents *= 1 + self._config.flip
        widths = [encoder.config.hidden_size for encoder in self._encoders.text_encoders or ()]
        text = 78 * sum(widths) * DTYPES[self._config.text_precision].itemsize + 2**11
        return latents + len(row.captions) * text + 2**11

    def _require(self, row: CaptionedImage, key: str) -> dict[str, Any]:
        """An entry of a row; encoded again if it was damaged or deleted meanwhile.

        Raises:
            BadImageError: that needs the image, which is no longer what it was.
        """
        entry = self._store.get(key)
        if entry is None:
            for _, fault in self.encode([row]):
                if fault is not None:
                    raise fault
            entry = self._store.get(key)
        assert entry is not None, key
        return entry

    def _lacking_latents(self, row: CaptionedImage, picture: DecodedImage) -> list[_EncodeJob]:
        """What of a picture is still to be encoded; what is known of it without that, is put down."""
        self._store.put(self._picture_key(row), {"fingerprint": picture.fingerprint})
        jobs = [_EncodeJob(row, bool(number), view) for number, view in enumerate(picture.views)]
        return [job for job in jobs if self._latents_key(row, job.flipped) not in self._store]

    def _encode(self, jobs: Sequence[_EncodeJob]) -> Callable[[], None]:
        """Begins to encode the jobs; what it returns puts their latents into the store."""
        with _explain_out_of_memory(self._config):
            levels = torch.stack([to_device(job.view.levels, self._device) for job in jobs])
            mean, std = encode_images(self._encoders.vae, pad_rows(levels, self._config.batch_size))
            finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1)
        return partial(self._put_latents, jobs, copy_to_host_async(mean, std, finite))

    def _put_latents(self, jobs: Sequence[_EncodeJob], fetched: Callable[[], tuple[Tensor, ...]]) -> None:
        mean, std, finite = fetched()
        for number, job in enumerate(jobs):
            part = slice(number, number + 1)
            if not finite[number]:
                raise ValueError(
                    f"{job.row.image}: its latents are not finite in {self._config.vae_precision}: "
                    "set encoding.vae_precision to fp32, or model.vae to madebyollin/sdxl-vae-fp16-fix"
                )
            entry = {
                "latents_mean": mean[part],
                "latents_std": std[part],
                "time_ids": torch.tensor([job.view.time_ids], dtype=torch.int32),
            }
            self._store.put(self._latents_key(job.row, job.flipped), entry)

    def _embed(self, captions: Sequence[Tensor]) -> Callable[[], None]:
        """Begins to embed captions, given as token ids; what it returns puts them into the store."""
        assert self._encoders.text_encoders is not None
        token_ids = pad_rows(torch.cat(list(captions)), self._config.batch_size)
        with _explain_out_of_memory(self._config):
            embeds = embed_captions(self._encoders.text_encoders, token_ids)
        return partial(self._put_texts, captions, copy_to_host_async(*embeds))

    def _put_texts(self, captions: Sequence[Tensor], fetched: Callable[[], tuple[Tensor, ...]]) -> None:
        prompt_embeds, pooled = fetched()
        for number, own_ids in enumerate(captions):
            part = slice(number, number + 1)
            text = {"prompt_embeds": prompt_embeds[part], "pooled_prompt_embeds": pooled[part]}
            self._store.put(self._text_key(own_ids), text)

    def _token_ids(self, caption: str) -> Tensor:
        return tokenize(self._encoders.tokenizers, [caption])

    def _lacks_picture(self, row: CaptionedImage) -> bool:
        keys = [self._picture_key(row), self._latents_key(row)]
        keys += [self._latents_key(row, flipped=True)] if self._config.flip else []
        return any(key not in self._store for key in keys)

    def _lacks_text(self, token_ids: Tensor) -> bool:
        return self._of_text is not None and self._text_key(token_ids) not in self._store

    def _picture_key(self, row: CaptionedImage) -> str:
        return content_key("picture", image=row.id, **self._of_picture)

    def _latents_key(self, row: CaptionedImage, flipped: bool = False) -> str:
        return content_key("latents", image=row.id, flipped=flipped, **self._of_latents)

    def _text_key(self, token_ids: Tensor) -> str:
        assert self._of_text is not None
        return content_key("text", token_ids=token_ids.tolist(), **self._of_text)


def _code_version(modules: Sequence[str], libraries: Sequence[str]) -> dict[str, str]:
    """Return a hash of the code that computes an entry, and the versions of the libraries that it calls."""
    # This module batches and splits what `modules` compute, so its code counts. What it imports does not:
    # every entry would depend on the code of all kinds.
    code = {__name__, *import_closure(*modules, without=_INERT.keys())}
    return {"code": code_digest(code), **{library: version(library) for library in libraries}}


def _weights_digest(model: Any) -> str:
    """Return a hash of a model's configuration, and of its weights in their present precision."""
    config: Mapping[str, object] = (
        model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    )
    meant = {key: value for key, value in config.items() if not key.startswith("_") and "version" not in key}
    digest = hashlib.sha256(json.dumps(meant, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _explain_out_of_memory(config: EncodingConfig) -> Iterator[None]:
    """Turns a full GPU into an error that names the keys to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"encoding.batch_size is {config.batch_size}: so many pictures of {config.resolution} px do not "
            f"fit into the GPU's memory ({error}). Lower it, or encoding.vae_tile ({config.vae_tile})"
        ) from error
