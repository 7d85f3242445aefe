"""PyTorch's CUDA caching allocator as arithmetic: how much GPU memory a program reserves for its tensors.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in its default settings. Knows no tensor and no GPU.
"""

from bisect import bisect_left, insort
from collections.abc import Hashable
from dataclasses import dataclass
from math import inf
from typing import Self

MIB = 2**20
_ROUNDING = 512
_SMALL_REQUEST = MIB  # requests up to this size share small segments, and never lie in a large one
_SMALL_SEGMENT = 2 * MIB
_LARGE_REQUEST = 10 * MIB  # requests below this size share large segments, larger ones get a segment each
_LARGE_SEGMENT = 20 * MIB
_SEGMENT_ROUNDING = 2 * MIB


@dataclass(eq=False, slots=True)
class _Block:
    """A part of a segment, in use or free as a whole."""

    place: int
    """Address of its first byte. Segments get addresses with gaps between them, so that blocks of two
    segments are never neighbours."""
    size: int
    small: bool
    """Whether it lies in a segment for small requests."""
    free: bool = True
    before: Self | None = None
    """The neighbour in the same segment, as `after`."""
    after: Self | None = None


class CachingAllocator:
    """A pool that serves requests from cached segments, and takes another from the GPU where none fits."""

    def __init__(self, limit: float = inf) -> None:
        """Start empty.

        Args:
            limit: the most bytes to take from the GPU.
        """
        self.limit = limit
        self.allocated = 0
        """Bytes in use, each request rounded up to 512."""
        self.reserved = 0
        """Bytes taken from the GPU."""
        self.peak_allocated = 0
        self.peak_reserved = 0
        self._blocks: dict[Hashable, _Block] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {
            True: [],
            False: [],
        }  # by small: (size, place), sorted
        self._free_blocks: dict[int, _Block] = {}
        self._next_place = 0

    def allocate(self, key: Hashable, size: int) -> None:
        """Allocate `size` bytes for the request `key` in the smallest free block that is large enough.

        Raises:
            MemoryError: no block is large enough, and another segment would exceed the limit.
        """
        size = max(_ROUNDING, _rounded(size, _ROUNDING))
        small = size <= _SMALL_REQUEST
        candidates = self._free[small]
        index = bisect_left(candidates, (size, 0))
        block = self._take(candidates[index]) if index < len(candidates) else self._new_segment(size, small)
        # PyTorch's `should_split`: in a large segment a rest of 1 MiB or less stays with the block, unused.
        rest = block.size - size
        if rest >= _ROUNDING if small else rest > _SMALL_REQUEST:
            remainder = _Block(block.place + size, rest, small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = remainder
            block.after, block.size = remainder, size
            self._give(remainder)
        block.free = False
        self._blocks[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def release(self, key: Hashable) -> None:
        """Return the memory of the request `key` to the cache, merged with free neighbours."""
        block = self._blocks.pop(key)
        self.allocated -= block.size
        if block.before is not None and block.before.free:
            block = _merge_free_blocks(self._take((block.before.size, block.before.place)), block)
        if block.after is not None and block.after.free:
            block = _merge_free_blocks(block, self._take((block.after.size, block.after.place)))
        self._give(block)

    def empty_cache(self) -> None:
        """Return every segment that is free as a whole to the GPU."""
        for block in list(self._free_blocks.values()):
            if block.before is None and block.after is None:
                self._take((block.size, block.place))
                self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Let both peaks start from the present values, as `torch.cuda.reset_peak_memory_stats` does."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _new_segment(self, size: int, small: bool) -> _Block:
        size = _segment_size(size)
        if self.reserved + size > self.limit:  # PyTorch gives back its cache before it reports out of memory
            self.empty_cache()
        if self.reserved + size > self.limit:
            raise MemoryError(f"{self.reserved + size} bytes are needed, {self.limit} are allowed")
        block = _Block(self._next_place, size, small)
        self._next_place += size + 1  # a gap: see _Block.place
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _give(self, block: _Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.place))
        self._free_blocks[block.place] = block

    def _take(self, entry: tuple[int, int]) -> _Block:
        block = self._free_blocks.pop(entry[1])
        candidates = self._free[block.small]
        del candidates[bisect_left(candidates, entry)]
        return block


def _rounded(size: int, multiple: int) -> int:
    """Return `size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def _segment_size(size: int) -> int:
    """Return the bytes to take from the GPU for a request of `size`, a multiple of 512, that fits nowhere."""
    if size <= _SMALL_REQUEST:
        return _SMALL_SEGMENT
    if size < _LARGE_REQUEST:
        return _LARGE_SEGMENT
    return _rounded(size, _SEGMENT_ROUNDING)


def _merge_free_blocks(first: _Block, second: _Block) -> _Block:
    """Extend `first` by `second`, its free neighbour, and return it."""
    first.size += second.size
    first.after = second.after
    if second.after is not None:
        second.after.before = first
    return first
