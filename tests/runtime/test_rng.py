import torch

from sdxl_lora.runtime.rng import keyed_generator


def test_same_key_same_draws() -> None:
    first = torch.randn(8, generator=keyed_generator(0, "noise", 3))
    assert torch.equal(first, torch.randn(8, generator=keyed_generator(0, "noise", 3)))


def test_every_part_of_the_key_counts() -> None:
    keys: list[tuple[str | int, ...]] = [
        (0, "noise", 3),
        (1, "noise", 3),
        (0, "order", 3),
        (0, "noise", 4),
        (0, "noise"),
        ("0", "noise", 3),
    ]
    draws = {tuple(torch.randn(4, generator=keyed_generator(*key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    torch.randn(100, generator=keyed_generator(0, "noise"))
    assert torch.equal(torch.randn(3), expected)
