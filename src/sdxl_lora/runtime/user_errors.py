"""Errors that a user can correct, told as one line and an exit status: by stages and by commands alike."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sdxl_lora.storage.atomic_io import with_remedy

_USER_ERRORS = (ValueError, OSError, FloatingPointError)

logger = logging.getLogger("sdxl_lora")


@contextmanager
def exit_on_user_error(name: str) -> Iterator[None]:
    """End the process with status 1 and `name: message` on stderr if the block raises a user's error.

    Any other error is a defect of the program and keeps its traceback.
    """
    try:
        yield
    except _USER_ERRORS as error:
        logger.debug("traceback", exc_info=True)
        sys.exit(f"{name}: {with_remedy(error) if isinstance(error, OSError) else error}")
