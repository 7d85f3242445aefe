"""The examples of each step, as a function of the seed and the step's number, without state to save.

Symbols of the closed form: bucket b has m_b members, a batch takes n. An epoch visits every member once and
carries over those that fill no batch. So after e epochs bucket b has completed floor(e m_b / n) batches, and
(e m_b) mod n of its examples wait, whatever the shuffles were. Both are arithmetic: a resume at step 100,000
replays at most the last few shuffles and not all before it.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import torch

from sdxl_lora.runtime.rng import keyed_generator


def batch_order(buckets: Sequence[Hashable], size: int, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Indices of each batch's examples, from batch number `first` of an endless sequence on.

    Every epoch visits every example once, in an order of its own. Examples wait for others of their bucket,
    and whenever `size` of them have come together, they are the next batch. Those that still wait at the end
    of an epoch begin the bucket's first batch in the next one. With a single bucket, batches are pieces of
    the shuffled epochs, one after the other.

    To start at a large number takes as long as to start at a small one.

    Args:
        buckets: of each example; a batch is of one bucket.
        size: examples of a batch.
        seed: key of the shuffles.
    """
    epoch, skipped = _epoch_of_batch(Counter(buckets), size, first)
    # The epoch's batches before `first` are formed again and dropped: their number is known, but not which
    # examples they took.
    waiting = _carried_over(buckets, size, seed, epoch)
    while True:
        for example in _shuffled(len(buckets), seed, epoch):
            batch = waiting[buckets[example]]
            batch.append(example)
            if len(batch) < size:
                continue
            waiting[buckets[example]] = []
            if skipped:
                skipped -= 1
            else:
                yield batch
        epoch += 1


def _epoch_of_batch(members: Counter[Hashable], size: int, number: int) -> tuple[int, int]:
    """Return the epoch that completes batch `number`, and how many batches it completes before that."""

    def batches_before(epoch: int) -> int:
        return sum(epoch * count // size for count in members.values())

    # An upper end for the bisection. Each of k buckets loses less than a batch to the floor, so e epochs of M
    # examples complete more than e M / n - k batches: more than `number` if e >= (number + k) n / M.
    enough = (number + len(members) + 1) * size // members.total() + 1
    epoch = bisect_right(range(enough + 1), number, key=batches_before) - 1
    return epoch, number - batches_before(epoch)


def _carried_over(buckets: Sequence[Hashable], size: int, seed: int, epoch: int) -> dict[Hashable, list[int]]:
    """Return each bucket's examples that are in no batch when an epoch begins, in the order of visits."""
    members = Counter(buckets)
    waiting: dict[Hashable, list[int]] = {bucket: [] for bucket in members}
    numbers = {bucket: epoch * count % size for bucket, count in members.items()}
    # The waiting examples are the bucket's latest visits. To go back to them takes one epoch, or a few if a
    # bucket has fewer members than a batch has places.
    epochs_back = max(-(-number // members[bucket]) for bucket, number in numbers.items())
    for past in range(epoch - epochs_back, epoch):
        for example in _shuffled(len(buckets), seed, past):
            waiting[buckets[example]].append(example)
    return {bucket: came[len(came) - numbers[bucket] :] for bucket, came in waiting.items()}


def _shuffled(num_examples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(num_examples, generator=keyed_generator(seed, "order", epoch)).tolist()
    return order
