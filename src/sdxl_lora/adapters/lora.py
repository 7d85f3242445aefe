"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on SDXL, by PEFT: adding, saving, loading, switching.

A layer W gets the update W + (alpha / rank) B A, with A (rank, in) drawn at random and B (out, rank) zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import Parameter

from sdxl_lora.adapters.lora_file import WEIGHTS_FILE, peft_header, saved_lora, split_by_part
from sdxl_lora.config import LoraConfig
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.storage.atomic_io import explain_write_errors
from sdxl_lora.storage.safetensors_io import read_header, write_tensors

ADAPTER_NAME = "default"


def add_adapters(
    unet: UNet2DConditionModel, text_encoders: Sequence[Any] | None, config: LoraConfig, seed: int
) -> None:
    """Gives the layers that `config` names trainable adapters, in fp32, that change nothing yet.

    The last layer of the first text encoder gets none: SDXL reads that encoder's penultimate layer, so no
    gradient would reach it.

    Raises:
        ValueError: a name in `config` matches no layer.
    """
    _add_adapter(unet, _adapter_config(config, unet, config.unet_modules, "lora.unet_modules"), seed, "unet")
    for number, text_encoder in enumerate(text_encoders or ()):
        names, key = config.text_encoder_modules, "lora.text_encoder_modules"
        peft_config = _adapter_config(config, text_encoder, names, key)
        if number == 0:
            peft_config.layers_to_transform = list(range(text_encoder.config.num_hidden_layers - 1))
            peft_config.layers_pattern = "layers"
        _add_adapter(text_encoder, peft_config, seed, f"text_encoder_{number + 1}")


def _adapter_config(config: LoraConfig, module: nn.Module, names: Sequence[str], key: str) -> PeftConfig:
    """PEFT's configuration for the layers of `module` that `names` match, as params key `key` has them."""
    layers = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for name in names:
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            endings = {".".join(layer.split(".")[-depth:]) for layer in layers for depth in (1, 2)}
            near = get_close_matches(name, sorted(endings), n=4, cutoff=0.0)
            raise ValueError(
                f"{key}: {name!r} matches no layer of {type(module).__name__}; "
                f"the nearest names that do: {', '.join(near)}"
            )
    return PeftConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(names)
    )


def _add_adapter(module: Any, config: PeftConfig, seed: int, name: str) -> None:
    """Adds the adapter and draws each A from a generator of its own, so that it depends on its name alone."""
    module.add_adapter(config, adapter_name=ADAPTER_NAME)
    for path, parameter in module.named_parameters():
        if ".lora_A." in path:
            draws = torch.randn(parameter.shape, generator=keyed_generator(seed, "lora", name, path))
            parameter.data = draws.div_(config.r).to(parameter.device)
        elif ".lora_B." in path:
            parameter.data = torch.zeros_like(parameter, dtype=torch.float32)


def lora_parameters(module: nn.Module) -> list[Parameter]:
    """The adapters' weights: every A in the order of the module's layers, then every B.

    So laid out, the weights of neighbouring layers are neighbours, and one product serves several layers.
    """
    parameters = dict(module.named_parameters())
    return [parameters[name] for matrix in (".lora_A.", ".lora_B.") for name in parameters if matrix in name]


@contextmanager
def adapter_strength(modules: Sequence[nn.Module], value: float) -> Iterator[None]:
    """Multiplies the adapters' updates by `value` while the block runs; at 0 they are left out altogether."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.scale_layer(value) if value else layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer() if value else layer.enable_adapters(True)


def save_lora(
    folder: Path,
    unet: UNet2DConditionModel,
    text_encoders: Sequence[Any] | None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the adapters as diffusers reads them: one safetensors file, whose header holds rank and alpha.

    Args:
        metadata: more entries of the header; no secrets, no paths.
    """
    parts = named_parts(unet, text_encoders)
    layers = {f"{name}_lora_layers": adapter_weights(name, module) for name, module in parts.items()}
    headers = {f"{name}_lora_adapter_metadata": _portable_config(module) for name, module in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with explain_write_errors(folder / WEIGHTS_FILE), TemporaryDirectory(dir=folder.parent) as partial:
        StableDiffusionXLLoraLoaderMixin.save_lora_weights(partial, **layers, **headers)
        path = Path(partial, WEIGHTS_FILE)
        write_tensors(folder / WEIGHTS_FILE, load_file(path), {**read_header(path), **(metadata or {})})


def load_lora(folder: Path, unet: UNet2DConditionModel, text_encoders: Sequence[Any] | None) -> None:
    """Puts saved adapters onto the base model that they were trained on, in its precision, to be evaluated.

    Raises:
        FileNotFoundError: nothing was saved in `folder`.
        ValueError: the file's adapters are not for these modules, or not for just their layers.
    """
    path = saved_lora(folder)
    weights, configs = split_by_part(load_file(path)), split_by_part(peft_header(path))
    parts = named_parts(unet, text_encoders)
    if set(weights) != set(parts):
        raise ValueError(
            f"{path} holds adapters for {sorted(weights)}, the model at hand is {sorted(parts)}: "
            "set model.text_encoders as it was in training"
        )
    for name, module in parts.items():
        module.add_adapter(PeftConfig(**configs[name]), adapter_name=ADAPTER_NAME)
        for parameter in lora_parameters(module):
            parameter.data = parameter.data.to(module.dtype)
        own_names = {_module_key(key, module): tensor for key, tensor in weights[name].items()}
        known = set(get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME))
        if known != set(own_names):
            raise ValueError(
                f"{path} does not fit the base model's {name}; in one of them alone: "
                f"{sorted(known ^ set(own_names))[:3]}: set model.base as it was in training"
            )
        set_peft_model_state_dict(module, own_names, ADAPTER_NAME)
        module.eval()  # PEFT adds dropout switched on


def named_parts(unet: UNet2DConditionModel, text_encoders: Sequence[Any] | None) -> dict[str, Any]:
    """The adapted modules under the names that diffusers gives them in adapter files."""
    return dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *(text_encoders or ())), strict=False))


def adapter_weights(part: str, module: nn.Module) -> dict[str, Tensor]:
    """The adapters' weights on the CPU in fp32, named as all tools name them.

    Recent transformers dropped the first text encoder's `text_model.` level; files keep it.
    """
    prefix = "text_model." if part == "text_encoder" and not hasattr(module, "text_model") else ""
    state = get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME)
    return {f"{prefix}{key}": tensor.detach().float().cpu().contiguous() for key, tensor in state.items()}


def _module_key(key: str, module: nn.Module) -> str:
    """The name that `module` itself has for a file's key."""
    return key if hasattr(module, "text_model") else key.removeprefix("text_model.")


def _portable_config(module: Any) -> dict[str, Any]:
    """PEFT's configuration as others need it: in a fixed order, without dropout and local paths."""
    config = module.peft_config[ADAPTER_NAME]
    return {
        **config.to_dict(),
        "base_model_name_or_path": None,
        "lora_dropout": 0.0,  # diffusers leaves it switched on when it draws
        "target_modules": sorted(config.target_modules),  # a set: another order in every process
    }
