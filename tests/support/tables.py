"""Tables of the pages that tests write."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(row_of(row) for row in rows)


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"
