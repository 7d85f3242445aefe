"""Combinations of a benchmark's options, and the command line that repeats one of them."""

import argparse
import shlex
from collections.abc import Iterator, Sequence
from itertools import product

from benchmarks.results import Configuration


def gib_or_none(text: str) -> float | None:
    """A size in GiB, or None for `none`: no limit."""
    return None if text == "none" else float(text)


def true_or_false(text: str) -> bool:
    """An option's value that is a truth value."""
    return {"true": True, "false": False}[text.lower()]


def number_or_word(text: str) -> int | str:
    """A number, or a word such as `auto`."""
    return int(text) if text.isdigit() else text


def combinations(
    options: argparse.Namespace, varied: Sequence[str], fixed: Sequence[str]
) -> Iterator[Configuration]:
    """Every combination of the `varied` options, which are lists, with the `fixed` ones as they are."""
    for values in product(*(getattr(options, name) for name in varied)):
        yield dict(zip(varied, values, strict=True)) | {name: getattr(options, name) for name in fixed}


def flags(configuration: Configuration) -> list[str]:
    """The command line's flags for a configuration."""
    words = []
    for name, value in configuration.items():
        words += [f"--{name.replace('_', '-')}", "none" if value is None else str(value)]
    return words


def repeat(module: str, configuration: Configuration, **others: object) -> str:
    """The command that measures this configuration alone."""
    return shlex.join(["python", "-m", f"benchmarks.{module}", *flags(others), *flags(configuration)])
