"""The README's image: samples of `make demo` for labels it never saw in 3D, above the real images.

Run it after `make demo` and `npm ci`: `python demo/build/showcase.py`.
"""

from pathlib import Path

from emoji import TARGET_STYLE, caption, load_labels, on_white, target_images
from PIL import Image, ImageDraw, ImageFont

from sdxl_lora import paths
from sdxl_lora.inference.samples import load_table

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
OUTPUT = PROJECT / "docs/images/unseen-labels.png"
ROWS = {0.0: "base model", 0.5: "adapter, half", 1.0: "adapter"}
SIDE, GAP, MARGIN = 128, 8, 132  # pixels: an image, between images, for the rows' names
FONT = ImageFont.load_default(size=17)


def main() -> None:
    rows = [(name, sampled_images(strength)) for strength, name in ROWS.items()]
    labels = list(rows[0][1])
    real = dict(target_images(HERE / "node_modules", load_labels(HERE / "node_modules")))
    rows.append(("real, never seen", {label: on_white(real[label], SIDE) for label in labels}))
    sheet(labels, rows).save(OUTPUT, optimize=True)


def sampled_images(strength: float) -> dict[str, Image.Image]:
    """Return the first seed's samples in the target style, by label."""
    images: dict[str, Image.Image] = {}
    for sample in load_table(PROJECT / paths.SAMPLE_TABLE):
        label = sample.prompt.partition(",")[0]
        if sample.strength == strength and sample.prompt == caption(label, TARGET_STYLE):
            images.setdefault(label, Image.open(PROJECT / paths.SAMPLES / sample.file).convert("RGB"))
    return images


def sheet(labels: list[str], rows: list[tuple[str, dict[str, Image.Image]]]) -> Image.Image:
    """Return an image with one row per name and one column per label."""
    line, step = FONT.size + GAP, SIDE + GAP
    size = (MARGIN + step * len(labels), line + step * len(rows))
    canvas = Image.new("RGB", (round(size[0]), round(size[1])), "white")
    pen = ImageDraw.Draw(canvas)
    for column, label in enumerate(labels):
        centre = MARGIN + column * step + SIDE / 2
        pen.text((centre, line / 2), label, "dimgray", FONT, anchor="mm")
    for row, (name, images) in enumerate(rows):
        top = round(line + row * step)
        pen.text((MARGIN - GAP, top + SIDE / 2), name, "black", FONT, anchor="rm")
        for column, label in enumerate(labels):
            canvas.paste(images[label], (MARGIN + column * step, top))
    return canvas


if __name__ == "__main__":
    main()
