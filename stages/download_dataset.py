"""Stage download_dataset: the Hub or a folder -> images, raw captions, and where they came from."""

from tqdm import tqdm

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.data.download import download_dataset, open_source
from sdxl_lora.runtime.stage import record_stage, run_stage


def main() -> None:
    params = load_params()
    with record_stage("download_dataset"):
        source = open_source(params.download)
        examples = download_dataset(source, paths.RAW)
        for _ in tqdm(examples, total=source.num_examples, desc="download_dataset", unit="image"):
            pass


if __name__ == "__main__":
    run_stage(main)
