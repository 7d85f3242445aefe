"""Activation checkpointing of chosen blocks (Chen et al. 2016, arXiv:1604.06174).

A unit is a block of the UNet or a layer of a text encoder. A checkpointed one keeps only its input and
recomputes its activations in the backward pass: less memory, more arithmetic, the same numbers.
"""

from collections.abc import Iterable, Mapping
from functools import partial

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

_UNITS = (BasicTransformerBlock, ResnetBlock2D, CLIPEncoderLayer)


def find_units(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return every unit of `parts` by its name, `part.path`, in the order of the modules."""
    return {
        f"{part}.{path}": module
        for part, root in parts.items()
        for path, module in root.named_modules()
        if isinstance(module, _UNITS)
    }


def checkpoint_units(parts: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Make the units of these names recompute their activations in the backward pass."""
    units = find_units(parts)
    for name in names:
        unit = units[name]
        restores_draws = any(isinstance(layer, nn.Dropout) and layer.p > 0 for layer in unit.modules())
        # Saving the generator's state copies it to the CPU, which a graph capture forbids: only for dropout.
        forward = partial(checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=restores_draws)
        unit.forward = forward  # of the instance: class and names of weights stay the same
