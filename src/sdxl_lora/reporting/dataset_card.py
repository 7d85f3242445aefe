"""What an adapter was trained on, on one page: `data/reports/dataset.md`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from sdxl_lora.config import EncodingConfig
from sdxl_lora.data.encoded_dataset import Example, data_digest
from sdxl_lora.data.encoding_report import EncodingReport
from sdxl_lora.storage.repository import file_digest

_SPLITS = ("train", "held_out")


def dataset_card(
    source: Mapping[str, object], report: EncodingReport, config: EncodingConfig, folder: Path
) -> str:
    """The page, as Markdown.

    Args:
        source: what download_dataset recorded about the origin.
        report: of the encoding.
        folder: the encoded data set.
    """
    return "".join(
        [
            "# Data set\n",
            *_section("Source", _source_rows(source)),
            *_section("Examples", _example_rows(source, report)),
            *_section("Pictures", _picture_rows(report, config)),
            *_section("Digests", _digest_rows(report.examples)),
            "\nA digest is the Merkle root over examples: each one's image, caption and tensors. "
            "Equal digests are equal data, however it is sharded and ordered.\n",
            *_section("Shards", _shard_rows(folder)),
        ]
    )


def _section(title: str, rows: Iterator[tuple[str, object]]) -> Iterator[str]:
    """A heading and a table of two columns."""
    yield f"\n## {title}\n\n| | |\n|---|---|\n"
    for name, value in rows:
        yield f"| {cell(name)} | {cell(value)} |\n"


def cell(value: object) -> str:
    """Text that stays within its cell, and is no markup."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")


def _source_rows(source: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    licence = source["licence"]
    yield "repository", source["repository"]
    yield "revision", source["revision"]
    if source["requested_revision"] != source["revision"]:
        yield "revision asked for", source["requested_revision"]
    yield (
        "licence",
        ", ".join(licence) if isinstance(licence, list) else licence or "not stated by the source",
    )


def _example_rows(source: Mapping[str, object], report: EncodingReport) -> Iterator[tuple[str, object]]:
    sides = Counter(example.split for example in report.examples)
    yield "downloaded", source["examples"]
    yield "trained on", sides["train"]
    yield "held out", sides["held_out"]
    yield "captions", sum(1 + len(example.more_captions) for example in report.examples)
    left_out = Counter(finding.kind for finding in report.findings if finding.left_out)
    for kind, count in sorted(left_out.items()):
        yield f"images left out: {kind}", count
    flagged = Counter(finding.kind for finding in report.findings if not finding.left_out)
    for kind, count in sorted(flagged.items()):
        yield f"images flagged: {kind}", count


def _picture_rows(report: EncodingReport, config: EncodingConfig) -> Iterator[tuple[str, object]]:
    for number, name in enumerate(("width", "height")):
        values = [size[number] for size in report.sizes]
        yield f"original {name}: least, median, most", f"{min(values)}, {median(values):g}, {max(values)}"
    yield "aspect ratios, crop", f"{config.aspect_ratios}, {config.crop}"
    yield "mirrored as well", "yes" if config.flip else "no"
    for (width, height), count in sorted(report.encoded_sizes.items()):
        yield f"encoded at {width} x {height}", count


def _digest_rows(examples: Sequence[Example]) -> Iterator[tuple[str, object]]:
    for split in _SPLITS:
        yield split, data_digest(example for example in examples if example.split == split)
    yield "both", data_digest(examples)


def _shard_rows(folder: Path) -> Iterator[tuple[str, object]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield path.name, f"{path.stat().st_size} bytes, sha256 {file_digest(path)}"
