"""Sums that tests compute from a trace of memory."""

from collections.abc import Iterable

from sdxl_lora.memory.trace import Allocate, Event, Free


def peak(events: Iterable[Event]) -> int:
    """Return the most bytes alive at once."""
    sizes, live, most = {}, 0, 0
    for event in events:
        match event:
            case Allocate(key, size):
                sizes[key] = size
                live += size
            case Free(key):
                live -= sizes.pop(key)
        most = max(most, live)
    return most


def allocated_sizes(events: Iterable[Event]) -> list[int]:
    """Return the bytes of each allocation, freed or not."""
    return [event.size for event in events if isinstance(event, Allocate)]
