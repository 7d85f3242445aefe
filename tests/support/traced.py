"""What the tests read from a trace of memory."""

from collections.abc import Iterable

from sdxl_lora.memory.trace import Event


def peak(events: Iterable[Event]) -> int:
    """Most bytes alive at once."""
    sizes, live, most = {}, 0, 0
    for event in events:
        if event.kind == "allocate":
            sizes[event.key] = event.size
            live += event.size
        elif event.kind == "free":
            live -= sizes.pop(event.key)
        most = max(most, live)
    return most
