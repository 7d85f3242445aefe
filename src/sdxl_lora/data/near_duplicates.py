"""Near duplicates: images whose perceptual hashes differ in few bits. This module sees only the hashes."""

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 256  # bounds the memory of a block of distances: 256 x N uint16
NO_MATCH = np.iinfo(np.uint16).max


def nearest_earlier(
    fingerprints: NDArray[np.uint8], stop: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Find for each row the nearest earlier row, and the number of bits in which they differ.

    Compares every row with every earlier one, in blocks of rows.

    Args:
        fingerprints: packed bits, uint8, (N, 8 k).
        stop: compare with the first `stop` rows only; None: with all.

    Returns:
        Indices of the nearest rows (the first, if several are equally near), (N,), and distances, (N,).
        The distance is `NO_MATCH` for a row without earlier rows.
    """
    words = np.ascontiguousarray(fingerprints).view(np.uint64)  # 8 bytes at a time: an eighth of the passes
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
