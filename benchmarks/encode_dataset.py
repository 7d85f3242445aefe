"""Time and memory of encoding many images: `python -m benchmarks.encode_dataset --help`.

Encodes synthetic images with the demo recipe's models, at a small size, so that the model takes a small
share of the time. Most of it is decoding, the latent cache, the search for near duplicates and the shards.
With `--sdxl` the VAE has SDXL's real shapes with random weights, and the VAE alone is timed, too, on images
that are already on the device. The first batch is timed separately, because it compiles a GPU's kernels
once per machine.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import psutil
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from benchmarks.timing import timed, wait_for
from sdxl_lora.config import EncodingConfig, load_params
from sdxl_lora.data.encoders import Encoders, load_encoders
from sdxl_lora.data.encoding import encode_dataset
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.image_encoder import encode_images
from sdxl_lora.data.image_loader import CaptionedImage
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.models.architecture import SDXL_BASE
from sdxl_lora.models.fused_vae import fuse_vae
from sdxl_lora.models.tokenizers import load_tokenizers
from sdxl_lora.runtime.device import acquire_device, one_cpu_thread
from sdxl_lora.storage.content_store import ContentStore
from sdxl_lora.storage.repository import file_digest

MIB = 2**20
REPETITIONS = 20  # of the VAE alone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/demo.yaml"))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument(
        "--resolution", type=int, default=64, help="side length in pixels, instead of the recipe's"
    )
    parser.add_argument("--sdxl", action="store_true", help="use a VAE of SDXL's shapes")
    arguments = parser.parse_args()
    params = load_params(arguments.recipe)
    config = params.encoding.model_copy(update={"resolution": arguments.resolution})
    with TemporaryDirectory() as scratch, acquire_device(None) as device, one_cpu_thread(device):
        folder = Path(scratch)
        rows = write_images(folder / "images", arguments.images, arguments.resolution)
        numbers: dict[str, object] = {}
        if arguments.sdxl:
            vae = SDXL_BASE.make_vae(config.vae_precision, device)
            numbers["vae_alone_images_per_second"] = vae_speed(vae, config, device)
            fuse_vae(vae)
            tokenizers = load_tokenizers(load_params(Path("recipes/demo.yaml")).model)
            encoders = Encoders(vae, tokenizers, text_encoders=None)
        else:
            encoders = load_encoders(params.model, config, device)
        numbers["seconds_of_the_first_batch"] = first_batch(encoders.vae, config, device)
        for name in ("first", "again"):
            cache = LatentCache(ContentStore(folder / "store"), encoders, config, folder / "images")
            numbers[name] = measure(rows, cache, config, folder / name)
    sys.stdout.write(json.dumps({"images": len(rows), "device": str(device), **numbers}, indent=2) + "\n")


@torch.inference_mode()
def vae_speed(vae: AutoencoderKL, config: EncodingConfig, device: torch.device) -> float:
    """Return the images per second of diffusers' VAE alone, in batches of the stage's size."""
    size = (config.batch_size, 3, config.resolution, config.resolution)
    pixels = torch.rand(size, device=device, dtype=vae.dtype)
    seconds = timed(lambda: vae.encode(pixels), device, REPETITIONS)
    return round(config.batch_size / median(seconds), 1)


def first_batch(vae: AutoencoderKL, config: EncodingConfig, device: torch.device) -> float:
    """Return the seconds that the VAE takes for the first batch."""
    levels = torch.zeros(config.batch_size, 3, config.resolution, config.resolution, dtype=torch.uint8)
    start = perf_counter()
    encode_images(vae, levels)
    wait_for(device)
    return round(perf_counter() - start, 1)


def write_images(folder: Path, count: int, resolution: int) -> list[CaptionedImage]:
    """Write JPEGs of random blurred squares, with a width of 1.5 times the height; return their captions."""
    folder.mkdir()
    rows = []
    for number in tqdm(range(count), desc="writing images", unit="image"):
        colours = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        size = (resolution * 3 // 2, resolution)
        path = folder / f"{number:06d}.jpg"
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        rows.append(CaptionedImage(file_digest(path), path.name, f"image number {number}"))
    return rows


def measure(
    rows: list[CaptionedImage], cache: LatentCache, config: EncodingConfig, folder: Path
) -> dict[str, float]:
    """Return wall and CPU seconds, images per second, and this process's resident memory over time, MiB."""
    process, start, done, memory = psutil.Process(), perf_counter(), 0, []
    cpu_start = sum(process.cpu_times()[:4])  # user and system, of this process and its workers
    with tqdm(total=len(rows), desc=folder.name, unit="image") as progress:
        for number in encode_dataset(rows, cache, config, folder, EncodingReport()):
            done += number
            progress.update(number)
            if done % max(1, len(rows) // 10) == 0:
                memory.append(process.memory_info().rss / MIB)
            if done == len(rows):
                encoded = perf_counter() - start
    seconds = perf_counter() - start
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(process.cpu_times()[:4]) - cpu_start, 1),
        "images_per_second": round(len(rows) / seconds, 1),
        "seconds_to_split_and_write_shards": round(seconds - encoded, 1),
        "mib_after_a_tenth": round(memory[1]),
        "mib_after_all_were_encoded": round(memory[-1]),
        "mib_at_the_end": round(process.memory_info().rss / MIB),
    }


if __name__ == "__main__":
    main()
