"""Batch sampler: the examples of each step as a function of the seed and the step's number, without state.

Training resumes at any step by asking for that step: nothing is replayed, and no checkpoint holds an order.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import torch

from sdxl_lora.runtime.rng import keyed_generator


def batch_order(buckets: Sequence[Hashable], size: int, seed: int, first: int = 0) -> Iterator[list[int]]:
    """Yield the indices of each batch's examples, from batch number `first` of an endless sequence on.

    Every epoch visits every example once, in a new random order. Each bucket has a queue, to which its
    examples are added as they are visited; whenever a queue holds `size` of them, they are the next batch.
    Examples still queued at the end of an epoch begin the bucket's first batch in the next epoch. With a
    single bucket, batches are consecutive pieces of the shuffled epochs.

    Starting at a large number takes as long as starting at a small one.

    Args:
        buckets: bucket of each example; a batch is of one bucket.
        size: examples of a batch.
        seed: key of the shuffles.
    """
    epoch, skipped = _epoch_of_batch(Counter(buckets), size, first)
    queues = _queues_at_start(buckets, size, seed, epoch)
    while True:
        for example in _shuffled(len(buckets), seed, epoch):
            batch = queues[buckets[example]]
            batch.append(example)
            if len(batch) < size:
                continue
            queues[buckets[example]] = []
            if skipped:
                skipped -= 1
            else:
                yield batch
        epoch += 1


def _epoch_of_batch(members: Counter[Hashable], size: int, number: int) -> tuple[int, int]:
    """Return the epoch that completes batch `number`, and the number of batches that it completes earlier.

    In e epochs a bucket of c examples is given e * c examples, whatever their order, and so completes
    e * c // size batches. The sum over buckets grows with e, so the epoch is found by bisection.
    """

    def batches_before(epoch: int) -> int:
        return sum(epoch * count // size for count in members.values())

    # Upper end of the search: each // loses less than one batch, so batches_before(e) is more than
    # e * total / size - len(members), which exceeds `number` at this epoch.
    enough = (number + len(members) + 1) * size // members.total() + 1
    epoch = bisect_right(range(enough + 1), number, key=batches_before) - 1
    return epoch, number - batches_before(epoch)


def _queues_at_start(
    buckets: Sequence[Hashable], size: int, seed: int, epoch: int
) -> dict[Hashable, list[int]]:
    """Return each bucket's queue as it is when an epoch begins: examples in no batch yet, oldest first.

    Of the epoch * c examples that a bucket was given, the last (epoch * c) % size are still queued. A queue
    can be longer than the bucket (size > c). Then it holds examples of several epochs, and only these epochs
    are shuffled again.
    """
    members = Counter(buckets)
    lengths = {bucket: epoch * count % size for bucket, count in members.items()}
    epochs_back = max(-(-length // members[bucket]) for bucket, length in lengths.items())  # rounded up
    visited: dict[Hashable, list[int]] = {bucket: [] for bucket in members}
    for past in range(epoch - epochs_back, epoch):
        for example in _shuffled(len(buckets), seed, past):
            visited[buckets[example]].append(example)
    # Not visited[-length:], which for a length of 0 is the whole list.
    return {bucket: examples[len(examples) - lengths[bucket] :] for bucket, examples in visited.items()}


def _shuffled(num_examples: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(num_examples, generator=keyed_generator(seed, "order", epoch)).tolist()
    return order
