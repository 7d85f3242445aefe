"""Runs an unmodified script with limited GPU memory and records the memory that PyTorch's allocator held.

    python benchmarks/watched.py REPORT VRAM_GIB|none SCRIPT [ARGUMENT ...]

SIGINT ends it cleanly. It imports nothing of this project, because the script's folder comes first on the
path.
"""

import json
import runpy
import signal
import sys
from pathlib import Path

import torch

GIB = 2**30


def main() -> None:
    report, vram_gib, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    if vram_gib != "none":
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(vram_gib) * GIB / total))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    outcome = "ok"
    try:
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        sys.exit()  # the observer has enough steps
    except torch.OutOfMemoryError:
        outcome = "out of memory"
        raise
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
        raise
    finally:
        held: dict[str, str | float] = {"outcome": outcome}
        if torch.cuda.is_available():
            held["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 3)
            held["allocated_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
        Path(report).write_text(json.dumps(held), encoding="utf-8")


if __name__ == "__main__":
    main()
