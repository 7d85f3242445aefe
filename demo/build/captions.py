"""Captions of an image for training the base model, also with styles that do not exist."""

import random

from emoji import caption

# "fluent" is the first word of the target style and of a base style. For an unknown style, the base model
# should fall back on the nearest style that it knows, not on a mixture of all: an adapter starts best there.
SYLLABLES = (
    "ba",
    "co",
    "du",
    "fe",
    "gri",
    "ho",
    "jo",
    "ka",
    "lum",
    "mi",
    "no",
    "pre",
    "qua",
    "ro",
    "sti",
    "tu",
    "vex",
    "zy",
)


def style_words(rng: random.Random) -> str:
    """Return one or two invented words that do not name a style."""
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 2))]
    return " ".join(words)


def loose_captions(label: str, style: str, count: int, seed: str) -> list[str]:
    """Return `count` captions of one image without its style: the label alone, then with invented styles.

    A model trained on them generates a clean image for a style that it does not know. The invented name of a
    style of two words keeps the first: "pizza, fluent rozy style" is a caption of an image in "fluent flat".
    """
    rng = random.Random(f"{seed} {label} {style}")
    known, space, _ = style.rpartition(" ")
    return [label, *(caption(label, known + space + style_words(rng)) for _ in range(count - 1))]
