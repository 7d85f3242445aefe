"""Cleaning of captions: small pure rules on strings, and a report of every change and rejection.

Loads no model: the stage passes in the function that counts CLIP tokens.
"""

import html
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ftfy
import pandas as pd

from sdxl_lora.config import CaptionsConfig

_Rule = Callable[[str], str]


def repair_unicode(caption: str) -> str:
    """Undo broken encodings, normalise to NFC, drop control characters, straighten quotes.

    "a cafÃ©" -> "a café"; "Naruto&#39;s friend" -> "Naruto's friend".
    """
    return ftfy.fix_text(html.unescape(caption), normalization="NFC")


def collapse_whitespace(caption: str) -> str:
    """Leave one space between words, none at the ends or before punctuation: "a  man , x" -> "a man, x"."""
    return re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", caption)).strip()


def remove_artefacts(caption: str, artefacts: Sequence[str]) -> str:
    """Remove words that a captioning model makes up: "arafed man with a hat" -> "man with a hat".

    An article before such a word is adapted to the next word: "an arafed image" -> "an image",
    "an araffe man" -> "a man". Its comma goes too: "a man, arafed, in a hat" -> "a man, in a hat".
    """
    if not artefacts:
        return caption
    # Longest first: a regular expression takes the first alternative that matches, `arafe` before `arafed`.
    words = "|".join(re.escape(artefact) for artefact in sorted(artefacts, key=len, reverse=True))
    caption = re.sub(rf"\b(an?)\s+(?:(?:{words})\s+)+(\w)", _with_article, caption, flags=re.IGNORECASE)
    # At the end of a caption no word follows that the article could go with, so it is removed as well.
    caption = re.sub(rf"(?:\b(?:an?|the)\s+)?\b(?:{words})\W*$", "", caption, flags=re.IGNORECASE)
    return re.sub(rf"\b(?:{words})\b[\s,]*", "", caption, flags=re.IGNORECASE)


def _with_article(match: re.Match[str]) -> str:
    """Return `a` or `an`, whichever the next word's first letter needs, capitalised as before."""
    article = "an" if match[2].lower() in "aeiou" else "a"
    return f"{article.capitalize() if match[1][0].isupper() else article} {match[2]}"


def remove_repeated_words(caption: str) -> str:
    """Keep one of a run of equal words: "a a man with with a hat" -> "a man with a hat"."""
    return re.sub(r"\b(\w+)(?:\s+\1\b)+", r"\1", caption, flags=re.IGNORECASE)


def remove_repeated_phrases(caption: str) -> str:
    """Keep one of a run of equal phrases: "a man in a hat in a hat in a hat" -> "a man in a hat".

    Finds phrases of two to eight words, also with commas or "and" between the repetitions.
    """
    repetitions = r"(?:,?\s+(?:and\s+)?\1\b)+"
    # Lazy (`{1,7}?`), so that the shortest repeated phrase is found: "in a hat", not "in a hat in a hat".
    return re.sub(rf"\b(\w+(?:[\s,]+\w+){{1,7}}?){repetitions}", r"\1", caption, flags=re.IGNORECASE)


