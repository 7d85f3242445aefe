"""Stage export: writes the trained parts and the data set to base_model, evaluator and dataset.

It overwrites the files in those folders, except the cards and licences, which were written by hand. Images
and weights are committed to git, so the stage's only DVC output is a list of their digests.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from emoji import caption, slug
from image_set import encoded_images
from models import make_scheduler
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_lora.storage.repository import folder_digest

HERE = Path(__file__).parent
TRAINED = HERE / "out"
DATASET, BASE_MODEL, EVALUATOR = (HERE.parent / name for name in ("dataset", "base_model", "evaluator"))


def main() -> None:
    write_dataset()
    pipeline = assemble().to(dtype=torch.float16)
    for part in (pipeline.unet, pipeline.vae):
        part.register_to_config(_name_or_path="")  # otherwise a path on the machine that trained it
    pipeline.save_pretrained(BASE_MODEL)
    CLIPModel.from_pretrained(TRAINED / "evaluator/model", dtype=torch.float16).save_pretrained(EVALUATOR)
    CLIPTokenizer.from_pretrained(TRAINED / "tokenizer").save_pretrained(EVALUATOR)
    shutil.copy(TRAINED / "evaluator/model/preprocessor_config.json", EVALUATOR)
    digests = {folder.name: folder_digest(folder) for folder in (DATASET, BASE_MODEL, EVALUATOR)}
    (TRAINED / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")


def write_dataset() -> None:
    """Write an image folder with metadata.jsonl, as Hugging Face's `datasets` reads it."""
    images = DATASET / "images"
    images.mkdir(parents=True, exist_ok=True)
    for stale in images.glob("*.webp"):
        stale.unlink()
    lines = []
    for line, webp in sorted(encoded_images(TRAINED / "images"), key=lambda pair: pair[0]["label"]):
        if line["split"] == "finetune":
            name = f"images/{slug(line['label'])}.webp"
            (DATASET / name).write_bytes(webp)
            lines.append(json.dumps({"file_name": name, "text": caption(line["label"], line["style"])}))
    (DATASET / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def assemble() -> StableDiffusionXLPipeline:
    """Return diffusers' SDXL pipeline with the trained parts, fp32."""
    base = TRAINED / "base"
    tokenizer = CLIPTokenizer.from_pretrained(TRAINED / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(TRAINED / "vae/model"),
        text_encoder=CLIPTextModel.from_pretrained(base / "text_encoder", dtype=torch.float32),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(
            base / "text_encoder_2", dtype=torch.float32
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(base / "unet"),
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


if __name__ == "__main__":
    main()
