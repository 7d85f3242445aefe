"""Stage encode_dataset: images and clean captions -> VAE latents, token ids, embeddings."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.encoding import EncodingReport, encode_dataset, load_encoders, read_captions
from sdxl_lora.execution import run, stage
from sdxl_lora.hardware import require_precision, reserved_device
from sdxl_lora.reports import write_numbers, write_table


def main() -> None:
    params = load_params()
    config = params.encoding
    with stage("encode_dataset"), reserved_device(None) as device:
        require_precision(device, config.vae_precision, "encoding.vae_precision")
        require_precision(device, config.text_precision, "encoding.text_precision")
        rows = read_captions(paths.CAPTIONS)
        encoders = load_encoders(params.model, config, device)
        report = EncodingReport()
        with tqdm(total=len(rows), desc="encode_dataset", unit="image") as progress:
            for done in encode_dataset(rows, paths.RAW_IMAGES, encoders, config, paths.ENCODED, report):
                progress.update(done)
        write_numbers(paths.ENCODING_REPORT, report.metrics())
        write_table(paths.IMAGE_REJECTIONS, report.rejected, ["image", "reason"])


if __name__ == "__main__":
    run(main)