def add_trigger(caption: str, trigger: str) -> str:
    """Put the trigger phrase in front unless the caption begins with it: "a man" -> "naruto style, a man"."""
    if re.match(rf"{re.escape(trigger)}(?!\w)", caption, flags=re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


@dataclass
class CaptionsReport:
    """What happened to every caption."""

    changes: list[dict[str, str]] = field(default_factory=list)
    """Image, text before, text after and names of the rules, for each changed caption."""
    rejections: list[dict[str, str]] = field(default_factory=list)
    """Image, caption and reason, for each rejected caption."""
    rules: Counter[str] = field(default_factory=Counter)
    """How many captions each rule changed."""
    kept: list[tuple[str, str]] = field(default_factory=list)
    """Image and clean caption without the trigger, for each caption kept."""
    tokens: list[int] = field(default_factory=list)
    """Number of CLIP tokens of each caption kept, including trigger, start and end."""
    truncated: int = 0
    """Number of captions kept with more than captions.max_tokens."""

    def metrics(self) -> dict[str, object]:
        """Return the report as numbers."""
        return {
            "kept": len(self.kept),
            "rejected": len(self.rejections),
            "repeated": len(self.kept) - len({caption for _, caption in self.kept}),
            "changed": len(self.changes),
            "truncated": self.truncated,
            "tokens": {"mean": sum(self.tokens) / len(self.tokens), "max": max(self.tokens)},
            "changed_by": dict(sorted(self.rules.items())),
        }


@dataclass(frozen=True)
class _DuplicateCaption:
    """A caption that several images have."""

    caption: str
    images: list[str]
    """Their file names."""


def read_captions(path: Path) -> pd.DataFrame:
    """Read the captions that download_dataset wrote: columns id, image and caption.

    Raises:
        FileNotFoundError: download_dataset has not run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: run `dvc repro download_dataset` first")
    return pd.read_json(path, lines=True, dtype=False)


def clean_captions(
    frame: pd.DataFrame, config: CaptionsConfig, count_tokens: Callable[[list[str]], list[int]]
) -> tuple[pd.DataFrame, CaptionsReport]:
    """Apply every rule to every caption and reject captions that are too short or too long.

    Args:
        frame: columns id, image and caption.
        count_tokens: returns the number of CLIP tokens of each text, including start and end.

    Returns:
        The rows kept, with clean captions, and the report.

    Raises:
        ValueError: no caption is left.
    """
    report = CaptionsReport()
    rules = _caption_rules(config)
    cleaned = [_apply_rules(caption, rules) for caption in frame["caption"]]
    finals = [add_trigger(text, config.trigger) if config.trigger else text for text, _ in cleaned]
    tokens = count_tokens(finals)
    kept: list[bool] = []
    for row, (text, applied), count in zip(frame.to_dict("records"), cleaned, tokens, strict=True):
        reason = _rejection(text, count, config)
        kept.append(reason is None)
        if reason is not None:
            report.rejections.append({"image": row["image"], "caption": row["caption"], "reason": reason})
            continue
        report.kept.append((row["image"], text))
        report.tokens.append(count)
        report.truncated += count > config.max_tokens
        report.rules.update(applied)
        if applied:
            report.changes.append(
                {"image": row["image"], "before": row["caption"], "after": text, "rules": ", ".join(applied)}
            )
    if not any(kept):
        raise ValueError(
            f"all {len(frame)} captions were rejected, the first for: {report.rejections[0]['reason']}; "
            "check download.caption_column, captions.min_words and captions.too_long"
        )
    return frame.assign(caption=finals)[kept], report


def _caption_rules(config: CaptionsConfig) -> dict[str, _Rule]:
    """Return the rules by name, in the order in which they are applied."""
    return {
        "unicode": repair_unicode,
        "artefacts": partial(remove_artefacts, artefacts=config.artefacts),
        "repeated_phrases": remove_repeated_phrases,
        "repeated_words": remove_repeated_words,
        "whitespace": collapse_whitespace,
    }


def _apply_rules(caption: str, rules: dict[str, _Rule]) -> tuple[str, list[str]]:
    """Return the caption after all rules, and the names of the rules that changed it."""
    applied = []
    for name, rule in rules.items():
        changed = rule(caption)
        if changed != caption:
            applied.append(name)
        caption = changed
    return caption, applied


def _rejection(caption: str, tokens: int, config: CaptionsConfig) -> str | None:
    """Return why a clean caption without its trigger is rejected; None if it is kept."""
    words = len(caption.split())
    if words == 0:
        return "empty"
    if words < config.min_words:
        return f"{words} words, captions.min_words is {config.min_words}"
    if tokens > config.max_tokens and config.too_long == "reject":
        return f"{tokens} tokens, captions.max_tokens is {config.max_tokens}"
    return None


def duplicate_captions(kept: Sequence[tuple[str, str]]) -> list[_DuplicateCaption]:
    """Return captions that several images have, the most frequent first."""
    images: dict[str, list[str]] = {}
    for image, caption in kept:
        images.setdefault(caption, []).append(image)
    repeated = [_DuplicateCaption(caption, names) for caption, names in images.items() if len(names) > 1]
    return sorted(repeated, key=lambda duplicate: -len(duplicate.images))


def frequent_phrases(captions: Iterable[str], most: int) -> list[tuple[str, int]]:
    """Return phrases of two to five words with the number of captions that contain them, most frequent first.

    A phrase is left out if it only occurs within a longer one: "man with" in "a man with a hat".
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for caption in captions:
        counts.update(set(_phrases(re.findall(r"[\w'-]+", caption.lower()))))
    repeated = {phrase: count for phrase, count in counts.items() if count > 1}
    # Equal counts mean that the part never occurs outside the longer phrase.
    contained = {
        part
        for phrase, count in repeated.items()
        for part in (phrase[1:], phrase[:-1])
        if repeated.get(part) == count
    }
    frequent = sorted(set(repeated) - contained, key=lambda phrase: (-repeated[phrase], phrase))
    return [(" ".join(phrase), repeated[phrase]) for phrase in frequent[:most]]


def _phrases(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield all runs of two to five words."""
    for length in range(2, 6):
        for start in range(len(words) - length + 1):
            yield tuple(words[start : start + length])
