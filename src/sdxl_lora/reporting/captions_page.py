"""What happened to the captions, as one page for people: `data/reports/captions.html`.

The page stands alone: no script, nothing loaded from elsewhere. Captions are strangers' text, and escaped.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from jinja2 import Environment, StrictUndefined

from sdxl_lora.config import CaptionsConfig
from sdxl_lora.data.captions import CaptionsReport, duplicate_captions, frequent_phrases

MAX_ROWS = 1000
_MOST_PHRASES = 30
CHART_WIDTH, CHART_HEIGHT = 900, 200
_CLIP_TOKENS = 77

_TEMPLATE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Captions</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
  h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
  p { margin: .3rem 0 .8rem; color: #555; }
  table { border-collapse: collapse; width: 100%; }
  th { text-align: left; font-weight: 600; border-bottom: 2px solid #ccd; padding: .3rem .8rem .3rem 0; }
  td { border-bottom: 1px solid #e6e8ee; padding: .3rem .8rem .3rem 0; vertical-align: top; overflow-wrap: anywhere; }
  td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
  td.image { color: #667; white-space: nowrap; font-size: .85em; }
  del { background: #ffe1e0; color: #a3211b; } ins { background: #dcf5e0; color: #14692a; text-decoration: none; }
  .tiles { display: flex; gap: 1rem; flex-wrap: wrap; margin: 1.2rem 0; }
  .tile { background: #f4f5f9; border-radius: 8px; padding: .7rem 1.2rem; min-width: 6.5rem; }
  .tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
  svg text { font: 12px system-ui, sans-serif; fill: #667; }
  .bar { fill: #5b7fd1; } .bar.over { fill: #d9534f; } .limit { stroke: #d9534f; stroke-dasharray: 4 3; }
</style>
<h1>Captions</h1>
<p>What cleaning did to them. Trigger phrase: {{ trigger or "none" }}.</p>
<div class="tiles">
{%- for name, value in tiles.items() %}
  <div class="tile"><b>{{ value }}</b>{{ name }}</div>
{%- endfor %}
</div>

<h2>Length in CLIP tokens</h2>
<p>Start and end included. SDXL's encoders read {{ clip_tokens }}; captions.max_tokens is {{ max_tokens }}.</p>
<svg viewBox="0 -20 {{ width }} {{ height + 45 }}" width="100%" role="img" aria-label="Histogram of caption lengths">
{%- for bar in bars %}
  <rect class="bar{{ ' over' if bar.over }}" x="{{ bar.x }}" y="{{ height - bar.height }}" width="{{ bar.width }}" height="{{ bar.height }}"><title>{{ bar.tokens }} tokens: {{ bar.count }}</title></rect>
{%- endfor %}
  <line x1="0" x2="{{ width }}" y1="{{ height }}" y2="{{ height }}" stroke="#ccd"/>
  <line class="limit" x1="{{ limit_x }}" x2="{{ limit_x }}" y1="-5" y2="{{ height }}"/>
  <text x="{{ limit_x - 4 }}" y="6" text-anchor="end">{{ max_tokens }} tokens</text>
{%- for tick in ticks %}
  <text x="{{ tick.x }}" y="{{ height + 17 }}" text-anchor="middle">{{ tick.tokens }}</text>
{%- endfor %}
  <text x="0" y="-6">{{ most }} captions</text>
</svg>

<h2>Rules</h2>
<table><tr><th>rule<th class="number">captions changed</tr>
{%- for rule, count in rules %}
<tr><td>{{ rule }}<td class="number">{{ count }}</tr>
{%- else %}
<tr><td colspan="2">No rule changed a caption.</tr>
{%- endfor %}
</table>

<h2>Rejected</h2>
<table><tr><th>image<th>caption<th>reason</tr>
{%- for row in rejections %}
<tr><td class="image">{{ row.image }}<td>{{ row.caption }}<td>{{ row.reason }}</tr>
{%- else %}
<tr><td colspan="3">None.</tr>
{%- endfor %}
</table>
{%- if more_rejections %}
<p>{{ more_rejections }} more are in caption_rejections.csv.</p>
{%- endif %}

<h2>The same caption, several times</h2>
<table><tr><th>caption<th class="number">images<th>such as</tr>
{%- for row in duplicates %}
<tr><td>{{ row.caption }}<td class="number">{{ row.images | length }}<td class="image">{{ row.images[:3] | join(", ") }}</tr>
{%- else %}
<tr><td colspan="3">None.</tr>
{%- endfor %}
</table>

<h2>Most frequent phrases</h2>
<table><tr><th>phrase<th class="number">captions</tr>
{%- for phrase, count in phrases %}
<tr><td>{{ phrase }}<td class="number">{{ count }}</tr>
{%- else %}
<tr><td colspan="2">None is in two captions.</tr>
{%- endfor %}
</table>

<h2>Changed</h2>
<table><tr><th>image<th>before and after<th>rules</tr>
{%- for row in changes %}
<tr><td class="image">{{ row.image }}<td>
  {%- for part in row.parts %}
    {%- if part.kind == "kept" %}{{ part.text }}{% else %}<{{ part.kind }}>{{ part.text }}</{{ part.kind }}>{% endif %}
  {%- endfor %}<td>{{ row.rules }}</tr>
{%- else %}
<tr><td colspan="3">None.</tr>
{%- endfor %}
</table>
{%- if more_changes %}
<p>{{ more_changes }} more are in caption_changes.csv.</p>
{%- endif %}
</html>
"""  # noqa: E501


@dataclass(frozen=True)
class _Part:
    """A stretch of a caption in the table of changes."""

    kind: str
    """`kept`, or an HTML element: `del` or `ins`."""
    text: str


def render_captions_page(report: CaptionsReport, config: CaptionsConfig) -> str:
    """The page, as HTML."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    captions = [caption for _, caption in report.kept]
    return environment.from_string(_TEMPLATE).render(
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
        **histogram(report.tokens, config.max_tokens),
        rules=report.rules.most_common(),
        rejections=report.rejections[:MAX_ROWS],
        more_rejections=max(0, len(report.rejections) - MAX_ROWS),
        duplicates=duplicate_captions(report.kept)[:MAX_ROWS],
        phrases=frequent_phrases(captions, _MOST_PHRASES),
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


def histogram(tokens: Sequence[int], limit: int) -> dict[str, object]:
    """Bars, ticks and the place of the limit, in units of the drawing.

    Args:
        tokens: of each caption.
        limit: number of tokens that is the last to be read.
    """
    counts = Counter(tokens)
    last = max(limit, max(counts)) + 1
    most = max(counts.values())
    step = CHART_WIDTH / last
    return {
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "most": most,
        "limit_x": round((limit + 0.5) * step, 2),
        "bars": [
            {
                "tokens": value,
                "count": count,
                "x": round((value - 0.5) * step, 2),
                "width": round(0.9 * step, 2),
                "height": round(CHART_HEIGHT * count / most, 2),
                "over": value > limit,
            }
            for value, count in sorted(counts.items())
        ],
        "ticks": [{"tokens": value, "x": round(value * step, 2)} for value in range(10, last, 10)],
    }


def differences(before: str, after: str) -> Iterator[_Part]:
    """The caption before, with what went as `del` and what came as `ins`, word by word."""
    old, new = before.split(), after.split()
    for _, start, stop, new_start, new_stop in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        went, came = " ".join(old[start:stop]), " ".join(new[new_start:new_stop])
        if went == came:
            yield _Part("kept", f"{went} ")
            continue
        for kind, text in (("del", went), ("ins", came)):
            if text:
                yield _Part(kind, text)
                yield _Part("kept", " ")
