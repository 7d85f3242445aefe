"""GPU memory polled from the driver, which includes processes that report nothing themselves."""

import threading
from types import TracebackType
from typing import Any, Self, TypedDict

import pynvml
import torch

from sdxl_lora.runtime.device import peak_memory_gib

GIB = 2**30
PERIOD = 0.02  # seconds; the allocator keeps what it once held, so a slow poll misses little


class DeviceMemory:
    """Peak memory used on the current GPU while the block runs, minus the memory used at its start.

    Includes CUDA's context, libraries and the allocator's cache. Nothing else may use the GPU meanwhile.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._before = 0
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    @property
    def peak_gib(self) -> float | None:
        """Return the peak, GiB; None on a machine without a GPU."""
        return None if self._handle is None else round((self._peak - self._before) / GIB, 3)

    def __enter__(self) -> Self:
        if torch.cuda.is_available():
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties().uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
            self._before = self._peak = self._used()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _poll(self) -> None:
        while not self._stop.wait(PERIOD):
            self._peak = max(self._peak, self._used())


class AllocatorPeaks(TypedDict):
    """Fields of a result that PyTorch's allocator reports."""

    peak_reserved_gib: float | None
    peak_allocated_gib: float | None


def allocator_peaks(device: torch.device) -> AllocatorPeaks:
    """Return the peak memory that PyTorch's allocator held, and that tensors took, GiB; None on a CPU."""
    if device.type != "cuda":
        return {"peak_reserved_gib": None, "peak_allocated_gib": None}
    return {
        "peak_reserved_gib": round(peak_memory_gib(device), 3),
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated(device) / GIB, 3),
    }
