"""Stage sample_images: LoRA weights -> images of the same prompts by base model and adapter."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.inference.pipeline import prepare_pipeline
from sdxl_lora.inference.samples import save_sample, save_table
from sdxl_lora.inference.sampling import (
    generation_settings,
    image_grid,
    load_adapter,
    sample_images,
    sampled_captions,
)
from sdxl_lora.models.sdxl import load_pipeline
from sdxl_lora.runtime.device import acquire_device, require_precision
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.atomic_io import atomic_write


def main() -> None:
    params = load_params()
    config = params.sampling
    with record_stage("sample_images"), acquire_device(None) as device:
        require_precision(device, config.precision, "sampling.precision")
        pipeline = load_pipeline(params.model, config.precision, device)
        load_adapter(pipeline, paths.LORA)
        prepare_pipeline(pipeline, config)
        settings = generation_settings(config, params.model)
        captions = sampled_captions(config, paths.ENCODED)
        total = (len(config.prompts) + len(captions)) * len(config.seeds) * len(config.strengths)
        generated = sample_images(pipeline, config, captions)
        samples = []
        for sample, image in tqdm(generated, total=total, desc="sample_images", unit="image"):
            save_sample(paths.SAMPLES, sample, image, settings)
            samples.append((sample, image))
        save_table(paths.SAMPLE_TABLE, [sample for sample, _ in samples])
        with atomic_write(paths.SAMPLE_GRID) as partial:
            image_grid(samples).save(partial)


if __name__ == "__main__":
    run_stage(main)
