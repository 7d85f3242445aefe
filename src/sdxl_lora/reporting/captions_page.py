"""Page about the cleaning of captions: `data/reports/captions.html`."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher

from sdxl_lora.config import CaptionsConfig
from sdxl_lora.data.captions import CaptionsReport, duplicate_captions, frequent_phrases
from sdxl_lora.reporting.charts import token_histogram
from sdxl_lora.reporting.page import render_page

MAX_ROWS = 1000
_MAX_PHRASES = 30
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class _Part:
    """A stretch of a caption in the table of changes."""

    kind: str
    """`kept`, or the HTML element `del` or `ins`."""
    text: str


def render_captions_page(report: CaptionsReport, config: CaptionsConfig) -> str:
    """Return the page's HTML."""
    captions = [caption for _, caption in report.kept]
    return render_page(
        "captions_page.html.jinja",
        trigger=config.trigger,
        tiles={
            "kept": len(report.kept),
            "changed": len(report.changes),
            "rejected": len(report.rejections),
            "truncated": report.truncated,
            "mean tokens": f"{sum(report.tokens) / len(report.tokens):.1f}",
        },
        clip_tokens=_CLIP_TOKENS,
        max_tokens=config.max_tokens,
        histogram=token_histogram(report.tokens, config.max_tokens),
        rules=report.rules.most_common(),
        rejections=report.rejections[:MAX_ROWS],
        more_rejections=max(0, len(report.rejections) - MAX_ROWS),
        duplicates=duplicate_captions(report.kept)[:MAX_ROWS],
        phrases=frequent_phrases(captions, _MAX_PHRASES),
        changes=[
            {
                "image": row["image"],
                "parts": list(differences(row["before"], row["after"])),
                "rules": row["rules"],
            }
            for row in report.changes[:MAX_ROWS]
        ],
        more_changes=max(0, len(report.changes) - MAX_ROWS),
    )


def differences(before: str, after: str) -> Iterator[_Part]:
    """Yield the caption before cleaning, word by word, with removed text as `del` and added text as `ins`."""
    old, new = before.split(), after.split()
    for _, start, stop, new_start, new_stop in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        removed, added = " ".join(old[start:stop]), " ".join(new[new_start:new_stop])
        if removed == added:
            yield _Part("kept", f"{removed} ")
            continue
        for kind, text in (("del", removed), ("ins", added)):
            if text:
                yield _Part(kind, text)
                yield _Part("kept", " ")
