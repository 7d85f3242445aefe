"""Repeats a recorded run and compares the results with the recorded ones.

The stages run in a fresh clone without the recorded results and without DVC's run cache, with the libraries
and the device that are installed.
"""

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
from sdxl_lora.reporting.markdown import table
from sdxl_lora.reproducibility.comparison import ReproductionVerdict, compare_runs
from sdxl_lora.reproducibility.run_record import RunRecord, read_record, reader
from sdxl_lora.runtime.dvc_command import cache_folder, dvc_environment, run_dvc
from sdxl_lora.storage.atomic_io import write_text

DataSource = Literal["download", "pull"]

_SCRATCH_FOLDER = Path(".dvc/tmp/reproduction")
DOWNLOAD, TRACK = "download_dataset", "track_run"
_LAST_LINES = 8  # lines of the output, quoted if the run fails
_CACHE_REMOTE = "cache-of-the-project"


def reproduce(record: RunRecord, data: DataSource) -> ReproductionVerdict:
    """Run all recorded stages again, except the one that shows results in MLflow, and compare the results.

    Args:
        data: download the data set again, or take the recorded one from DVC's cache or remote.

    Raises:
        ValueError: the recorded data set is in neither.
        OSError: git cannot clone the project.
    """
    pipeline = yaml.safe_load(record.files[paths.PIPELINE])["stages"]
    stages = [name for name in pipeline if name in record.stages and name != TRACK]
    with _fresh_clone(record) as clone:
        if data == "pull":
            _pull_data(clone)
            stages.remove(DOWNLOAD)
        # Only `dvc pull` needs the recorded lock. The new one must hold entries of this run alone: the old
        # entry of a stage that does not get to run would pass for reproduced.
        (clone / paths.LOCK).unlink()
        _copy_auto_choices(record, clone)
        failure = _run_stages(clone, stages)
        again = RunRecord("reproduction", record.code_commit, read_record(reader(clone)))
        return compare_runs(record, again, stages, failure)


@contextmanager
def _fresh_clone(record: RunRecord) -> Iterator[Path]:
    """Yield a clone with the code, params and lock of `record`; delete it after the block.

    Its files are those of `record.code_commit`, and its HEAD is `record.recorded_head`. The two differ if the
    code was committed after the run, as usual with `dvc exp`: the code must be that which ran, but the
    adapter's header names the HEAD of that time and would otherwise differ.
    """
    clone = _SCRATCH_FOLDER.absolute() / record.code_commit[:12]
    shutil.rmtree(clone, ignore_errors=True)
    clone.parent.mkdir(parents=True, exist_ok=True)
    try:
        for command, folder in (
            # --shared reads this repository's objects in place. They include commits that no branch reaches,
            # such as those of experiments, which a plain clone would not copy.
            (["clone", "--shared", "--no-checkout", str(Path.cwd()), str(clone)], Path()),
            (["checkout", "--detach", record.code_commit], clone),  # the files
            (["reset", "--soft", record.recorded_head], clone),  # HEAD alone: --soft leaves the files
        ):
            _run_git(folder, *command, "--quiet")
        # A record of the workspace or of MLflow has these files in other versions than any commit.
        for path in (paths.PARAMS, paths.PIPELINE, paths.LOCK):
            write_text(clone / path, record.files[path])
        yield clone
    finally:
        shutil.rmtree(clone, ignore_errors=True)


def _copy_auto_choices(record: RunRecord, clone: Path) -> None:
    """Copy the recorded training report, if any, to where training looks up what `auto` resolved to.

    Not by way of params.yaml, because dvc.lock and the adapter's header contain its hash.
    """
    if (report := record.files.get(paths.TRAINING_REPORT)) is not None:
        write_text(clone / paths.RECORDED_TRAINING, report)


def _pull_data(clone: Path) -> None:
    """Put the recorded data set into the clone, from the project's cache or else from its remote.

    Raises:
        ValueError: neither has it.
    """
    settings = Path(".dvc/config.local")
    if settings.is_file():
        shutil.copy(settings, clone / settings)
    # Remotes that are folders have paths relative to the project. This command prints absolute ones, one a
    # line; `dvc remote list` wraps long paths.
    for line in run_dvc(Path(), "config", "--list").stdout.splitlines():
        key, _, url = line.partition("=")
        if key.startswith("remote.") and key.endswith(".url"):
            name = key.removeprefix("remote.").removesuffix(".url")
            run_dvc(clone, "remote", "modify", "--local", name, "url", url)
    # A cache has the layout of a remote, so the project's serves as one. As the clone's cache it would hide
    # which stages ran, and be written to by them.
    if (cache := cache_folder(Path())) is not None:
        run_dvc(clone, "remote", "add", "--local", _CACHE_REMOTE, str(cache))
    for remote in (["--remote", _CACHE_REMOTE], []):
        result = run_dvc(clone, "pull", *remote, str(paths.RAW))
        if result.returncode == 0:
            return
    raise ValueError(
        f"the recorded {paths.RAW} is neither in DVC's cache nor in its remote ({result.stderr.strip()}): "
        "`--data download` downloads it again"
    )


def _run_stages(clone: Path, stages: Sequence[str]) -> str | None:
    """Run the stages and copy their output to stderr; return why they stopped, or None if all ended."""
    command = ["dvc", "repro", "--single-item", "--force", "--no-run-cache", *stages]
    tail: deque[str] = deque(maxlen=_LAST_LINES)
    with subprocess.Popen(
        command, cwd=clone, env=dvc_environment(clone), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        output = TextIOWrapper(process.stdout, encoding="utf-8", errors="replace", newline="")
        for line in output:  # newline="" keeps a progress bar's \r, so that its next state overwrites it
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
    lines.append(table(("stage", "fact", "recorded", "here"), rows) if rows else "No recorded fact differs.")
    lines += ["", "## Figures", ""]
    figures = [
        (f.name, f"{f.recorded:.6g}", f"{f.found:.6g}", "" if f.tolerance is None else f"{f.tolerance:.2g}")
        for f in verdict.figures
    ]
    lines.append(table(("figure", "recorded", "here", "tolerance"), figures) if figures else "None.")
    lines += ["", "## Outputs", ""]
    outs = [(o.stage, o.path, o.state) for o in verdict.outs]
    lines += [table(("stage", "output", "compared"), outs)] if outs else []
    return "\n".join(lines) + "\n"
