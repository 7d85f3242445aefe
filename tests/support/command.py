"""The command `sdxl-lora` of the environment that runs the tests."""

import sys
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("sdxl-lora"))
