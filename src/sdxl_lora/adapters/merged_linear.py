"""Linear layers with low-rank adapters as few matrix products: y = x W^T + b + s (x A^T) B^T.

PEFT computes each adapted layer by itself, in a dozen kernels. Here layers that read the same input, such as
query, key and value of an attention, are computed as one layer whose weights are stacked:

    W (n O, I)    A (n r, I)    B (n, O, r)    of n layers (O, I) with rank r

Nothing is copied to stack them. `pack_adjacent` moved the W's together before training, FlatParameters holds
all A's and all B's side by side (`lora.lora_parameters` has the order), and `cat_or_view` recognises
neighbours by their addresses and returns a view. Elsewhere it copies, with the same result.

Knows PEFT's layers and no model.
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
    """Return the output of each of `layers` for the same inputs.

    Layers that `is_mergeable` refuses, with dropout for example, run one by one in PEFT's forward.

    Args:
        layers: linear layers of equal shape. Neighbours in memory in this order are the fastest.
        inputs: (..., in_features).

    Returns:
        A tensor for each layer, (..., out_features).
    """
    if not all(is_mergeable(layer) for layer in layers):
        return tuple(layer(inputs) for layer in layers)
    return project_merged(layers, inputs)


def project_merged(layers: Sequence[Any], inputs: Tensor) -> tuple[Tensor, ...]:
    """Return the same for layers that are all mergeable."""
    bases = [layer.base_layer for layer in layers]
    biases = [base.bias for base in bases if base.bias is not None]
    downs = [layer.lora_A[ADAPTER_NAME].weight for layer in layers]
    ups = [layer.lora_B[ADAPTER_NAME].weight for layer in layers]
    runs = adjacent_runs(bases)
    bias = cat_or_view(biases) if biases else None
    scale = layers[0].scaling[ADAPTER_NAME]  # equal for all, as they have one PEFT configuration
    return _AdaptedLinears.apply(inputs, runs, bias, scale, *downs, *ups)  # type: ignore[no-untyped-call]


def _merged_weight(layers: Sequence[nn.Linear]) -> Tensor:
    """Return the weights of neighbouring equal layers stacked, (n O, I); dequantised in one kernel."""
    if all(isinstance(layer, QuantizedLinear) for layer in layers):
        codes, scales = (
            cat_or_view([layer.get_buffer(name) for layer in layers]) for name in ("codes", "scales")
        )
        return unpack(codes, scales, layers[0].in_features)
    return cat_or_view([layer.weight for layer in layers])


def is_mergeable(layer: nn.Module) -> bool:
    """Return whether `layer` is one that `_AdaptedLinears` can compute.

    That is: PEFT's plain LoRA (no DoRA or other variant), switched on, not merged into the weight, without
    dropout, on an ordinary or quantised linear layer.
    """
    return (
        isinstance(layer, LoraLinear)
        and not layer.disable_adapters
        and not layer.merged
        and not layer.lora_variant
        and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
        and isinstance(layer.lora_dropout[ADAPTER_NAME], nn.Identity)
    )


def cat_or_view(tensors: Sequence[Tensor]) -> Tensor:
    """Return contiguous tensors of equal shape as one along their first dimension, detached.

    A view if they lie one behind the other in memory, else a copy. Not differentiable: `_AdaptedLinears`
    computes the gradients of the parts itself.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    if all(_is_adjacent(tensor, before, first.numel()) for before, tensor in pairwise(tensors)):
        shape = (len(tensors) * first.shape[0], *first.shape[1:])
        # The view reads beyond `first`: by the check above, the other tensors are what lies there. It is
        # taken in each forward pass and not kept, because `FlatParameters.view_into` moves parameters.
        return first.detach().as_strided(shape, first.stride())
    return torch.cat([tensor.detach() for tensor in tensors])


def cat_columns_or_view(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors (M, O) as one, (M, n O): a view if they are the columns of such a tensor, else a copy.

    They are where the attention kernels write the gradients so (`kernels.attention_ops._empty_gradients`).
    """
    (rows, width), n = tensors[0].shape, len(tensors)
    adjoin = all(_is_adjacent(tensor, before, width) for before, tensor in pairwise(tensors))
    if adjoin and tensors[0].stride() == (n * width, 1):
        return tensors[0].as_strided((rows, n * width), tensors[0].stride())
    return torch.cat(list(tensors), dim=1)


def _is_adjacent(tensor: Tensor, before: Tensor, distance: int) -> bool:
    """Return whether `tensor`, with the strides of `before`, begins `distance` elements behind it."""
    return (
        tensor.storage_offset() == before.storage_offset() + distance
        # The storage's identity, and not data_ptr(): tensors of two allocations may touch by chance, and on
        # the `meta` device every address is 0.
        and tensor.untyped_storage()._cdata == before.untyped_storage()._cdata
        and tensor.stride() == before.stride()
    )


def _frozen_tensors(layer: nn.Module) -> list[Tensor]:
    """Return a frozen linear layer's tensors: weight or codes and scales, and its bias."""
    return [*layer.parameters(), *layer.buffers()]


def adjacent_runs(layers: Sequence[nn.Linear]) -> list[list[nn.Linear]]:
    """Split equal layers into runs whose tensors follow one another in memory.

    One product serves a run. The text projection of a UNet has a run for each attention, since weights of
    different attentions are not packed together.
    """
    runs = [[layers[0]]]
    for before, layer in pairwise(layers):
        both = zip(_frozen_tensors(layer), _frozen_tensors(before), strict=True)
        if all(_is_adjacent(tensor, other, other.numel()) for tensor, other in both):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def pack_adjacent(tensors: Sequence[Tensor]) -> None:
    """Move equal tensors into one block of memory, one behind the other in this order.

    Costs no memory in the end: the old storages are freed as the last reference to them goes.
    """
    block = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, block.chunk(len(tensors)), strict=True):
        tensor.data = part


