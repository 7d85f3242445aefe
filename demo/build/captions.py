"""What the base model reads of a picture: its caption, and captions in styles that do not exist."""

import random

from emoji import caption

# "fluent" is the first word of the target style and of a base style. An adapter starts best from a base model
# that falls back on the nearest style it knows instead of on a mush of all of them.
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


def style_words(draw: random.Random) -> str:
    """One or two invented words that name no style."""
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(draw.randint(1, 2))]
    return " ".join(words)


def loose_captions(label: str, style: str, count: int, seed: str) -> list[str]:
    """`count` captions of one picture without its style: the label alone, then with invented style names.

    A model that has read them draws *some* clean picture for a style that it does not know. Pictures in a
    style of two words keep the first: "pizza, fluent rozy style" is drawn in the style "fluent flat".
    """
    draw = random.Random(f"{seed} {label} {style}")
    known, space, _ = style.rpartition(" ")
    return [label, *(caption(label, known + space + style_words(draw)) for _ in range(count - 1))]
