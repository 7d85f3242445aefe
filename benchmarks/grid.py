"""Combinations of a benchmark's options, and the command that measures one of them."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from itertools import product

from benchmarks.results import Configuration


def gib_or_none(text: str) -> float | None:
    """Parse a size in GiB; return None, no limit, for `none`."""
    return None if text == "none" else float(text)


def true_or_false(text: str) -> bool:
    """Parse `true` or `false`."""
    return {"true": True, "false": False}[text.lower()]


def number_or_word(text: str) -> int | str:
    """Parse a number, or return a word such as `auto` unchanged."""
    return int(text) if text.isdigit() else text


def combinations(
    options: argparse.Namespace, varied: Sequence[str], fixed: Sequence[str]
) -> Iterator[Configuration]:
    """Yield every combination of the `varied` options, which are lists, with the `fixed` ones unchanged."""
    for values in product(*(getattr(options, name) for name in varied)):
        yield dict(zip(varied, values, strict=True)) | {name: getattr(options, name) for name in fixed}


def flags(configuration: Configuration) -> list[str]:
    """Return the command-line flags for a configuration."""
    words = []
    for name, value in configuration.items():
        words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
    return words


def repeat(module: str, configuration: Configuration, **others: object) -> str:
    """Return the command that measures only this configuration."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *flags(others), *flags(configuration)])
