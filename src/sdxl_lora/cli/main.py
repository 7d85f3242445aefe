"""The command `sdxl-lora`: its subcommands, their options, and errors as one line.

Help must come at once, so this module imports neither torch nor any other large library. A subcommand's
function imports the module of the same name, which may import what it likes.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sdxl_lora.paths import EXPORTED_WEIGHTS, PARAMS
from sdxl_lora.runtime.library_settings import COMPUTE, MLFLOW_CLIENT, set_library_settings
from sdxl_lora.runtime.user_errors import exit_on_user_error


class _Command(TyperCommand):
    """A subcommand that ends with one line on stderr where the user can correct the error."""

    def invoke(self, ctx: Any) -> Any:
        with exit_on_user_error(self.name or "sdxl-lora"):
            return super().invoke(ctx)


class DataSource(StrEnum):
    """Where `reproduce` takes the data set from."""

    DOWNLOAD = "download"
    PULL = "pull"


_Recipe = Annotated[Path, typer.Option(metavar="FILE", help="Params file to read.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the checks as JSON, for scripts.")]

# Plain help: drawing it with rich would double its time.
app = typer.Typer(
    help="Fine-tune Stable Diffusion XL with LoRA: commands around the pipeline, which `dvc repro` runs.",
    epilog="Run them in the project's root folder. Example: sdxl-lora plan --vram 13.8",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.command(
    "doctor", cls=_Command, epilog="Example: sdxl-lora doctor --recipe recipes/sdxl-naruto-16gb.yaml"
)
def _doctor(recipe: _Recipe = PARAMS, as_json: _Json = False) -> None:
    """Check what an expensive run needs, in a minute.

    Checks software, GPU, memory, disk, models, services and a dry run of one training step. Each check
    passes, warns or fails, and says what to do. The exit status is 1 if a check fails.
    """
    from sdxl_lora.cli.doctor.command import run_doctor

    raise typer.Exit(run_doctor(recipe, as_json))


@app.command(
    "plan", cls=_Command, epilog="Example: sdxl-lora plan --recipe recipes/sdxl-naruto-16gb.yaml --vram 11"
)
def _plan(
    recipe: _Recipe = PARAMS,
    vram: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="GPU memory for training, GiB; replaces training.vram_gib."),
    ] = None,
) -> None:
    """Forecast the peak GPU memory of a recipe; needs no GPU.

    Prints the peak of each phase and part in GiB, which cards the recipe fits, and settings that lower it.
    """
    set_library_settings(COMPUTE)  # before torch and diffusers are imported, which read it
    from sdxl_lora.cli.plan import run_plan

    run_plan(recipe, vram)


@app.command("recipe", cls=_Command, epilog="Example: sdxl-lora recipe demo")
def _recipe(
    name: Annotated[
        str | None, typer.Argument(help="File in recipes/, without .yaml. Leave out to list the recipes.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help=f"Also replace unsaved edits; they are kept in {PARAMS}.orig.")
    ] = False,
) -> None:
    """Select a recipe: copy it to params.yaml.

    Shows the difference and says how to go back. Refuses to replace edits that exist nowhere else.
    """
    from sdxl_lora.cli.recipe import run_recipe

    run_recipe(name, force)


@app.command("summary", cls=_Command, epilog="Example: sdxl-lora summary")
def _summary() -> None:
    """Say what the last run learned and where its results are."""
    from sdxl_lora.cli.summary import run_summary

    run_summary()


@app.command("ui", cls=_Command, epilog="Example: sdxl-lora ui --port 5001")
def _ui(port: Annotated[int, typer.Option(help="TCP port on 127.0.0.1.")] = 5000) -> None:
    """Show the runs in MLflow, on this machine only, until Ctrl-C."""
    from sdxl_lora.cli.ui import run_ui

    run_ui(port)


@app.command(
    "verify", cls=_Command, epilog="Example: sdxl-lora verify ~/Downloads/pytorch_lora_weights.safetensors"
)
def _verify(
    adapter: Annotated[Path, typer.Argument(help="Exported safetensors file.")] = EXPORTED_WEIGHTS,
    as_json: _Json = False,
) -> None:
    """Check an adapter file against the code, data and model here.

    Compares what the file's header says with the tensors, commit, code, params, data set and base model by
    hash. Takes seconds and needs no network. The exit status is 1 if something differs; a missing file warns.
    """
    from sdxl_lora.cli.verify import run_verify

    raise typer.Exit(run_verify(adapter, as_json))


@app.command("reproduce", cls=_Command, epilog="Example: sdxl-lora reproduce HEAD~3 --data pull")
def _reproduce(
    ref: Annotated[
        str, typer.Argument(help="Git revision, DVC experiment, MLflow run id, or exported adapter file.")
    ] = "HEAD",
    data: Annotated[
        DataSource,
        typer.Option(
            help="Download the data set again, or pull the recorded one from DVC's cache or remote."
        ),
    ] = DataSource.DOWNLOAD,
) -> None:
    """Run a recorded run again and compare the outputs.

    Runs in a fresh clone without cached results, and takes as long as the run did. The exit status is 0 if
    the outputs are bit-identical or within tolerance.
    """
    set_library_settings(MLFLOW_CLIENT)  # else a dead server takes four minutes a call
    from sdxl_lora.cli.reproduce import run_reproduce

    raise typer.Exit(run_reproduce(ref, data.value))


@app.command("promote", cls=_Command, epilog="Example: sdxl-lora promote")
def _promote() -> None:
    """Register the adapter in MLflow as the champion.

    Refuses an adapter that fails a gate of evaluation.gates in params.yaml.
    """
    set_library_settings(MLFLOW_CLIENT)
    from sdxl_lora.cli.promote import run_promote

    run_promote()


@app.command("push", cls=_Command, epilog="Example: sdxl-lora push someone/naruto-style --public")
def _push(
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Create it for everyone to read. Without it: private.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Push even if the adapter fails its gates.")] = False,
) -> None:
    """Upload the adapter, its card and its images to the Hub.

    Uploads the folder data/export. The access token comes from `hf auth login` or HF_TOKEN. Refuses an
    adapter that fails a gate of evaluation.gates in params.yaml.
    """
    from sdxl_lora.cli.push import run_push

    run_push(repository, public, force)


@app.command("digest", cls=_Command, epilog="Example: sdxl-lora digest ./demo/dataset")
def _digest(
    folder: Annotated[Path, typer.Argument(help="Folder of a data set or model; hidden files do not count.")],
) -> None:
    """Print the digest that pins a folder in params.yaml.

    It is the value of the revision next to a repository, base, vae or clip_model that names a local folder.
    """
    from sdxl_lora.cli.digest import run_digest

    run_digest(folder)
