"""A recorded run, run again and compared with its record.

The stages run in a fresh clone that knows none of the recorded results, without DVC's run cache, with the
libraries and the device at hand.
"""

import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Literal

import yaml

from sdxl_lora import paths
from sdxl_lora.reproducibility.comparison import ReproductionVerdict, compare_runs
from sdxl_lora.reproducibility.run_record import RunRecord, read_record, reader

DataSource = Literal["download", "pull"]

_SCRATCH_FOLDER = Path(".dvc/tmp/reproduction")
DOWNLOAD, TRACK = "download_dataset", "track_run"
_FOREIGN = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI")
"""Variables by which stages would take the project for the clone, or show the clone's run on a server."""
_LAST_LINES = 8  # of the output, kept to say why a run failed
_CACHE_REMOTE = "cache-of-the-project"


def reproduce(record: RunRecord, data: DataSource) -> ReproductionVerdict:
    """Run all recorded stages again, except the one that shows results in MLflow, and compare.

    Args:
        data: download the data set once more, or take the recorded one from DVC's cache or remote.

    Raises:
        ValueError: the recorded data cannot be had.
        OSError: git cannot clone the project.
    """
    pipeline = yaml.safe_load(record.files[paths.PIPELINE])["stages"]
    stages = [name for name in pipeline if name in record.stages and name != TRACK]
    with _fresh_clone(record) as clone:
        if data == "pull":
            _pull_data(clone)
            stages.remove(DOWNLOAD)
        (clone / paths.LOCK).unlink()  # what is found there later is of this run
        _leave_choices(record, clone)
        failure = _run_stages(clone, stages)
        again = RunRecord("made again", record.code_commit, read_record(reader(clone)))
        return compare_runs(record, again, stages, failure)


@contextmanager
def _fresh_clone(record: RunRecord) -> Iterator[Path]:
    """A clone with the code, params and lock of `record`, for as long as the block runs.

    HEAD is what it was for the recorded run, since the adapter's header names it.
    """
    clone = _SCRATCH_FOLDER.absolute() / record.code_commit[:12]
    shutil.rmtree(clone, ignore_errors=True)
    clone.parent.mkdir(parents=True, exist_ok=True)
    try:
        for command, folder in (
            (["clone", "--shared", "--no-checkout", str(Path.cwd()), str(clone)], Path()),
            (["checkout", "--detach", record.code_commit], clone),
            (["reset", "--soft", record.recorded_head], clone),
        ):
            _run_git(folder, *command, "--quiet")
        for path in (paths.PARAMS, paths.PIPELINE, paths.LOCK):
            (clone / path).write_text(record.files[path], encoding="utf-8")
        yield clone
    finally:
        shutil.rmtree(clone, ignore_errors=True)


def _leave_choices(record: RunRecord, clone: Path) -> None:
    """Notes for the clone's training what `auto` was in the recorded one, if the record has its report.

    Not in params.yaml: DVC's lock and the adapter's header hold a hash of that.
    """
    if (report := record.files.get(paths.TRAINING_REPORT)) is not None:
        note = clone / paths.RECORDED_TRAINING
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(report, encoding="utf-8")


def _pull_data(clone: Path) -> None:
    """Puts the recorded data set into the clone: from the project's cache, else from its remote.

    Raises:
        ValueError: neither has it.
    """
    settings = Path(".dvc/config.local")
    if settings.is_file():
        shutil.copy(settings, clone / settings)
    for line in _run_dvc(Path(), "remote", "list").stdout.splitlines():
        name, url = line.split()[:2]  # a folder's place is given relative to the project
        _run_dvc(clone, "remote", "modify", "--local", name, "url", url)
    cache = _run_dvc(Path(), "cache", "dir").stdout.strip()
    _run_dvc(clone, "remote", "add", "--local", _CACHE_REMOTE, cache)
    for remote in (["--remote", _CACHE_REMOTE], []):
        result = _run_dvc(clone, "pull", *remote, str(paths.RAW))
        if result.returncode == 0:
            return
    raise ValueError(
        f"the recorded {paths.RAW} is neither in DVC's cache nor in its remote ({result.stderr.strip()}); "
        "`--data download` downloads it again"
    )


def _run_stages(clone: Path, stages: Sequence[str]) -> str | None:
    """Runs the stages, their output on stderr as it comes; why they stopped, None if they did not."""
    command = ["dvc", "repro", "--single-item", "--force", "--no-run-cache", *stages]
    tail: deque[str] = deque(maxlen=_LAST_LINES)
    with subprocess.Popen(
        command, cwd=clone, env=_environment_of(clone), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        output = TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
        for line in output:  # ends as it came: a progress bar's carriage return draws over it
            sys.stderr.write(line)
            sys.stderr.flush()
            if line.endswith("\n") and line.strip():
                tail.append(line.strip())
    if process.returncode == 0:
        return None
    return f"`dvc repro` stopped with status {process.returncode}: {' '.join(tail)}"


def _run_git(folder: Path, *arguments: str) -> None:
    """Run a git command.

    Raises:
        OSError: it fails; says what git says.
    """
    result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"`git {arguments[0]}` in {folder.absolute()} fails: {result.stderr.strip()}")


def _run_dvc(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["dvc", *arguments]
    environment = _environment_of(folder.absolute())
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def _environment_of(project: Path) -> dict[str, str]:
    """Variables with which commands use this interpreter's packages, and the library of `project`."""
    inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    first = {"PATH": [Path(sys.executable).parent], "PYTHONPATH": [project / "src", project]}
    return inherited | {
        name: os.pathsep.join([*map(str, places), *filter(None, [inherited.get(name)])])
        for name, places in first.items()
    }


def render_reproduction_page(verdict: ReproductionVerdict) -> str:
    """Return the verdict as Markdown."""
    lines = [
        f"# {verdict.outcome.capitalize()}: {verdict.origin}",
        "",
        f"Code of commit `{verdict.commit}`.",
        "",
    ]
    lines += [f"- {reason}" for reason in verdict.reasons]
    lines += ["", "## Environment", ""]
    rows = [(d.stage, d.name, d.recorded, d.found) for d in verdict.environment]
    lines += _table(("stage", "fact", "recorded", "here"), rows) or ["No recorded fact differs."]
    lines += ["", "## Figures", ""]
    figures = [
        (f.name, f"{f.recorded:.6g}", f"{f.found:.6g}", "" if f.tolerance is None else f"{f.tolerance:.2g}")
        for f in verdict.figures
    ]
    lines += _table(("figure", "recorded", "here", "tolerance"), figures) or ["None."]
    lines += ["", "## Outputs", ""]
    lines += _table(("stage", "output", "compared"), [(o.stage, o.path, o.state) for o in verdict.outs])
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of Markdown; none without rows."""
    if not rows:
        return []
    cells = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in row)} |" for row in cells]
