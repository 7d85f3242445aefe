"""Batches of one size: kernels choose their order of sums by the shape of their input.

Rows of a batch that is always as large have the same bits whatever stands next to them.
"""

import torch
from torch import Tensor


def pad_rows(rows: Tensor, size: int) -> Tensor:
    """Append copies of the last row to `rows`, (B, ...), B <= size; return (size, ...)."""
    missing = size - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
