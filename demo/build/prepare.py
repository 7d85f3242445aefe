"""Stage prepare: npm packages -> every picture with label, style and split, and a tokenizer of captions."""

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
    target_pictures,
)
from PIL import Image
from shading import shade
from splits import assign_splits
from tokenizer import train_tokenizer

HERE = Path(__file__).parent
PACKAGES = HERE / "node_modules"
PICTURES = HERE / "out/pictures"


def main() -> None:
    params = yaml.safe_load((HERE / "params.yaml").read_text())["emoji"]
    vocabulary_size = params.pop("vocabulary_size")
    size = params.pop("image_size")
    labels = dict(islice(load_labels(PACKAGES).items(), params.pop("max_labels")))
    target = dict(target_pictures(PACKAGES, labels))
    svgs = {
        (label, icons.style): svg
        for icons in BASE_STYLES
        for label, svg in icon_svgs(PACKAGES, icons, labels)
    }
    splits = assign_splits([*svgs, *((label, TARGET_STYLE) for label in target)], TARGET_STYLE, **params)

    encoded = {
        (label, TARGET_STYLE): encode_shaded(on_white(picture, size)) for label, picture in target.items()
    }
    with ProcessPoolExecutor() as workers:
        drawn = workers.map(partial(draw, size=size), svgs.values(), chunksize=32)
        for (label, style), (flat, shaded) in zip(svgs, drawn, strict=True):
            encoded[label, style] = flat
            if style in SHADED_STYLES:
                encoded[label, f"shaded {style}"] = shaded
                splits[label, f"shaded {style}"] = splits[label, style]

    PICTURES.mkdir(parents=True, exist_ok=True)
    with (PICTURES / "pictures.bin").open("wb") as blob, (PICTURES / "pictures.jsonl").open("w") as index:
        for (label, style), webp in encoded.items():
            line = {"label": label, "style": style, "split": splits[label, style], "bytes": len(webp)}
            index.write(json.dumps(line) + "\n")
            blob.write(webp)

    texts = []
    for label, style in encoded:
        texts += [caption(label, style), *loose_captions(label, style, 4, "bpe")]
    train_tokenizer(texts, vocabulary_size, HERE / "out/tokenizer")


def draw(svg: str, size: int) -> tuple[bytes, bytes]:
    """An icon as it is, and lit."""
    picture = rasterise(svg)
    shaded = shade(picture).resize((size, size), Image.Resampling.LANCZOS)
    return encode_flat(on_white(picture, size)), encode_shaded(shaded)


if __name__ == "__main__":
    main()
