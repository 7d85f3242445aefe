"""Common claims about memory-saving techniques, and the measurements that test them.

A claim compares two configurations that differ only in one technique, within one session on one machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.results import OK, Benchmark, Configuration, Result, differing, select

REFERENCE: Configuration = {
    "precision": "fp16",
    "quantization": "none",
    "checkpointing": "all",
    "attention": "sdpa",
    "optimizer": "adamw_8bit",
    "text_encoders": "trained",
    "vram_gib": None,
    "batch_size": 3,
    "micro_batch_size": "auto",
    "rank": 16,
    "resolution": 1024,
}
"""The 16 GB recipe without its memory limit. The pair nearest to it is shown."""


@dataclass(frozen=True)
class Change:
    """Memory and time of a run without a technique and of one with it."""

    gib: tuple[float, float]
    """Peak reserved memory without and with it."""
    seconds: tuple[float, float]
    """Seconds per step without and with it."""

    @property
    def memory_ratio(self) -> float:
        return self.gib[1] / self.gib[0]

    @property
    def time_ratio(self) -> float:
        return self.seconds[1] / self.seconds[0]


@dataclass(frozen=True)
class Claim:
    """A common claim about a technique."""

    technique: str
    usual: str
    applied: Configuration
    """Values of a run with the technique."""
    absent: Configuration
    """Values of a run without it."""
    holds: Callable[[Change], bool]
    rule: str
    """`holds` in words."""


@dataclass(frozen=True)
class Pair:
    """Two results that differ only in one technique."""

    applied: Result
    absent: Result

    @property
    def change(self) -> Change | None:
        """Return the change; None if either run failed, or ran on a CPU, where memory is not measured."""
        if {self.applied.outcome, self.absent.outcome} != {OK}:
            return None
        time, time_before = self.applied.seconds_per_step, self.absent.seconds_per_step
        peak, peak_before = self.applied.peak_reserved_gib, self.absent.peak_reserved_gib
        if time is None or time_before is None or peak is None or peak_before is None:
            return None
        return Change((peak_before, peak), (time_before, time))

    @property
    def deviations(self) -> dict[str, object]:
        """Return the values that both runs share and that differ from the reference."""
        shared, other = self.applied.configuration, self.absent.configuration
        keys = differing(shared, REFERENCE) & REFERENCE.keys() - differing(shared, other)
        return {key: shared.get(key) for key in sorted(keys) if key in shared}


CLAIMS = (
    Claim(
        "fp16 instead of fp32",
        "half the memory, and faster",
        {"precision": "fp16"},
        {"precision": "fp32"},
        lambda change: change.memory_ratio <= 0.55 and change.time_ratio < 1,
        "at most 0.55 of the memory, less time",
    ),
    Claim(
        "8-bit Adam instead of AdamW",
        "optimizer states a quarter, so much less memory",
        {"optimizer": "adamw_8bit"},
        {"optimizer": "adamw"},
        lambda change: change.memory_ratio <= 0.9,
        "at most 0.9 of the memory",
    ),
    Claim(
        "gradient checkpointing",
        "most of the activations saved, about 20 % slower",
        {"checkpointing": "all"},
        {"checkpointing": "none"},
        lambda change: change.memory_ratio < 0.7 and 1.1 <= change.time_ratio <= 1.3,
        "below 0.7 of the memory, 10 to 30 % slower",
    ),
    Claim(
        "xformers instead of PyTorch's SDPA",
        "less memory and faster at 1024 px",
        {"attention": "xformers"},
        {"attention": "sdpa"},
        lambda change: change.memory_ratio < 1 and change.time_ratio < 1,
        "less memory, less time",
    ),
    Claim(
        "PyTorch's SDPA instead of plain attention",
        "less memory and faster",
        {"attention": "sdpa"},
        {"attention": "math"},
        lambda change: change.memory_ratio < 1 and change.time_ratio < 1,
        "less memory, less time",
    ),
    Claim(
        "training the text encoders too",
        "hardly any memory",
        {"text_encoders": "trained"},
        {"text_encoders": "frozen"},
        lambda change: change.memory_ratio <= 1.05,
        "at most 5 % more memory",
    ),
    Claim(
        "bit-identical kernels",
        "slower",
        {"deterministic": True},
        {"deterministic": False},
        lambda change: change.time_ratio > 1,
        "more time",
    ),
)


def find_pair(claim: Claim, benchmark: Benchmark, session: Sequence[Result]) -> Pair | None:
    """Return the pair of a session's results nearest to the reference; pairs without failure come first."""
    pairs = [
        Pair(applied, absent)
        for applied, absent in product(
            select(session, benchmark, claim.applied), select(session, benchmark, claim.absent)
        )
        if differing(applied.configuration, absent.configuration) == claim.applied.keys()
    ]
    return min(pairs, key=lambda pair: (pair.change is None, len(pair.deviations)), default=None)
