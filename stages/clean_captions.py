"""Stage clean_captions: raw captions -> clean captions, and a report of every change and rejection."""

from sdxl_lora import paths
from sdxl_lora.config import load_params
from sdxl_lora.data.captions import clean_captions, read_captions
from sdxl_lora.models.tokenizers import count_tokens, load_tokenizers
from sdxl_lora.reporting.captions_page import render_captions_page
from sdxl_lora.runtime.stage import record_stage, run_stage
from sdxl_lora.storage.atomic_io import write_text
from sdxl_lora.storage.report_io import write_numbers, write_table


def main() -> None:
    params = load_params()
    with record_stage("clean_captions"):
        frame = read_captions(paths.RAW_CAPTIONS)
        tokenizers = load_tokenizers(params.model)
        cleaned, report = clean_captions(
            frame, params.captions, lambda texts: count_tokens(tokenizers, texts)
        )
        write_text(paths.CAPTIONS, cleaned.to_json(orient="records", lines=True, force_ascii=False))
        write_numbers(paths.CAPTIONS_REPORT, report.metrics())
        write_table(paths.CAPTION_CHANGES, report.changes, ["image", "before", "after", "rules"])
        write_table(paths.CAPTION_REJECTIONS, report.rejections, ["image", "caption", "reason"])
        write_text(paths.CAPTION_PAGE, render_captions_page(report, params.captions))


if __name__ == "__main__":
    run_stage(main)
