"""Stateless random numbers: each draw depends on its key, not on the draws before it.

Every draw comes from a CPU generator with a key of words and numbers (seed, "noise", step, ...). It is
therefore the same on any device, after a resume, and for any distribution of examples over processes.
"""

import hashlib

import torch


def keyed_generator(*key: str | int) -> torch.Generator:
    """Return a CPU generator whose stream is a function of `key` alone."""
    # Not `hash()`, which is salted per process. Shifted because manual_seed takes 64 bits with a sign.
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
