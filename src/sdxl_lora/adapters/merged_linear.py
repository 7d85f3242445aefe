"""Linear layers with low-rank adapters as few matrix products: y = x W^T + b + s (x A^T) B^T.

PEFT computes each adapted layer by itself, with a dozen kernels. Layers that read the same input, such as the
query, key and value of an attention, are one layer here whose weights stand side by side. Knows PEFT's
layers, no model.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from sdxl_lora.adapters.lora import ADAPTER_NAME
from sdxl_lora.kernels.quantized_linear import QuantizedLinear, unpack


def project(layers: Sequence[nn.Module], inputs: Tensor) -> tuple[Tensor, ...]:
    """What each of `layers` makes of the same inputs, in one product for each run of neighbours.

    Args:
        layers: linear layers of equal shape.
        inputs: (..., in_features).

    Returns:
        A tensor for each layer, (..., out_features).
    """
    if not all(is_mergeable(layer) for layer in layers):
        return tuple(layer(inputs) for layer in layers)
    return project_merged(layers, inputs)


def project_merged(layers: Sequence[Any], inputs: Tensor) -> tuple[Tensor, ...]:
    """The same for layers that `is_mergeable` all."""
    bases = [layer.base_layer for layer in layers]
    biases = [base.bias for base in bases if base.bias is not None]
    downs = [layer.lora_A[ADAPTER_NAME].weight for layer in layers]
    ups = [layer.lora_B[ADAPTER_NAME].weight for layer in layers]
    runs = adjacent_runs(bases)
    bias = cat_or_view(biases) if biases else None
    scale = layers[0].scaling[ADAPTER_NAME]
    return _AdaptedLinears.apply(inputs, runs, bias, scale, *downs, *ups)  # type: ignore[no-untyped-call]


def _merged_weight(layers: Sequence[nn.Linear]) -> Tensor:
    """The weights of equal layers side by side, (n O, I); of quantised layers written out in one go."""
    if all(isinstance(layer, QuantizedLinear) for layer in layers):
        codes, scales = (
            cat_or_view([layer.get_buffer(name) for layer in layers]) for name in ("codes", "scales")
        )
        return unpack(codes, scales, layers[0].in_features)
    return cat_or_view([layer.weight for layer in layers])


def is_mergeable(layer: nn.Module) -> bool:
    """Whether PEFT adapts `layer` in the one way that `_AdaptedLinears` knows: plain, on, without dropout."""
    return (
        isinstance(layer, LoraLinear)
        and not layer.disable_adapters
        and not layer.merged
        and not layer.lora_variant
        and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
        and isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity)
    )


def cat_or_view(tensors: Sequence[Tensor]) -> Tensor:
    """Equal tensors as one along their first dimension: a view where they are neighbours in memory."""
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if all(_is_adjacent(tensor, before, first.numel()) for before, tensor in pairwise(tensors)):
        shape = (len(tensors) * first.shape[0], *first.shape[1:])
        return first.detach().as_strided(shape, first.stride())
    return torch.cat([tensor.detach() for tensor in tensors])


def cat_columns_or_view(tensors: Sequence[Tensor]) -> Tensor:
    """Equal tensors (M, O) as one, (M, n O): a view where their rows lie as that has them."""
    (rows, width), n = tensors[0].shape, len(tensors)
    adjoin = all(_is_adjacent(tensor, before, width) for before, tensor in pairwise(tensors))
    if adjoin and tensors[0].stride() == (n * width, 1):
        return tensors[0].as_strided((rows, n * width), tensors[0].stride())
    return torch.cat(list(tensors), dim=1)


def _is_adjacent(tensor: Tensor, before: Tensor, distance: int) -> bool:
    """Whether `tensor`, laid out as `before`, begins `distance` numbers behind it in the same memory."""
    return (
        tensor.storage_offset() == before.storage_offset() + distance
        and tensor.untyped_storage()._cdata == before.untyped_storage()._cdata
        and tensor.stride() == before.stride()
    )


def _frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """What a frozen linear layer computes with: weight or codes and scales, and its bias."""
    return [*layer.parameters(), *layer.buffers()]


def adjacent_runs(layers: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Splits equal layers into runs whose tensors follow one another in memory."""
    runs = [[layers[0]]]
    for before, layer in pairwise(layers):
        both = zip(_frozen_tensors(layer), _frozen_tensors(before), strict=True)
        if all(_is_adjacent(tensor, other, other.numel()) for tensor, other in both):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def pack_adjacent(tensors: Sequence[Tensor]) -> None:
    """Moves equal tensors' values into one block of memory, each to its place after the one before."""
    block = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, block.chunk(len(tensors)), strict=True):
        tensor.data = part


