import pytest
import torch

from sdxl_lora.runtime.device import (
    DEVICE_VARIABLE,
    acquire_device,
    choose_device,
    one_cpu_thread,
    peak_memory_gib,
)
from sdxl_lora.storage.atomic_io import GIB


def test_environment_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "meta")
    assert choose_device() == torch.device("meta")


def test_memory_budget_without_a_gpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    with (
        pytest.raises(ValueError, match=r"training.vram_gib is 14.5: .* CUDA GPU .* `make recipe NAME=demo`"),
        acquire_device(14.5),
    ):
        pass


def test_cpu_does_where_no_budget_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    with acquire_device(None) as device:
        assert device == torch.device("cpu")


def test_peak_memory_of_a_cpu_process_is_what_it_held() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    ballast = torch.ones(int((before + 0.25) * GIB / 4))
    assert peak_memory_gib(torch.device("cpu")) > before + 0.2
    del ballast


def test_one_cpu_thread_where_models_are_on_a_gpu_and_as_many_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_cpu_thread(torch.device("cpu")):
            assert torch.get_num_threads() == 3
        with one_cpu_thread(torch.device("cuda", 0)):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_memory_budget_is_enforced() -> None:
    with acquire_device(1.0) as device, pytest.raises(torch.OutOfMemoryError):
        torch.empty(int(1.1 * GIB), dtype=torch.uint8, device=device)


@pytest.mark.gpu
def test_budget_above_the_card_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lower training\.vram_gib"), acquire_device(1e6):
        pass
