"""Latent cache: encoded images and captions, kept by content; encodes what is missing and reads examples.

An example consists of three entries: `image`, the perceptual hash; `latents`, the VAE's output, with a second
entry for the mirrored image; `text`, the embeddings of frozen text encoders. Each has a key made of all that
it depends on, so that a change encodes only what depends on it.
"""

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from sdxl_lora.kernels.padding import pad_rows
from sdxl_lora.models.loading import DTYPES
from sdxl_lora.models.tokenizers import tokenize
from sdxl_lora.runtime.device import compute_fingerprint
from sdxl_lora.runtime.import_closure import INERT, code_digest, import_closure
from sdxl_lora.runtime.transfers import copy_to_host_async, to_device
from sdxl_lora.storage.content_store import ContentStore, content_key

_IMAGE_CODE = ("sdxl_lora.data.image_loader",)
_LATENTS_CODE = (*_IMAGE_CODE, "sdxl_lora.data.image_encoder", "sdxl_lora.kernels.padding")
_TEXT_CODE = ("sdxl_lora.data.caption_encoder", "sdxl_lora.kernels.padding")
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
"""Batches left on the GPU while older ones are written: one that it computes, and the next one queued."""
_TOKEN_ROWS = 78
"""Embeddings of a caption: 77 of tokens and the pooled one."""
_ENTRY_OVERHEAD = 2**11
"""Bytes of an entry besides its large tensors: header, digest, token ids or time ids."""


@dataclass(frozen=True)
class _EncodeJob:
    """A crop that is still to be encoded."""

    row: CaptionedImage
    flipped: bool
    view: View


@dataclass
class _Pending:
    """What one call of `LatentCache.encode` has read but not yet written."""

    jobs: dict[torch.Size, list[_EncodeJob]] = field(default_factory=lambda: defaultdict(list))
    """Crops that wait for a full batch, by their shape."""
    captions: list[Tensor] = field(default_factory=list)
    """Token ids that wait for a full batch, (1, 2, 77) each."""
    batches: deque[Callable[[], None]] = field(default_factory=deque)
    """Batches that the GPU was given, oldest first: each waits for its results and writes them."""

    def write_all_but(self, count: int) -> None:
        """Write the oldest batches until `count` are left.

        CUDA kernels run asynchronously. Writing a batch as soon as it was started would wait for it, and the
        GPU would idle while the CPU writes its results and collects the next one.
        """
        while len(self.batches) > count:
            write = self.batches.popleft()
            write()


