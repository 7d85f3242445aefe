import pytest
import torch

from sdxl_lora.runtime.transfers import copy_to_host_async, to_device


def test_tensors_come_back_as_they_were() -> None:
    device = torch.device("cpu")
    sent = [to_device(torch.arange(5), device), to_device(torch.ones(2, 3).half(), device)]
    for tensor, copy in zip(sent, copy_to_host_async(*sent)(), strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.dtype == copy.dtype


@pytest.mark.gpu
def test_what_a_gpu_was_given_later_is_not_waited_for() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    pinned = [torch.arange(2**20).pin_memory() for _ in range(4)]
    del pinned  # kept by PyTorch for the next: making some would wait for all that the GPU does
    sent = to_device(torch.arange(2**20), device)
    wait = copy_to_host_async(sent, sent + 1)
    torch.cuda._sleep(2**31)  # about a second
    at_the_end = torch.cuda.Event()
    at_the_end.record()
    sent.zero_()
    to_device(torch.arange(2**20), device)
    same, larger = wait()
    assert not at_the_end.query()
    assert torch.equal(same, torch.arange(2**20))
    assert torch.equal(larger, same + 1)
