"""Stage sample_images: LoRA weights -> the same prompts and captions drawn by base model and adapter."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.drawing import prepare
from sdxl_lora.execution import run, stage
from sdxl_lora.files import written_whole
from sdxl_lora.hardware import require_precision, reserved_device
from sdxl_lora.samples import save_sample, save_table
from sdxl_lora.sampling import generation_settings, grid, load_adapter, sample_images, sampled_captions
from sdxl_lora.sdxl import load_pipeline


def main() -> None:
    params = load_params()
    config = params.sampling
    with stage("sample_images"), reserved_device(None) as device:
        require_precision(device, config.precision, "sampling.precision")
        pipeline = load_pipeline(params.model, config.precision, device)
        load_adapter(pipeline, paths.LORA)
        prepare(pipeline, config)
        settings = generation_settings(config, params.model)
        captions = sampled_captions(config, paths.ENCODED)
        total = (len(config.prompts) + len(captions)) * len(config.seeds) * len(config.strengths)
        drawn = sample_images(pipeline, config, captions)
        pictures = []
        for sample, image in tqdm(drawn, total=total, desc="sample_images", unit="image"):
            save_sample(paths.SAMPLES, sample, image, settings)
            pictures.append((sample, image))
        save_table(paths.SAMPLE_TABLE, [sample for sample, _ in pictures])
        with written_whole(paths.SAMPLE_GRID) as partial:
            grid(pictures).save(partial)


if __name__ == "__main__":
    run(main)