class LatentCache:
    """The content store, seen with the keys of one configuration of models and params."""

    def __init__(self, store: ContentStore, encoders: Encoders, config: EncodingConfig, images: Path) -> None:
        """Compute the parts of the keys that are the same for all images and captions.

        Args:
            images: folder of the image files.
        """
        self._store, self._encoders, self._config, self._images = store, encoders, config, images
        self._device = encoders.vae.device
        self._of_image = {"code": _code_version(_IMAGE_CODE, _IMAGE_LIBRARIES)}
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
        """Encode what the store lacks of these rows, in batches of one size.

        An image's latents and a caption's embeddings are written when their batch is full, or at the end:
        a row that was yielded may be written later.

        Yields:
            Each row, with the fault of its image if it cannot be used: first the rows whose image is in the
            store, then the others in their order.

        Raises:
            ValueError: latents are not finite, or a batch does not fit into the GPU's memory.
            OSError: an image file is missing.
        """
        pending = _Pending()
        for row, image in self._with_missing_images(rows):
            if isinstance(image, BadImageError):
                yield row, image
                continue
            if image is not None:
                self._add_image(row, image, pending)
            self._add_captions(row, pending)
            pending.write_all_but(_IN_FLIGHT)
            yield row, None
        pending.batches.extend(map(self._encode_batch, pending.jobs.values()))
        if pending.captions:
            pending.batches.append(self._embed_batch(pending.captions))
        pending.write_all_but(0)

    def _with_missing_images(
        self, rows: Sequence[CaptionedImage]
    ) -> Iterator[tuple[CaptionedImage, DecodedImage | BadImageError | None]]:
        """Yield each row with its decoded image, or the image's fault; None if the store has its latents."""
        missing = [row for row in rows if self._lacks_image(row)]
        ids = {row.id for row in missing}
        yield from ((row, None) for row in rows if row.id not in ids)
        # The workers ask `_lacks_image` again: another process may have encoded the image in the meantime.
        decoded = decode_images(missing, self._images, self._config, self._lacks_image)
        yield from zip(missing, decoded, strict=True)

    def _add_image(self, row: CaptionedImage, image: DecodedImage, pending: _Pending) -> None:
        """Write an image's perceptual hash; queue its crops, and start encoding batches that became full."""
        self._store.put(self._image_key(row), {"fingerprint": image.fingerprint})
        for number, view in enumerate(image.views):
            job = _EncodeJob(row, bool(number), view)  # the second view is the mirrored one
            if self._latents_key(row, job.flipped) in self._store:
                continue
            jobs = pending.jobs[view.levels.shape]
            jobs.append(job)
            if len(jobs) == self._config.batch_size:
                pending.batches.append(self._encode_batch(pending.jobs.pop(view.levels.shape)))

    def _add_captions(self, row: CaptionedImage, pending: _Pending) -> None:
        """Queue the row's captions that the store lacks, and start embedding batches that became full."""
        for caption in row.captions:
            token_ids = self._token_ids(caption)
            if self._lacks_text(token_ids):
                pending.captions.append(token_ids)
            if len(pending.captions) == self._config.batch_size:
                pending.batches.append(self._embed_batch(pending.captions))
                pending.captions = []

    def example(self, row: CaptionedImage, variant: Variant = FIRST) -> Batch:
        """Return the example of a row that was encoded, as a batch of one."""
        token_ids = self._token_ids(row.captions[variant.caption])
        latents = self._get_or_encode(row, self._latents_key(row, variant.flipped))
        text = self._get_or_encode(row, self._text_key(token_ids)) if self._of_text is not None else {}
        embeds = {"prompt_embeds": None, "pooled_prompt_embeds": None, **text}
        return Batch(**latents, token_ids=token_ids, **embeds)

    def size(self, row: CaptionedImage) -> Size:
        """Return the width and height that a row's image was encoded at, pixels."""
        if self._config.aspect_ratios == "square":
            return self._config.resolution, self._config.resolution
        height, width = self._get_or_encode(row, self._latents_key(row))["time_ids"][0, 4:].tolist()
        return width, height

    def fingerprint(self, row: CaptionedImage) -> Tensor:
        """Return the perceptual hash of a row's image: packed bits, uint8, (24,)."""
        return self._get_or_encode(row, self._image_key(row))["fingerprint"]

    def num_bytes(self, row: CaptionedImage) -> int:
        """Return an upper bound of the size of a row's encoded example, bytes."""
        pixels_per_latent = 2 ** (len(self._encoders.vae.config.block_out_channels) - 1)
        widths = [encoder.config.hidden_size for encoder in self._encoders.text_encoders or ()]
        return max_example_bytes(self._config, pixels_per_latent, sum(widths), len(row.captions))

    def _get_or_encode(self, row: CaptionedImage, key: str) -> dict[str, Any]:
        """Return an entry of a row; encode the row again if the entry was damaged or deleted meanwhile.

        Raises:
            BadImageError: the image is needed for that and has changed since.
        """
        entry = self._store.get(key)
        if entry is None:
            for _, fault in self.encode([row]):
                if fault is not None:
                    raise fault
            entry = self._store.get(key)
        assert entry is not None, key
        return entry

    def _encode_batch(self, jobs: Sequence[_EncodeJob]) -> Callable[[], None]:
        """Start encoding crops of one shape; the returned function waits for the latents and writes them."""
        with _explain_out_of_memory(self._config):
            levels = torch.stack([to_device(job.view.levels, self._device) for job in jobs])
            # Every batch has batch_size rows: kernels choose their order of sums by shape, so that a row's
            # bits then do not depend on how many others it was encoded with.
            mean, std = encode_images(self._encoders.vae, pad_rows(levels, self._config.batch_size))
            finite = (mean.isfinite() & std.isfinite()).flatten(1).all(1)  # on the GPU: no wait here
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

    def _embed_batch(self, captions: Sequence[Tensor]) -> Callable[[], None]:
        """Start embedding token ids; the returned function waits for the embeddings and writes them."""
        assert self._encoders.text_encoders is not None
        token_ids = pad_rows(torch.cat(list(captions)), self._config.batch_size)
        with _explain_out_of_memory(self._config):
            embeds = embed_captions(self._encoders.text_encoders, token_ids)
        return partial(self._put_texts, captions, copy_to_host_async(*embeds))

    def _put_texts(self, captions: Sequence[Tensor], fetched: Callable[[], tuple[Tensor, ...]]) -> None:
        prompt_embeds, pooled = fetched()
        for number, token_ids in enumerate(captions):  # rows behind them are padding
            part = slice(number, number + 1)
            text = {"prompt_embeds": prompt_embeds[part], "pooled_prompt_embeds": pooled[part]}
            self._store.put(self._text_key(token_ids), text)

    def _token_ids(self, caption: str) -> Tensor:
        return tokenize(self._encoders.tokenizers, [caption])

    def _lacks_image(self, row: CaptionedImage) -> bool:
        keys = [self._image_key(row), self._latents_key(row)]
        keys += [self._latents_key(row, flipped=True)] if self._config.flip else []
        return any(key not in self._store for key in keys)

    def _lacks_text(self, token_ids: Tensor) -> bool:
        return self._of_text is not None and self._text_key(token_ids) not in self._store

    def _image_key(self, row: CaptionedImage) -> str:
        return content_key("image", image=row.id, **self._of_image)

    def _latents_key(self, row: CaptionedImage, flipped: bool = False) -> str:
        return content_key("latents", image=row.id, flipped=flipped, **self._of_latents)

    def _text_key(self, token_ids: Tensor) -> str:
        assert self._of_text is not None
        return content_key("text", token_ids=token_ids.tolist(), **self._of_text)


def max_example_bytes(
    config: EncodingConfig, pixels_per_latent: int, embedding_width: int, num_captions: int = 1
) -> int:
    """Return an upper bound of an encoded example's size, bytes.

    No bucket has more pixels than the square. A mirrored image has latents of its own.

    Args:
        pixels_per_latent: pixels of a side that one latent stands for.
        embedding_width: width of prompt_embeds; 0 if text encoders are trained and nothing is embedded.
    """
    moments = 2 * 4 * (config.resolution // pixels_per_latent) ** 2  # mean and deviation, 4 channels each
    latents = (1 + config.flip) * moments * DTYPES[config.vae_precision].itemsize
    text = _TOKEN_ROWS * embedding_width * DTYPES[config.text_precision].itemsize + _ENTRY_OVERHEAD
    return latents + num_captions * text + _ENTRY_OVERHEAD


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
    """Replace an out-of-memory error by one that names the keys to lower."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"encoding.batch_size is {config.batch_size}: that many images of {config.resolution} px do not "
            f"fit into the GPU's memory ({error}). Lower it, or encoding.vae_tile ({config.vae_tile})"
        ) from error
