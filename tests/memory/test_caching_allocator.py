"""The allocator against PyTorch's rules worked out by hand, and on a GPU against PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_lora.memory.caching_allocator import MIB, CachingAllocator


def reserved(*sizes: int) -> int:
    """Return the bytes that allocations of these sizes, all kept, take from the GPU."""
    allocator = CachingAllocator()
    for key, size in enumerate(sizes):
        allocator.allocate(key, size)
    return allocator.reserved


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([9 * MIB, 9 * MIB], 20 * MIB),
        ([9 * MIB, 9 * MIB, 9 * MIB], 40 * MIB),
        ([10 * MIB], 10 * MIB),
        ([10 * MIB + 1], 12 * MIB),
        ([MIB, 9 * MIB], 22 * MIB),  # small requests have segments of their own
    ],
)
def test_segments_have_pytorchs_sizes(sizes: list[int], expected: int) -> None:
    assert reserved(*sizes) == expected


def test_smallest_block_that_fits_is_taken_and_split() -> None:
    allocator = CachingAllocator()
    allocator.allocate("large", 40 * MIB)
    allocator.allocate("larger", 60 * MIB)
    allocator.release("large")
    allocator.release("larger")
    allocator.allocate("fits the first", 38 * MIB)
    allocator.allocate("fits the second", 59 * MIB)
    assert allocator.reserved == 100 * MIB
    assert (
        allocator.allocated == 38 * MIB + 60 * MIB
    )  # what is left of the second is too small to be split off


def test_free_neighbours_are_joined() -> None:
    allocator = CachingAllocator()
    for key in range(4):
        allocator.allocate(key, 5 * MIB)
    for key in (0, 2, 1):
        allocator.release(key)
    allocator.allocate("three in one", 15 * MIB)
    assert allocator.reserved == 20 * MIB


def test_gap_that_nothing_fits_in_stays_reserved() -> None:
    allocator = CachingAllocator()
    for key in range(4):
        allocator.allocate(key, 5 * MIB)
    allocator.release(0)
    allocator.release(2)
    allocator.allocate("wider than a gap", 6 * MIB)
    assert allocator.reserved == 40 * MIB


def test_empty_cache_returns_whole_segments_alone() -> None:
    allocator = CachingAllocator()
    for key, size in enumerate([30 * MIB, 5 * MIB, 5 * MIB]):
        allocator.allocate(key, size)
    allocator.release(0)
    allocator.release(1)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    assert allocator.peak_reserved == 50 * MIB


def test_cache_is_given_up_at_the_limit_and_no_earlier() -> None:
    allocator = CachingAllocator(limit=50 * MIB)
    allocator.allocate("first", 30 * MIB)
    allocator.release("first")
    allocator.allocate("second", 40 * MIB)
    assert allocator.peak_reserved == 40 * MIB
    with pytest.raises(MemoryError):
        allocator.allocate("third", 11 * MIB)


@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.booleans()), max_size=60))
def test_memory_is_neither_lost_nor_given_twice(program: list[tuple[int, bool]]) -> None:
    allocator, alive = CachingAllocator(), []
    for key, (size, releases) in enumerate(program):
        allocator.allocate(key, size)
        alive.append(key)
        if releases:
            allocator.release(alive.pop(size % len(alive)))
        assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    for key in alive:
        allocator.release(key)
    assert allocator.allocated == 0
    allocator.empty_cache()
    assert allocator.reserved == 0


@pytest.mark.gpu
@given(st.lists(st.tuples(st.integers(1, 30 * MIB), st.booleans()), max_size=60))
def test_reserves_what_pytorch_reserves(program: list[tuple[int, bool]]) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    allocator, alive = CachingAllocator(), {}
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):  # whatever other tests left behind serves no request
        for key, (size, releases) in enumerate(program):
            allocator.allocate(key, size)
            alive[key] = torch.empty(size, dtype=torch.uint8, device="cuda")
            if releases:
                chosen = list(alive)[size % len(alive)]
                allocator.release(chosen)
                del alive[chosen]
            assert torch.cuda.memory_reserved() - before == allocator.reserved
