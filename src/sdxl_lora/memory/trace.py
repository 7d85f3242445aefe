"""What a program holds in memory, followed allocation by allocation without its arithmetic.

On tensors of the `meta` device a program takes seconds where the GPU would take its memory: every kernel says
only what shape its result has. Knows neither SDXL nor the GPU's allocator.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FUSED_KERNELS = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm}
_SCRATCH_EVENT: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten._safe_softmax.default: lambda scores, *_: torch.empty_like(scores, dtype=torch.bool),
    torch.ops.aten._softmax_backward_data.default: lambda gradient, *_: torch.empty_like(gradient),
}
"""What CUDA makes for itself in plain attention beside the result, and `meta` does not: which scores are
infinite (`_safe_softmax`, ATen/native/transformers/attention.cpp), and the gradient times the probabilities
(`softmax_backward_cuda_out`, ATen/native/cuda/SoftMax.cu)."""

_EventKind = Literal["allocate", "free", "workspace", "enter", "leave", "backward"]


class Event(NamedTuple):
    """Something that happened to memory, or a boundary of a unit of the program.

    `workspace`: cuBLAS first needs scratch memory here, and keeps it. It does so once in the forward pass and
    once in the backward pass, which autograd runs in a thread of its own.
    """

    kind: _EventKind
    key: int
    """Number of the allocation or the boundary's unit; of a workspace 1 in the backward pass, else 0."""
    size: int
    """Bytes of an allocation, else 0."""


class MemoryTrace(TorchDispatchMode):
    """Writes down every allocation on a device and its end, while the block runs.

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
        """Allocations that each unit's forward pass hands on."""
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
            result = result.contiguous(memory_format=torch.channels_last)  # as cuDNN; `meta` forgets it
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
            self.total_flops += flops
            if self._unit is not None:
                self.flops[self._unit] += flops
        if not _returns_its_argument(func):
            self.hold([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        if func in _SCRATCH_EVENT:
            self.hold([_SCRATCH_EVENT[func](*args)])  # freed at once
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts the memory of tensors as allocated now, unless it is counted already."""
        for tensor in tensors:
            if tensor.device.type != self._device.type:
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self._known:
                continue
            key, size = self._allocations, storage.nbytes()
            self._allocations += 1
            self._known[address] = (key, weakref.ref(storage, partial(self._forget, address)))
            self.events.append(Event("allocate", key, size))

    def _take_workspace(self) -> None:
        thread = int(torch._C._current_graph_task_id() >= 0)  # so checkpointing tells a backward pass, too
        if thread in self._lack_workspace:
            self._lack_workspace.remove(thread)
            self.events.append(Event("workspace", thread, 0))

    def _forget(self, address: int, _: weakref.ref[torch.UntypedStorage]) -> None:
        key, _ = self._known.pop(address)
        self.events.append(Event("free", key, 0))

    def keys(self, tensors: Iterable[Tensor]) -> set[int]:
        """The allocations that hold these tensors."""
        addresses = (tensor.untyped_storage()._cdata for tensor in tensors)
        return {self._known[address][0] for address in addresses if address in self._known}

    @contextmanager
    def watching(self, units: Iterable[nn.Module]) -> Iterator[None]:
        """Marks the ends of each unit's forward pass, the start of its backward pass, and workspaces.

        Counts arithmetic anew.
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
        self.events.append(Event("enter", unit, 0))

    def _leave(self, unit: int, output: Any) -> None:
        self._unit = None
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.outputs[unit] = self.keys(tensors)
        self.events.append(Event("leave", unit, 0))
        for tensor in tensors:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(lambda _: self.events.append(Event("backward", unit, 0)))


@cache
def _returns_its_argument(func: Any) -> bool:
    """Whether the result lies in an argument's memory: views, and changes in place."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _is_channels_last(*tensors: Tensor) -> bool:
    """Whether a convolution of these images and weights is done in channels_last: one of them asks for it."""
    return any(suggest_memory_format(tensor) == torch.channels_last for tensor in tensors)


def _leaves_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this copies a tensor without data to where there must be some."""
    device = kwargs.get("device")
    copies = func is torch.ops.aten._to_copy.default and args[0].device.type == "meta"
    return copies and device is not None and torch.device(device).type != "meta"


@contextmanager
def _gpu_attention() -> Iterator[None]:
    """Attention on `meta` as a GPU does it, by a kernel that keeps no (length, length) matrix.

    PyTorch chooses among its kernels by device, and for `meta` falls back on plain arithmetic. All the fused
    ones keep the same: the output, and a log-sum-exp for each row.
    """
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
    """`scaled_dot_product_attention` by the memory-efficient kernel, which takes any mask and any width.

    By plain arithmetic where the caller switched the fused kernels off (`torch.nn.attention.sdpa_kernel`).
    """
    if not any(enabled() for enabled in _FUSED_KERNELS):  # type: ignore[no-untyped-call]
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, attn_mask, **options)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    needs_grad = any(tensor.requires_grad for tensor in (query, key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale)[0]
