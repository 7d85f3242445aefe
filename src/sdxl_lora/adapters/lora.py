"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on SDXL, by PEFT: adding, saving, loading, switching.

A layer W becomes W + s B A, with A (rank, in) drawn at random, B (out, rank) zero, and PEFT's scale s. A part
is one adapted model, under diffusers' name for it: `unet`, `text_encoder` or `text_encoder_2`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
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


_SEED_NAMES = {"unet": "unet", "text_encoder": "text_encoder_1", "text_encoder_2": "text_encoder_2"}
"""Names of the parts in the keys of their random starts. Another name is another start."""


def named_parts(unet: UNet2DConditionModel, text_encoders: Sequence[Any] | None) -> dict[str, Any]:
    """Return the adapted models by part; `text_encoders` None: the UNet alone."""
    return dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *(text_encoders or ())), strict=False))


def add_adapters(parts: Mapping[str, Any], config: LoraConfig, seed: int) -> None:
    """Give the layers that `config` names trainable adapters, in fp32, that change nothing yet.

    Raises:
        ValueError: a name in `config` matches no layer.
    """
    for part, module in parts.items():
        names = config.unet_modules if part == "unet" else config.text_encoder_modules
        key = "lora.unet_modules" if part == "unet" else "lora.text_encoder_modules"
        peft_config = _adapter_config(config, module, names, key)
        if part == "text_encoder":
            # SDXL reads this encoder's penultimate layer: no gradient would reach an adapter on the last one.
            peft_config.layers_to_transform = list(range(module.config.num_hidden_layers - 1))
            peft_config.layers_pattern = "layers"
        _add_adapter(module, peft_config, seed, _SEED_NAMES[part])


def _adapter_config(config: LoraConfig, module: nn.Module, names: Sequence[str], key: str) -> PeftConfig:
    """Return PEFT's configuration for the layers of `module` that `names`, of params key `key`, match.

    An option of the adapter is passed to PEFT here and nowhere else. Training reads it from PEFT's layers,
    and what handles files reads it from PEFT's configuration in their header (`lora_file.peft_scale`).
    """
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
    """Add the adapter, and draw each A from a generator keyed by its name alone."""
    module.add_adapter(config, adapter_name=ADAPTER_NAME)
    for path, parameter in module.named_parameters():
        if ".lora_A." in path:
            # PEFT's "gaussian" start, with a standard deviation of 1 / rank.
            draws = torch.randn(parameter.shape, generator=keyed_generator(seed, "lora", name, path))
            parameter.data = draws.div_(config.r).to(parameter.device)
        elif ".lora_B." in path:
            parameter.data = torch.zeros_like(parameter, dtype=torch.float32)


# The order of adapters, in memory and in products. Training lays the parameters of `lora_parameters` side by
# side in one tensor (training/flat_parameters). Attention multiplies the layers of `layers_of_same_input`
# together, and reads their A's, and their B's, as one view of that tensor (merged_linear.cat_or_view). That
# takes the same order in both functions: the one in which modules register their layers. With two orders all
# results stay right, but each step copies each group. tests/training/test_adapter_order.py counts the views.


def lora_parameters(module: nn.Module) -> list[Parameter]:
    """Return the adapters' weights: every A in the order of the module's layers, then every B."""
    parameters = dict(module.named_parameters())  # in the order of registration, depth first
    return [parameters[name] for matrix in (".lora_A.", ".lora_B.") for name in parameters if matrix in name]


def layers_of_same_input(module: nn.Module, names: Collection[str]) -> list[Any]:
    """Return the children of these names, which read the same input, in the order of `lora_parameters`."""
    return [child for name, child in module.named_children() if name in names]


@contextmanager
def adapter_strength(modules: Sequence[nn.Module], value: float) -> Iterator[None]:
    """Multiply the adapters' updates by `value` while the block runs; 0 switches them off."""
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.scale_layer(value) if value else layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.unscale_layer() if value else layer.enable_adapters(True)


def save_lora(folder: Path, parts: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write the adapters as diffusers reads them: a safetensors file with PEFT's configuration in its header.

    Args:
        metadata: more entries of the header; no secrets, no paths.
    """
    layers = {f"{name}_lora_layers": adapter_weights(name, module) for name, module in parts.items()}
    headers = {f"{name}_lora_adapter_metadata": _portable_config(module) for name, module in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with explain_write_errors(folder / WEIGHTS_FILE), TemporaryDirectory(dir=folder.parent) as partial:
        StableDiffusionXLLoraLoaderMixin.save_lora_weights(partial, **layers, **headers)
        path = Path(partial, WEIGHTS_FILE)
        write_tensors(folder / WEIGHTS_FILE, load_file(path), {**read_header(path), **(metadata or {})})


def load_lora(folder: Path, parts: Mapping[str, Any]) -> None:
    """Put saved adapters onto the base model that they were trained on, in its precision, for evaluation.

    Raises:
        FileNotFoundError: nothing was saved in `folder`.
        ValueError: the file's adapters are for other parts, or for other layers.
    """
    path = saved_lora(folder)
    weights, configs = split_by_part(load_file(path)), split_by_part(peft_header(path))
    if set(weights) != set(parts):
        raise ValueError(
            f"{path} holds adapters for {sorted(weights)}, the model at hand is {sorted(parts)}: "
            "set model.text_encoders as it was in training"
        )
    for name, module in parts.items():
        module.add_adapter(PeftConfig(**configs[name]), adapter_name=ADAPTER_NAME)
        for parameter in lora_parameters(module):
            parameter.data = parameter.data.to(module.dtype)
        saved = {_module_key(key, module): tensor for key, tensor in weights[name].items()}
        expected = set(get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME))
        if expected != set(saved):
            raise ValueError(
                f"{path} does not fit the base model's {name}; in one of them alone: "
                f"{sorted(expected ^ set(saved))[:3]}: set model.base as it was in training"
            )
        set_peft_model_state_dict(module, saved, ADAPTER_NAME)
        module.eval()  # PEFT adds dropout switched on


def adapter_weights(part: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' weights on the CPU in fp32, named as all tools name them.

    Recent transformers dropped the first text encoder's `text_model.` level; files keep it.
    """
    prefix = "text_model." if part == "text_encoder" and not hasattr(module, "text_model") else ""
    state = get_peft_model_state_dict(module, adapter_name=ADAPTER_NAME)
    return {f"{prefix}{key}": tensor.detach().float().cpu().contiguous() for key, tensor in state.items()}


def _module_key(key: str, module: nn.Module) -> str:
    """Return the name that `module` has for a file's key."""
    return key if hasattr(module, "text_model") else key.removeprefix("text_model.")


def _portable_config(module: Any) -> dict[str, Any]:
    """Return PEFT's configuration as files need it: in a fixed order, without dropout and local paths."""
    config = module.peft_config[ADAPTER_NAME]
    return {
        **config.to_dict(),
        "base_model_name_or_path": None,
        "lora_dropout": 0.0,  # diffusers leaves dropout switched on in inference
        "target_modules": sorted(config.target_modules),  # a set: another order in every process
    }
