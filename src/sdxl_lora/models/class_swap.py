"""Swapping the classes of a model's modules for ones with the same weights and fewer kernels.

`fused_blocks`, `fused_layers`, `fused_unet` and `fused_text_encoder` hold such classes.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

Classes = Mapping[type[nn.Module], type[nn.Module]]
"""The class to put in place of each class of diffusers, transformers or PEFT. Subclasses keep theirs."""


def swap_classes(module: nn.Module, classes: Classes) -> None:
    """Give the module and its parts the classes that `classes` has for them, in place.

    A class may have a static method `supports(part)`: where it returns False, the part keeps its class.
    """
    for part in list(module.modules()):
        fused: Any = classes.get(type(part))
        if fused is not None and getattr(fused, "supports", _supports_all)(part):
            # Another class, not another object: weights, their names, hooks and PEFT's references stay, so
            # what saves or loads the model sees what it always saw. A fused class must add no state to its
            # parent's, since its `__init__` does not run. To type checkers the part keeps its old class.
            part.__class__ = fused


def _supports_all(part: nn.Module) -> bool:  # noqa: ARG001
    return True
