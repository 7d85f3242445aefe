"""Markdown as GitHub and the Hub render it: tables, and text of others that stays text."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_MARKUP = re.compile(r"[\\`*{}\[\]#~@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.")
"""Characters with a meaning. `_` has one only at a word's edge; `://`, `www.` and `@` turn into links."""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_JOINERS = "\u200c\u200d"  # format characters that emoji and many scripts need


def escape(text: str) -> str:
    """Return one line of Markdown that shows `text`: no formatting, link, HTML or control character."""
    escaped = _MARKUP.sub(lambda match: f"\\{match[0]}", _one_line(text))
    return re.sub("[&<>]", lambda match: _ENTITIES[match[0]], escaped)


def code(text: str) -> str:
    """Return a code span that shows `text`, fenced by more backticks than it has in a row."""
    text = _one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of cells that are Markdown; a `|` cannot end a cell, not even in a code span."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def _one_line(text: str) -> str:
    """Return `text` with control and invisible format characters and line ends as single spaces."""
    visible = (
        " " if unicodedata.category(character)[0] == "C" and character not in _JOINERS else character
        for character in text
    )
    return " ".join("".join(visible).split())
