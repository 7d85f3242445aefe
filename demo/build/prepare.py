"""Stage prepare: npm packages -> all images with label, style and split, and a tokenizer."""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import yaml
from captions import loose_captions
from emoji import (
    BASE_STYLES,
    SHADED_STYLES,
    TARGET_STYLE,
    caption,
    encode_flat,
    encode_shaded,
    icon_svgs,
    load_labels,
    on_white,
    rasterise,
    target_images,
)
from PIL import Image
from shading import shade
from splits import assign_splits
from tokenizer import train_tokenizer

HERE = Path(__file__).parent
PACKAGES = HERE / "node_modules"
IMAGES = HERE / "out/images"


def main() -> None:
    params = yaml.safe_load((HERE / "params.yaml").read_text())["emoji"]
    vocabulary_size = params.pop("vocabulary_size")
    size = params.pop("image_size")
    labels = dict(islice(load_labels(PACKAGES).items(), params.pop("max_labels")))
    target = dict(target_images(PACKAGES, labels))
    svgs = {
        (label, icons.style): svg
        for icons in BASE_STYLES
        for label, svg in icon_svgs(PACKAGES, icons, labels)
    }
    splits = assign_splits([*svgs, *((label, TARGET_STYLE) for label in target)], TARGET_STYLE, **params)

    encoded = {(label, TARGET_STYLE): encode_shaded(on_white(image, size)) for label, image in target.items()}
    with ProcessPoolExecutor() as workers:
        rendered = workers.map(partial(render, size=size), svgs.values(), chunksize=32)
        for (label, style), (flat, shaded) in zip(svgs, rendered, strict=True):
            encoded[label, style] = flat
            if style in SHADED_STYLES:
                encoded[label, f"shaded {style}"] = shaded
                splits[label, f"shaded {style}"] = splits[label, style]

    IMAGES.mkdir(parents=True, exist_ok=True)
    with (IMAGES / "images.bin").open("wb") as blob, (IMAGES / "images.jsonl").open("w") as index:
        for (label, style), webp in encoded.items():
            line = {"label": label, "style": style, "split": splits[label, style], "bytes": len(webp)}
            index.write(json.dumps(line) + "\n")
            blob.write(webp)

    texts = []
    for label, style in encoded:
        texts += [caption(label, style), *loose_captions(label, style, 4, "bpe")]
    train_tokenizer(texts, vocabulary_size, HERE / "out/tokenizer")


def render(svg: str, size: int) -> tuple[bytes, bytes]:
    """Render an icon; return it flat and shaded, encoded."""
    image = rasterise(svg)
    shaded = shade(image).resize((size, size), Image.Resampling.LANCZOS)
    return encode_flat(on_white(image, size)), encode_shaded(shaded)


if __name__ == "__main__":
    main()
