"""A record of every allocation that a program makes on a device, without the program's arithmetic.

On tensors of the `meta` device a program takes seconds and no memory: each kernel computes the shape of its
result only. Independent of SDXL and of the GPU's allocator.

PyTorch has no public interface for four things that are needed here. Each such line says why. The tests of
this module pass with torch 2.13.0 and 2.14.1, and with 2.10.0 but for tensors of 0 bytes, which its
checkpointing makes on a CPU.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

# Private: the rule by which ATen's convolutions choose channels_last. `is_contiguous(memory_format=...)` is
# true of both formats where there is one channel, and then does not tell which one is meant.
from torch._prims_common import suggest_memory_format

# Underscored modules, but the ones that PyTorch's documentation names for extending it.
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FUSED_KERNELS = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
_SCRATCH: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten._safe_softmax.default: lambda scores, *_: torch.empty_like(scores, dtype=torch.bool),
    torch.ops.aten._softmax_backward_data.default: lambda gradient, *_: torch.empty_like(gradient),
}
"""Temporary tensors of plain attention that CUDA allocates and `meta` does not: which scores are infinite
(`_safe_softmax`, ATen/native/transformers/attention.cpp), and the gradient times the probabilities
(`softmax_backward_cuda_out`, ATen/native/cuda/SoftMax.cu)."""


@dataclass(frozen=True, slots=True)
class Allocate:
    """Memory of a new tensor."""

    key: int
    """Number of the allocation, unique within a trace."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Free:
    """The end of the allocation `key`."""

    key: int


@dataclass(frozen=True, slots=True)
class NeedWorkspace:
    """The first matrix product of a thread: cuBLAS allocates scratch memory here, and keeps it.

    It does so once in the forward pass and once in the backward pass, which autograd runs in another thread.
    """

    thread: int
    """0 in the forward pass, 1 in the backward pass."""


@dataclass(frozen=True, slots=True)
class EnterUnit:
    """The start of a unit's forward pass."""

    unit: int


@dataclass(frozen=True, slots=True)
class LeaveUnit:
    """The end of a unit's forward pass."""

    unit: int


@dataclass(frozen=True, slots=True)
class EnterBackward:
    """A gradient reaches an output of a unit: its backward pass starts. Occurs once for each output."""

    unit: int


Event = Allocate | Free | NeedWorkspace | EnterUnit | LeaveUnit | EnterBackward


