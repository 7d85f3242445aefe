"""Stage encode_dataset: images and clean captions -> VAE latents, token ids, embeddings."""

from dataclasses import asdict

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.data.encoders import load_encoders
from sdxl_lora.data.encoding import encode_dataset, rank_share, read_captioned_images
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.data.latent_cache import LatentCache
from sdxl_lora.reporting.dataset_card import dataset_card
from sdxl_lora.runtime.device import acquire_device, one_cpu_thread, require_precision
from sdxl_lora.runtime.dvc_execution import project_root
from sdxl_lora.runtime.environment import describe_environment
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.content_store import ContentStore
from sdxl_lora.storage.report_io import read_numbers, write_numbers, write_table


def main() -> None:
    params = load_params()
    config = params.encoding
    with record_stage("encode_dataset"), acquire_device(None) as device, one_cpu_thread(device):
        require_precision(device, config.vae_precision, "encoding.vae_precision")
        require_precision(device, config.text_precision, "encoding.text_precision")
        rows = read_captioned_images(paths.CAPTIONS)
        store = ContentStore(project_root() / paths.ENCODED_STORE)
        cache = LatentCache(store, load_encoders(params.model, config, device), config, paths.RAW_IMAGES)
        report, share = EncodingReport(), rank_share()
        with tqdm(
            total=len(rows), desc="encode_dataset", unit="image", disable=not share.is_first
        ) as progress:
            for done in encode_dataset(rows, cache, config, paths.ENCODED, report, share):
                progress.update(done)
        if share.is_first:
            store.prune()
            write_numbers(paths.ENCODING_REPORT, report.metrics())
            write_numbers(paths.ENCODING_ENVIRONMENT, describe_environment(device))
            findings = [asdict(finding) for finding in report.findings]
            write_table(paths.IMAGE_FINDINGS, findings, ["image", "kind", "left_out", "detail"])
            source = read_numbers(paths.RAW_SOURCE, "download_dataset")
            write_text(paths.DATASET_CARD, dataset_card(source, report, config, paths.ENCODED))


if __name__ == "__main__":
    run_stage(main)
