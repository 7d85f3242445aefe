"""The base model's modules without its weights: made from configuration files of a few KB, on any device.

Memory and time depend on shapes alone. Those of SDXL base 1.0 are constants here, so that nothing is
downloaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_lora.config import ModelConfig, Precision
from sdxl_lora.models.loading import DTYPES, freeze
from sdxl_lora.models.text_encoders import TextEncoders
from sdxl_lora.storage.repository import open_repository

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_Settings = Mapping[str, Any]


@dataclass(frozen=True)
class SDXLArchitecture:
    """The contents of the base model's configuration files."""

    unet: _Settings
    vae: _Settings
    text_encoder: _Settings
    text_encoder_2: _Settings

    @property
    def embedding_widths(self) -> tuple[int, int]:
        """The widths of prompt_embeds and of pooled_prompt_embeds."""
        first, second = self.text_encoder["hidden_size"], self.text_encoder_2["hidden_size"]
        return first + second, self.text_encoder_2["projection_dim"]

    @property
    def pixels_per_latent(self) -> int:
        """The side of the square of pixels that one latent encodes."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)

    def make_unet(self, precision: Precision, device: torch.device) -> UNet2DConditionModel:
        """Return the UNet, frozen, with random weights; on the `meta` device, without any."""
        with _default_dtype_and_device(precision, device):
            return freeze(UNet2DConditionModel.from_config(dict(self.unet)), device)

    def make_vae(self, precision: Precision, device: torch.device) -> "AutoencoderKL":
        """Return the VAE, likewise."""
        from diffusers import AutoencoderKL  # loads 44 modules, which training does not need

        with _default_dtype_and_device(precision, device):
            return freeze(AutoencoderKL.from_config(dict(self.vae)), device)

    def make_text_encoders(self, precision: Precision, device: torch.device) -> TextEncoders:
        """Return both text encoders, likewise."""
        options = {"dtype": DTYPES[precision]}  # or transformers uses the dtype of the configuration files
        first = CLIPTextConfig(**{**self.text_encoder, **options})
        second = CLIPTextConfig(**{**self.text_encoder_2, **options})
        with _default_dtype_and_device(precision, device):
            return freeze(CLIPTextModel(first), device), freeze(CLIPTextModelWithProjection(second), device)


SDXL_BASE = SDXLArchitecture(
    unet={
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    vae={
        "sample_size": 1024,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    },
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in the files; for 2, transformers takes the highest id, 49407, as the end
        "pad_token_id": 1,
    },
    text_encoder_2={
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in the files; for 2, transformers takes the highest id, 49407, as the end
        "pad_token_id": 1,
    },
)
"""SDXL base 1.0 (Podell et al. 2023, arXiv:2307.01952, section 2).

The contents of its */config.json, without values that are the libraries' defaults. Compared with the copies
in github.com/PRITHIVSAKTHIUR/AI-Art-Generator-SDXL, commit a04712f.
"""

_BASE_NAME = "stabilityai/stable-diffusion-xl-base-1.0"
KNOWN_VAES = {
    "madebyollin/sdxl-vae-fp16-fix": {**SDXL_BASE.vae, "sample_size": 512, "force_upcast": False},
}
"""Checked against HunyuanDiT's config of the same VAE; the original file was not available."""


def read_architecture(config: ModelConfig) -> SDXLArchitecture:
    """Return the shapes of the model that `config` names: constants, or read from its folder or the Hub.

    Raises:
        ValueError, OSError: as `open_repository`.
    """
    shapes = SDXL_BASE if config.base == _BASE_NAME else _read_base_architecture(config)
    if config.vae is None:
        return shapes
    if config.vae in KNOWN_VAES:
        return replace(shapes, vae=KNOWN_VAES[config.vae])
    from diffusers import AutoencoderKL  # as above

    folder = open_repository(config.vae, str(config.vae_revision), "model.vae", ["config.json"])
    return replace(shapes, vae=AutoencoderKL.load_config(folder))


def _read_base_architecture(config: ModelConfig) -> SDXLArchitecture:
    from diffusers import AutoencoderKL  # as above

    folder: Path = open_repository(config.base, config.revision, "model.base", ["*/config.json"])
    return SDXLArchitecture(
        unet=UNet2DConditionModel.load_config(folder / "unet"),
        vae=AutoencoderKL.load_config(folder / "vae"),
        text_encoder=CLIPTextConfig.from_pretrained(folder / "text_encoder").to_dict(),
        text_encoder_2=CLIPTextConfig.from_pretrained(folder / "text_encoder_2").to_dict(),
    )


@contextmanager
def _default_dtype_and_device(precision: Precision, device: torch.device) -> Iterator[None]:
    """Create the block's modules on `device`, with parameters in `precision`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[precision])
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)