class MemoryTrace(TorchDispatchMode):
    """A context that records every allocation on a device, and its end.

    Works on tensors of any device; those of the `meta` device cost nothing.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self.total_flops = 0
        """Floating point operations: matrix products, convolutions, attention."""
        self.flops: list[int] = []
        """Those of each unit's forward pass."""
        self.outputs: list[set[int]] = []
        """Allocations that hold the outputs of each unit's forward pass."""
        self._device = device
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._allocations = 0
        self._unit: int | None = None
        self._lack_workspace: set[int] = set()
        self._attention = ExitStack()

    def __enter__(self) -> Self:
        self._attention.enter_context(_gpu_attention())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        self._attention.close()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _leaves_meta(func, args, kwargs):
            return torch.empty_like(args[0], device=kwargs["device"], dtype=kwargs.get("dtype"))
        if func.overloadpacket in _PRODUCTS:
            self._take_workspace()
        result = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and _is_channels_last(*args[:2]):
            # cuDNN returns channels_last here, and `meta` does not: later layers would copy to restore the
            # format, and copies would be counted that no GPU makes.
            result = result.contiguous(memory_format=torch.channels_last)
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.total_flops += flops
            if self._unit is not None:
                self.flops[self._unit] += flops
        if not _returns_its_argument(func):
            self.hold([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        if func in _SCRATCH:
            self.hold([_SCRATCH[func](*args)])  # no reference is kept, so it is freed at once
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Record the memory of tensors as allocated now, unless it is known already."""
        for tensor in tensors:
            if tensor.device.type != self._device.type:
                continue
            # All tensors of a storage return the same Python object, which lives as long as the memory does.
            # So its id identifies the memory (`data_ptr()` is 0 on `meta`), and the end of its weak reference
            # is the end of the memory. Only then can another storage get the same id.
            storage = tensor.untyped_storage()
            if id(storage) in self._known:
                continue
            key, size = self._allocations, storage.nbytes()
            self._allocations += 1
            self._known[id(storage)] = (key, weakref.ref(storage, partial(self._forget, id(storage))))
            self.events.append(Allocate(key, size))

    def _take_workspace(self) -> None:
        # Private: -1 outside a backward pass. Python's thread cannot tell, since autograd runs in the calling
        # one on `meta` and CPU. torch.utils.checkpoint asks the same function.
        thread = int(torch._C._current_graph_task_id() >= 0)
        if thread in self._lack_workspace:
            self._lack_workspace.remove(thread)
            self.events.append(NeedWorkspace(thread))

    def _forget(self, storage_id: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        key, _ = self._known.pop(storage_id)
        self.events.append(Free(key))

    def keys(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the allocations that hold these tensors."""
        storage_ids = (id(tensor.untyped_storage()) for tensor in tensors)
        return {self._known[storage_id][0] for storage_id in storage_ids if storage_id in self._known}

    @contextmanager
    def watching(self, units: Iterable[nn.Module]) -> Iterator[None]:
        """Record the ends of each unit's forward pass, the start of its backward pass, and workspaces.

        Counts of operations start at 0. A unit may not contain another.
        """
        hooks = []
        self.total_flops, self.flops, self.outputs = 0, [], []
        self._lack_workspace = {0, 1}
        for number, unit in enumerate(units):
            self.flops.append(0)
            self.outputs.append(set())
            hooks.append(unit.register_forward_pre_hook(lambda *_, number=number: self._enter(number)))
            hooks.append(
                unit.register_forward_hook(lambda *args, number=number: self._leave(number, args[-1]))
            )
        yield
        for hook in hooks:
            hook.remove()

    def _enter(self, unit: int) -> None:
        self._unit = unit
        self.events.append(EnterUnit(unit))

    def _leave(self, unit: int, output: Any) -> None:
        self._unit = None
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.outputs[unit] = self.keys(tensors)
        self.events.append(LeaveUnit(unit))
        for tensor in tensors:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: self.events.append(EnterBackward(unit)))


def live_bytes(events: Iterable[Event]) -> int:
    """Return the bytes that are still allocated after `events`."""
    sizes: dict[int, int] = {}
    for event in events:
        match event:
            case Allocate(key, size):
                sizes[key] = size
            case Free(key):
                del sizes[key]
    return sum(sizes.values())


@cache
def _returns_its_argument(func: Any) -> bool:
    """Return whether the result lies in an argument's memory: views, and changes in place."""
    # Private: the operator's schema, the only place that tells views and changes in place from new results.
    return any(result.alias_info is not None for result in func._schema.returns)


def _is_channels_last(*tensors: Tensor) -> bool:
    """Return whether a convolution of these images and weights runs in channels_last: one asks for it."""
    return any(suggest_memory_format(tensor) == torch.channels_last for tensor in tensors)


def _leaves_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether this copies a tensor without data to a device where tensors have data."""
    device = kwargs.get("device")
    copies = func is torch.ops.aten._to_copy.default and args[0].device.type == "meta"
    return copies and device is not None and torch.device(device).type != "meta"


@contextmanager
def _gpu_attention() -> Iterator[None]:
    """Run attention on `meta` as a GPU does: by a kernel that keeps no (length, length) matrix.

    PyTorch chooses among its kernels by device, and for `meta` falls back on plain arithmetic. All the fused
    ones keep the same: the output, and a log-sum-exp for each row.
    """
    # Private: a `torch.library.Library` that is taken back at the end of the block. The public class stays
    # registered until it is collected, and would change attention on `meta` for the rest of the process.
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _fused_attention, "AutogradMeta")
        yield


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `scaled_dot_product_attention` by the memory-efficient kernel: any mask, any head dimension.

    By plain arithmetic where the caller switched the fused kernels off (`torch.nn.attention.sdpa_kernel`).
    """
    # Operators with underscores, since the public function would call this one again.
    if not any(enabled() for enabled in _FUSED_KERNELS):  # type: ignore[no-untyped-call]
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, **options)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    needs_grad = any(tensor.requires_grad for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