class _AdaptedLinears(torch.autograd.Function):
    """n linear layers of the same input, each with a low-rank update; gradients for input and adapters.

    Saves x and s x A^T, (M, n r), for the backward pass. The frozen weights are reached through `runs` and
    not saved: a quantised weight is dequantised again in the backward pass, and never kept.
    """

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
            runs: the frozen layers, whose weights are W, (n O, I), neighbours together. A run's weight is
                read, or dequantised, only when its product is computed.
            bias: b of all layers, frozen, (n O,).
            scale: s = alpha / r.
            adapters: A of each layer, (r, I), then B of each layer, (O, r). Separate arguments, so that
                autograd delivers a gradient to each parameter; their memory is one.

        Returns:
            y of each layer, (..., O).
        """
        n = len(adapters) // 2
        down, up = cat_or_view(adapters[:n]), _stack_or_view(adapters[n:])
        x = inputs.reshape(-1, inputs.shape[-1])
        y = _frozen_product(x, runs, bias)
        hidden = _scaled_product(x, down.T, scale)  # s x A^T, (M, n r)
        _by_layer(y, n).baddbmm_(_by_layer(hidden, n), up.mT)  # into y: no second tensor (M, n O)
        ctx.save_for_backward(x, hidden, down, up)
        ctx.runs, ctx.scale, ctx.shape = runs, scale, inputs.shape
        return tuple(part.view(*inputs.shape[:-1], -1) for part in y.chunk(n, dim=1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, and of every A and B.

        With h = s x A^T: dB = dy^T h, dh = dy B, dA = s dh^T x, dx = dy W + s dh A.
        """
        x, hidden, down, up = ctx.saved_tensors
        n, scale = len(gradients), ctx.scale
        dys = [gradient.reshape(len(x), -1) for gradient in gradients]
        dy = cat_columns_or_view(dys)
        dhidden = torch.empty_like(hidden)  # (M, n r), so that all layers' dA are one product
        torch.bmm(_by_layer(dy, n), up, out=_by_layer(dhidden, n))
        dup = torch.bmm(_by_layer(dy, n).mT, _by_layer(hidden, n))
        ddown = _scaled_product(dhidden.T, x, scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _frozen_gradient(dy, ctx.runs).addmm_(dhidden, down, alpha=scale).view(ctx.shape)
        return (dx, None, None, None, *ddown.chunk(n), *dup)


def _frozen_product(x: Tensor, runs: Sequence[Sequence[nn.Linear]], bias: Tensor | None) -> Tensor:
    """Return the frozen layers' part of y, x W^T + b, (M, n O)."""
    if len(runs) == 1:
        return linear(x, _merged_weight(runs[0]), bias)
    sizes = _widths(runs)
    y = x.new_empty(len(x), sum(sizes))
    for run, part in zip(runs, y.split(sizes, dim=1), strict=True):
        torch.mm(x, _merged_weight(run).T, out=part)
    return y if bias is None else y.add_(bias)


def _frozen_gradient(dy: Tensor, runs: Sequence[Sequence[nn.Linear]]) -> Tensor:
    """Return the frozen layers' part of the gradient of x, dy W, (M, I)."""
    dx = dy.new_empty(len(dy), runs[0][0].in_features)  # not zeroed: the first product ignores it, beta = 0
    for number, (run, part) in enumerate(zip(runs, dy.split(_widths(runs), dim=1), strict=True)):
        dx.addmm_(part, _merged_weight(run), beta=min(number, 1))
    return dx


def _widths(runs: Sequence[Sequence[nn.Linear]]) -> list[int]:
    """Return the number of output features of each run."""
    return [len(run) * run[0].out_features for run in runs]


def _stack_or_view(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors (O, r) as one, (n, O, r): a view if they are neighbours."""
    return cat_or_view(tensors).view(len(tensors), *tensors[0].shape)


def _by_layer(tensor: Tensor, n: int) -> Tensor:
    """Return (M, n k) as a view (n, M, k)."""
    return tensor.view(len(tensor), n, -1).transpose(0, 1)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return the product times `scale`, in one kernel; `out` is not read, as beta is 0."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)
