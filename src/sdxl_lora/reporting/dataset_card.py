"""Page about the data set that an adapter was trained on: `data/reports/dataset.md`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.encoded_dataset import Example, data_digest
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.reporting.markdown import escape, table
from sdxl_lora.storage.repository import file_digest

_SPLITS = ("train", "held_out")
_Rows = Iterator[tuple[str, object]]


def dataset_card(
    source: Mapping[str, object], report: EncodingReport, config: EncodingConfig, folder: Path
) -> str:
    """Return the page as Markdown.

    Args:
        source: content of source.json, the origin that download_dataset recorded.
        report: report of the encoding.
        folder: the encoded data set.
    """
    return "\n\n".join(
        [
            "# Data set",
            _section("Source", _source_rows(source)),
            _section("Examples", _example_rows(source, report)),
            _section("Images", _image_rows(report, config)),
            _section("Digests", _digest_rows(report.examples)),
            "A digest is the Merkle root over examples: each one's image, caption and tensors. "
            "Equal digests mean equal data, whatever its order and shards.",
            _section("Shards", _shard_rows(folder)) + "\n",
        ]
    )


def _section(title: str, rows: _Rows) -> str:
    """Return a heading and a table of two columns."""
    cells = [(escape(name), escape(str(value))) for name, value in rows]
    return f"## {title}\n\n{table(('', ''), cells)}"


def _source_rows(source: Mapping[str, object]) -> _Rows:
    licence = source["licence"]
    yield "repository", source["repository"]
    yield "revision", source["revision"]
    if source["requested_revision"] != source["revision"]:
        yield "revision asked for", source["requested_revision"]
    yield (
        "licence",
        ", ".join(licence) if isinstance(licence, list) else licence or "not stated by the source",
    )


def _example_rows(source: Mapping[str, object], report: EncodingReport) -> _Rows:
    splits = Counter(example.split for example in report.examples)
    yield "downloaded", source["examples"]
    yield "trained on", splits["train"]
    yield "held out", splits["held_out"]
    yield "captions", sum(1 + len(example.more_captions) for example in report.examples)
    left_out = Counter(finding.kind for finding in report.findings if finding.left_out)
    for kind, count in sorted(left_out.items()):
        yield f"images left out: {kind}", count
    flagged = Counter(finding.kind for finding in report.findings if not finding.left_out)
    for kind, count in sorted(flagged.items()):
        yield f"images flagged: {kind}", count


def _image_rows(report: EncodingReport, config: EncodingConfig) -> _Rows:
    for number, name in enumerate(("width", "height")):
        values = [size[number] for size in report.sizes]
        yield f"original {name}: least, median, most", f"{min(values)}, {median(values):g}, {max(values)}"
    yield "aspect ratios, crop", f"{config.aspect_ratios}, {config.crop}"
    yield "mirrored as well", "yes" if config.flip else "no"
    for (width, height), count in sorted(report.encoded_sizes.items()):
        yield f"encoded at {width} x {height}", count


def _digest_rows(examples: Sequence[Example]) -> _Rows:
    for split in _SPLITS:
        yield split, data_digest(example for example in examples if example.split == split)
    yield "both", data_digest(examples)


def _shard_rows(folder: Path) -> _Rows:
    for path in sorted(folder.glob("*.safetensors")):
        yield path.name, f"{path.stat().st_size} bytes, sha256 {file_digest(path)}"
