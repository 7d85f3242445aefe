import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdxl_lora.data.near_duplicates import NO_MATCH, ROWS_AT_ONCE, nearest_earlier


@given(st.integers(1, 40), st.integers(0, 45) | st.none(), st.integers(0, 99))
def test_nearest_earlier_row_is_what_comparing_one_by_one_finds(
    count: int, stop: int | None, seed: int
) -> None:
    rows = np.random.default_rng(seed).integers(0, 4, (count, 24), dtype=np.uint8)
    nearest, distances = nearest_earlier(rows, stop)
    bits = np.unpackbits(rows, axis=1)
    for row in range(count):
        earlier = range(min(row, count if stop is None else stop))
        expected = [int((bits[row] != bits[other]).sum()) for other in earlier]
        if expected:
            assert (distances[row], nearest[row]) == (min(expected), expected.index(min(expected)))
        else:
            assert distances[row] == NO_MATCH


def test_blocks_join() -> None:
    count = 2 * ROWS_AT_ONCE + 3
    rows = np.random.default_rng(0).integers(0, 256, (count, 24), dtype=np.uint8)
    rows[-1] = rows[5]
    rows[ROWS_AT_ONCE] = rows[ROWS_AT_ONCE - 1]
    nearest, distances = nearest_earlier(rows)
    assert (nearest[-1], distances[-1]) == (5, 0)
    assert (nearest[ROWS_AT_ONCE], distances[ROWS_AT_ONCE]) == (ROWS_AT_ONCE - 1, 0)
    assert (distances == 0).sum() == 2
