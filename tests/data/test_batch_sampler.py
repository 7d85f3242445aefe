from collections import Counter
from collections.abc import Sequence
from itertools import islice

import torch
from hypothesis import given
from hypothesis import strategies as st

from sdxl_lora.data.batch_sampler import batch_order
from sdxl_lora.runtime.rng import keyed_generator

BUCKETS = st.lists(st.integers(0, 4), min_size=1, max_size=40)
SIZES = st.integers(1, 9)


def take(buckets: Sequence[int], size: int, count: int, first: int = 0) -> list[list[int]]:
    return list(islice(batch_order(buckets, size, 7, first), count))


@given(BUCKETS, SIZES)
def test_every_batch_is_full_and_of_one_bucket(buckets: list[int], size: int) -> None:
    for batch in take(buckets, size, 30):
        assert len(batch) == size
        assert len({buckets[index] for index in batch}) == 1


@given(BUCKETS, SIZES, st.integers(1, 5))
def test_epochs_visit_every_example_once_bucket_by_bucket(buckets: list[int], size: int, epochs: int) -> None:
    """What a bucket has shown, one batch after the other, are its whole epochs, and they come in step.

    So of examples, whatever their buckets, none has been shown more than once more than another, but for the
    fewer than `size` that wait in each bucket for a batch.
    """
    members = Counter(buckets)
    total = sum(epochs * count // size for count in members.values())
    shown = [index for batch in take(buckets, size, total) for index in batch]
    for bucket, count in members.items():
        own = [index for index in shown if buckets[index] == bucket]
        assert len(own) == epochs * count - epochs * count % size
        for start in range(0, len(own), count):
            epoch = own[start : start + count]
            assert len(set(epoch)) == len(epoch)


@given(BUCKETS, SIZES, st.integers(0, 60))
def test_any_batch_can_be_the_first(buckets: list[int], size: int, first: int) -> None:
    assert take(buckets, size, 8, first) == take(buckets, size, first + 8)[first:]


def test_start_takes_no_longer_the_later_it_is() -> None:
    """One bucket of a single image has been waiting for as many epochs as a batch has examples."""
    buckets = [0] * 500 + [1] * 20 + [2]
    first = 10**15
    (batch, following) = take(buckets, 8, 2, first)
    assert following == take(buckets, 8, 1, first + 1)[0]
    assert len(batch) == 8


@given(st.integers(1, 20), SIZES, st.integers(0, 30))
def test_single_bucket_cuts_shuffled_epochs_into_pieces(count: int, size: int, first: int) -> None:
    """To the bit what training without buckets has always done."""
    epochs = range((first + 2) * size // count + 1)
    whole = torch.cat(
        [torch.randperm(count, generator=keyed_generator(7, "order", epoch)) for epoch in epochs]
    )
    expected = whole[first * size : (first + 2) * size].view(2, size).tolist()
    assert take([0] * count, size, 2, first) == expected


@given(BUCKETS, SIZES)
def test_buckets_get_their_share_of_every_epoch(buckets: list[int], size: int) -> None:
    """A bucket's batches are spread over the epoch by chance and not one after the other."""
    members, epochs = Counter(buckets), 4
    for epoch in range(1, epochs + 1):
        total = sum(epoch * count // size for count in members.values())
        seen = Counter(buckets[batch[0]] for batch in take(buckets, size, total))
        assert all(seen[bucket] == epoch * count // size for bucket, count in members.items())


def test_order_is_another_with_another_seed() -> None:
    buckets = [0, 1] * 10
    assert next(batch_order(buckets, 4, seed=0)) != next(batch_order(buckets, 4, seed=1))
