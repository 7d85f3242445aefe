"""`make check` refuses code that loads what can run code, or trusts what strangers chose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
UNSAFE = {
    "import pickle\n": "TID251",
    "import joblib\n": "TID251",
    "from tarfile import open\n": "TID251",
    "import torch\n\ntorch.load('x.pt', weights_only=True)\n": "TID251",
    "import pandas as pd\n\npd.read_pickle('x')\n": "TID251",
    "import numpy as np\n\nnp.load('x.npy')\n": "TID251",
    "eval('1')\n": "S307",
    "import yaml\n\nyaml.load('a')\n": "S506",
    "import subprocess\n\nsubprocess.run('ls', shell=True)\n": "S602",
    "HOST = '0.0.0.0'\n": "S104",
    "import jinja2\n\njinja2.Environment()\n": "S701",
    "import httpx\n\nhttpx.get('https://x', verify=False, timeout=1)\n": "S501",
}


@pytest.mark.parametrize(("code", "rule"), UNSAFE.items())
@pytest.mark.parametrize("folder", ["src/sdxl_lora", "stages", "benchmarks", "demo/build"])
def test_unsafe_code_is_refused(folder: str, code: str, rule: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", f"{folder}/new.py", "-"]
    result = subprocess.run(command, cwd=REPOSITORY, input=code, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert rule in result.stdout


def test_no_code_of_a_repository_is_trusted() -> None:
    files = [
        path
        for folder in ("src", "stages", "benchmarks", "demo")
        for path in (REPOSITORY / folder).rglob("*.py")
    ]
    assert len(files) > 70
    assert [path for path in files if "trust_remote_code" in path.read_text(encoding="utf-8")] == []


def test_servers_listen_on_the_loopback_alone() -> None:
    """An empty address would be all of the machine's."""
    files = [
        path for folder in ("src", "tests", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py")
    ]
    empty = re.compile(r"""(Server|create_server|bind)\(\(["']["'],""")
    assert [path for path in files if empty.search(path.read_text(encoding="utf-8"))] == []
