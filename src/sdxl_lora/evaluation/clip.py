"""CLIP (Radford et al. 2021, arXiv:2103.00020): feature vectors of images and texts in one space."""

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from sdxl_lora.config import EvaluationConfig
from sdxl_lora.storage.repository import open_repository


class ImageTextScorer:
    """CLIP in fp32: feature vectors of images and texts, whose cosine says how well they match."""

    def __init__(self, config: EvaluationConfig, device: torch.device) -> None:
        """Load the CLIP that `config` names, from safetensors. Raises as `open_repository`."""
        patterns = ["*.json", "*.txt", "model.safetensors"]
        folder = open_repository(config.clip_model, config.clip_revision, "evaluation.clip_model", patterns)
        self._model = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        self._model.to(device).eval()
        self._processor = CLIPProcessor.from_pretrained(folder)
        self._batch_size = config.batch_size

    @property
    def logit_scale(self) -> float:
        """The inverse of CLIP's temperature."""
        return self._model.logit_scale.exp().item()

    @torch.no_grad()
    def image_features(self, images: Iterable[Image]) -> Tensor:
        """Return feature vectors of length 1, on the CPU, (N, D); reads one batch of images at a time."""
        batches, rest = [], iter(images)
        while batch := list(islice(rest, self._batch_size)):
            inputs = self._processor.image_processor(images=batch, return_tensors="pt")
            batches.append(self._model.get_image_features(**inputs.to(self._model.device)).pooler_output)
        return normalize(torch.cat(batches), dim=-1).cpu()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Return feature vectors of length 1, on the CPU, (N, D); long texts are truncated."""
        length = self._model.config.text_config.max_position_embeddings
        inputs = self._processor.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        return normalize(
            self._model.get_text_features(**inputs.to(self._model.device)).pooler_output, dim=-1
        ).cpu()
