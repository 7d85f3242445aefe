"""How long tests wait, in one place: so long that only what hangs fails, on a slow or busy machine too.

A test of behaviour never asserts how many seconds something takes. Where it has to give up waiting, it waits
`patience(seconds)`. SDXL_LORA_TEST_PATIENCE multiplies all of these, the limit of a whole test included.
"""

import os

FACTOR = float(os.environ.get("SDXL_LORA_TEST_PATIENCE", "10"))
"""What a quiet machine's seconds are multiplied by: four busy processes on two cores take 3 of it."""
TEST_SECONDS = 120
"""What any test takes at most on a quiet machine, unless `pytest.mark.timeout` says otherwise."""


def patience(seconds: float) -> float:
    """Return how many seconds to wait for what takes `seconds` on a quiet machine."""
    return FACTOR * seconds
