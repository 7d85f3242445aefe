"""Pictures that are nearly the same: perceptual hashes that differ in few bits. Knows no image."""

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 256
NO_MATCH = np.iinfo(np.uint16).max


def nearest_earlier(
    fingerprints: NDArray[np.uint8], stop: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """For each row the nearest of those before it, and in how many bits they differ.

    Compares every row with every other, blockwise.

    Args:
        fingerprints: packed bits, (N, 8 k).
        stop: look among the first `stop` rows only; None: among all.

    Returns:
        Numbers of the nearest rows, the first of equals, (N,), and distances, (N,); `NO_MATCH`
        where there is no row to compare with.
    """
    words = np.ascontiguousarray(fingerprints).view(np.uint64)
    nearest = np.zeros(len(words), dtype=np.int64)
    least = np.full(len(words), NO_MATCH, dtype=np.uint16)
    for start in range(0, len(words), ROWS_AT_ONCE):
        block = words[start : start + ROWS_AT_ONCE]
        others = words[: min(start + len(block), len(words) if stop is None else stop)]
        distances = np.zeros((len(block), len(others)), dtype=np.uint16)
        for word in range(words.shape[1]):
            distances += np.bitwise_count(block[:, word, None] ^ others[None, :, word])
        later = np.arange(len(others))[None, :] >= np.arange(start, start + len(block))[:, None]
        distances[later] = NO_MATCH
        if distances.size:
            rows = slice(start, start + len(block))
            nearest[rows], least[rows] = distances.argmin(axis=1), distances.min(axis=1)
    return nearest, least
