"""The command `sdxl-lora` as a whole: what its help loads and says, and how errors end it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from sdxl_lora.cli.main import app
from sdxl_lora.storage.repository import folder_digest
from tests.support.command import COMMAND

COMMANDS = {command.name: command for command in typer.main.get_group(app).commands.values()}
SLOW = {
    *(
        "bitsandbytes",
        "datasets",
        "diffusers",
        "dvc",
        "mlflow",
        "numpy",
        "pandas",
        "peft",
        "torch",
        "transformers",
    )
}
LOADED = """
import json, sys
from sdxl_lora.cli.main import app
try:
    app(sys.argv[1:])
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def attempt(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_command_is_there() -> None:
    names = "doctor plan recipe summary ui verify reproduce promote push digest"
    assert set(COMMANDS) == set(names.split())


@pytest.mark.parametrize("arguments", [[], *([name] for name in sorted(map(str, COMMANDS)))], ids=" ".join)
def test_help_loads_no_large_library(arguments: list[str]) -> None:
    command = [sys.executable, "-c", LOADED, *arguments, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.startswith("Usage:")
    loaded = {name.partition(".")[0] for name in json.loads(result.stderr)}
    assert not loaded & {*SLOW, "transformers"}
    assert "rich" not in loaded


def test_list_of_commands_cuts_no_sentence() -> None:
    lines = attempt("--help").stdout.splitlines()
    start = lines.index("Commands:") + 1
    assert all(
        line.endswith(".") and not line.endswith("...") for line in lines[start : start + len(COMMANDS)]
    )


@pytest.mark.parametrize("name", sorted(map(str, COMMANDS)))
def test_help_explains_every_option_and_has_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    for param in command.params:
        assert getattr(param, "help", None), f"{name}: {param.name} is not explained"
    example = re.fullmatch(rf"Example: sdxl-lora {name}( .+)?", str(command.epilog))
    assert example is not None
    command.make_context(name, (example[1] or "").split())


def test_user_error_is_one_line_with_the_commands_name() -> None:
    result = attempt("digest", "no-such-folder")
    assert result.returncode == 1
    assert result.stderr == "digest: no-such-folder is not a folder: name the folder of a data set or model\n"
    assert result.stdout == ""


def test_defect_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> None:
        raise TypeError("a defect")

    monkeypatch.setattr("sdxl_lora.cli.digest.run_digest", broken)
    with pytest.raises(TypeError, match="a defect"):
        app(["digest", "."])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digset"], "No such command"),
        (["push"], "Missing argument"),
        (["ui", "--port", "many"], "Input should be a valid integer"),
        (["reproduce", "HEAD", "--data", "guess"], "'download', 'pull'"),
    ],
    ids=["command", "argument", "number", "choice"],
)
def test_wrong_usage_has_status_2_and_is_explained(arguments: list[str], words: str) -> None:
    result = attempt(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_digest_is_the_value_that_pins_a_folder(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"1")
    assert attempt("digest", str(tmp_path)).stdout == f"{folder_digest(tmp_path)}\n"
