"""The files of the base model and its VAE: which ones are needed, and where they are. Loads no weights."""

from collections.abc import Iterable
from pathlib import Path

from sdxl_lora.config import ModelConfig
from sdxl_lora.storage.repository import file_digest, find_local_copy, open_repository

_VAE_FILE = "diffusion_pytorch_model.safetensors"
_VAE_FILES = ["config.json", _VAE_FILE]


def open_base(config: ModelConfig) -> Path:
    """Return the base model's folder: configurations, tokenizers, and weights of the variant in `config`."""
    return open_repository(config.base, config.revision, "model.base", _base_files(config))


def _base_files(config: ModelConfig) -> list[str]:
    """Return globs of the base model's files that are read."""
    weights = f"*.{config.variant}.safetensors" if config.variant else "*.safetensors"
    parts = ("unet", "text_encoder", "text_encoder_2", "vae")
    patterns = ["model_index.json", "scheduler/*", "tokenizer/*", "tokenizer_2/*"]
    patterns += [f"{part}/*.json" for part in parts]
    return patterns + [f"{part}/{weights}" for part in parts if part != "vae" or config.vae is None]


def open_vae(config: ModelConfig) -> Path:
    """Return the folder of the replacement VAE that `config` names."""
    return open_repository(str(config.vae), str(config.vae_revision), "model.vae", _VAE_FILES)


def local_models(config: ModelConfig) -> dict[str, Path | None]:
    """Return the local folders of the base model and of the replacement VAE, if there is one, by params key.

    None for a folder that is missing or incomplete. Neither uses the network nor checks contents.
    """
    models = {"model.base": find_local_copy(config.base, config.revision, _base_files(config))}
    if config.vae is not None:
        models["model.vae"] = find_local_copy(config.vae, str(config.vae_revision), _VAE_FILES)
    return models


def weight_digests(config: ModelConfig) -> dict[str, str]:
    """Return the SHA-256 of each part's weight files. Reads all of them: seconds at SDXL's size."""
    vae = None if config.vae is None else open_vae(config)
    return {part: file_digests(files) for part, files in weight_files(config, open_base(config), vae).items()}


def weight_files(config: ModelConfig, base: Path, vae: Path | None) -> dict[str, list[Path]]:
    """Return the weight files of each part.

    Args:
        config: says which variant is used.
        base: the base model's folder.
        vae: the folder of the replacement VAE, if there is one.
    """
    name = f"*.{config.variant}.safetensors" if config.variant else "*.safetensors"
    files = {part: sorted((base / part).glob(name)) for part in ("unet", "text_encoder", "text_encoder_2")}
    files["vae"] = sorted((base / "vae").glob(name)) if vae is None else sorted(vae.glob(_VAE_FILE))
    return files


def file_digests(files: Iterable[Path]) -> str:
    """Return the SHA-256 of each file, separated by commas."""
    return ",".join(file_digest(path) for path in files)
