"""Settings that lower GPU memory, for a phase that does not fit: hints, without a forecast of each."""

from collections.abc import Collection, Iterator

from sdxl_lora.config import Params

_GRID = 64  # pixels: a multiple of it passes through every level of the UNet
_TILE = 512  # pixels


def minimum_memory_with(params: Params, phases: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield settings that params do not have yet and that lower the memory of `phases`.

    Args:
        params: the recipe.
        phases: of `train`, `sample` and `encode`.

    Yields:
        The phase, and what to write into params; within a phase what costs least quality or time first.
    """
    training, sampling, encoding = params.training, params.sampling, params.encoding
    hints = {
        "train": {
            "training.micro_batch_size auto": training.micro_batch_size not in ("auto", 1),
            "training.checkpointing auto": training.checkpointing not in ("auto", "all"),
            "training.preview_every null": training.preview_every is not None,
            "model.text_encoders frozen": params.model.text_encoders != "frozen",
            "training.quantization nf4": training.quantization != "nf4",
            f"encoding.resolution {_lower(encoding.resolution)}": _lower(encoding.resolution) > 0,
        },
        "sample": {
            "sampling.batch_size 1": sampling.batch_size > 1,
            f"sampling.resolution {_lower(sampling.resolution)}": _lower(sampling.resolution) > 0,
        },
        "encode": {
            "encoding.batch_size 1": encoding.batch_size > 1,
            f"encoding.vae_tile {_TILE}": encoding.vae_tile is None and encoding.resolution > _TILE,
        },
    }
    for phase, settings in hints.items():
        if phase in phases:
            yield from ((phase, setting) for setting, helps in settings.items() if helps)


def _lower(resolution: int) -> int:
    """Return three quarters of a resolution in pixels, on the grid; 0 if there is none so low."""
    return resolution * 3 // 4 // _GRID * _GRID
