"""What a new process has loaded after it imported or ran a stage."""

import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_IMPORT = "import importlib; importlib.import_module('stages.' + sys.argv[1])"
_RUN = "import runpy; runpy.run_module('stages.' + sys.argv[1], run_name='__main__')"
_REPORT = "print(json.dumps(list(sys.modules)))"


def modules_after_import(stage: str) -> set[str]:
    """Return the names of all modules that importing the stage loads."""
    return _modules_after(_IMPORT, stage)


def modules_after_run(stage: str) -> set[str]:
    """Return the names of all modules that the stage loads as it runs in the current folder."""
    return _modules_after(_RUN, stage)


def _modules_after(action: str, stage: str) -> set[str]:
    code = f"import json, sys; sys.path.insert(0, {str(REPOSITORY)!r}); {action}; {_REPORT}"
    done = subprocess.run([sys.executable, "-c", code, stage], check=True, stdout=subprocess.PIPE, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))