class _AdaptedLinears(torch.autograd.Function):
    """n linear layers of the same input, each with a low-rank update; gradients for input and adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        runs: Sequence[Sequence[nn.Linear]],
        bias: Tensor | None,
        scale: float,
        *adapters: Tensor,
    ) -> tuple[Tensor, ...]:
        """Symbols: M rows of input, I features in, O out, rank r.

        Args:
            inputs: x, (..., I).
            runs: the frozen layers, whose weights are W, (n O, I), those that are neighbours together. Each
                run's weight is read, written out if it is quantised, when its product's turn has come.
            bias: b of all layers, frozen, (n O,).
            scale: s = alpha / r.
            adapters: A of each layer, (r, I), then B of each layer, (O, r).

        Returns:
            y of each layer, (..., O).
        """
        n = len(adapters) // 2
        down, up = cat_or_view(adapters[:n]), _stack_or_view(adapters[n:])
        x = inputs.reshape(-1, inputs.shape[-1])
        y = _frozen_product(x, runs, bias)
        hidden = _scaled_product(x, down.T, scale)  # s x A^T, (M, n r)
        _by_layer(y, n).baddbmm_(_by_layer(hidden, n), up.mT)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.runs, ctx.scale, ctx.shape = runs, scale, inputs.shape
        return tuple(part.view(*inputs.shape[:-1], -1) for part in y.chunk(n, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of every A and B."""
        x, hidden, down, up = ctx.saved_tensors
        n, scale = len(gradients), ctx.scale
        dys = [gradient.reshape(len(x), -1) for gradient in gradients]
        dy = cat_columns_or_view(dys)
        dhidden = torch.empty_like(hidden)
        torch.bmm(_by_layer(dy, n), up, out=_by_layer(dhidden, n))
        dup = torch.bmm(_by_layer(dy, n).mT, _by_layer(hidden, n))
        ddown = _scaled_product(dhidden.T, x, scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _frozen_gradient(dy, ctx.runs).addmm_(dhidden, down, alpha=scale).view(ctx.shape)
        return (dx, None, None, None, *ddown.chunk(n), *dup)


def _frozen_product(x: Tensor, runs: Sequence[Sequence[nn.Linear]], bias: Tensor | None) -> Tensor:
    """The frozen layers' part of y, x W^T + b, (M, n O)."""
    if len(runs) == 1:
        return linear(x, _merged_weight(runs[0]), bias)
    sizes = _widths(runs)
    y = x.new_empty(len(x), sum(sizes))
    for run, part in zip(runs, y.split(sizes, dim=1), strict=True):
        torch.mm(x, _merged_weight(run).T, out=part)
    return y if bias is None else y.add_(bias)


def _frozen_gradient(dy: Tensor, runs: Sequence[Sequence[nn.Linear]]) -> Tensor:
    """The same part of the gradient of x, dy W, (M, I)."""
    dx = dy.new_empty(len(dy), runs[0][0].in_features)
    for number, (run, part) in enumerate(zip(runs, dy.split(_widths(runs), dim=1), strict=True)):
        dx.addmm_(part, _merged_weight(run), beta=min(number, 1))
    return dx


def _widths(runs: Sequence[Sequence[nn.Linear]]) -> list[int]:
    """How many features each run's layers have together."""
    return [len(run) * run[0].out_features for run in runs]


def _stack_or_view(tensors: Sequence[Tensor]) -> Tensor:
    """(O, r) tensors as (n, O, r), a view where they are neighbours."""
    return cat_or_view(tensors).view(len(tensors), *tensors[0].shape)


def _by_layer(tensor: Tensor, n: int) -> Tensor:
    """(M, n k) as a view (n, M, k)."""
    return tensor.view(len(tensor), n, -1).transpose(0, 1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The product times `scale`, in one kernel."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
