"""Random draws that depend on what they are for, not on what was drawn before.

Every draw comes from a CPU generator keyed by words and numbers (seed, "noise", step, ...), so it is the same
on any device, after a resume, and however examples are spread over processes.
"""

import hashlib

import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """A CPU generator whose stream is a function of `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
