"""Traces against memory counted by hand, and of tensors without data against those of real ones."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sdxl_lora.memory.trace import (
    Allocate,
    EnterBackward,
    EnterUnit,
    Event,
    Free,
    LeaveUnit,
    MemoryTrace,
    NeedWorkspace,
)
from tests.support.traced import allocated_sizes, peak

CPU, META = torch.device("cpu"), torch.device("meta")
BATCH, WIDTH, UNITS = 64, 16, 4
ACTIVATION = BATCH * WIDTH * 4  # bytes of one layer's output
WEIGHT = WIDTH * WIDTH * 4
SCALARS = 2 * 4  # the loss and its gradient


def unit() -> nn.Module:
    """Two layers; the backward pass needs the input and both ReLUs' outputs."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()]
    return nn.Sequential(*layers)


def train(device: torch.device, checkpointed: bool) -> list[Event]:
    """Compute gradients of a tower of units and return the events."""
    with device:
        units = [unit() for _ in range(UNITS)]
        inputs = torch.ones(BATCH, WIDTH)
    weights = [weight for module in units for weight in module.parameters()]
    trace = MemoryTrace(device)
    with trace:
        trace.hold([inputs, *weights])
        gradients = torch.autograd.grad(loss_of(units, inputs, checkpointed), weights)
    assert len(gradients) == 2 * UNITS
    return trace.events


def loss_of(units: list[nn.Module], inputs: Tensor, checkpointed: bool) -> Tensor:
    for module in units:
        inputs = checkpoint(module, inputs, use_reentrant=False) if checkpointed else module(inputs)
    return inputs.sum()


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_peak_without_checkpointing_is_that_counted_by_hand(device: torch.device) -> None:
    """Weights, input, each layer's output, then the gradients of the last layer's input, output and weight.

    By then the last output itself is free: only its ReLU needed it.
    """
    held = (2 * UNITS * WEIGHT) + ACTIVATION
    outputs = (2 * UNITS - 1) * ACTIVATION
    assert peak(train(device, checkpointed=False)) == held + outputs + 2 * ACTIVATION + WEIGHT + SCALARS


@pytest.mark.parametrize("device", [CPU, META], ids=str)
def test_peak_with_checkpointing_is_that_counted_by_hand(device: torch.device) -> None:
    """The peak is where the last unit but one is recomputed, with the gradients of the last one's weights.

    Alive are weights, input and the inputs of the units so far; the gradient of the unit's output; its first
    ReLU's output, its second layer's, and that one's ReLU.
    """
    held = (2 * UNITS * WEIGHT) + ACTIVATION
    unit_inputs = (UNITS - 2) * ACTIVATION
    recomputed = 3 * ACTIVATION
    gradients = ACTIVATION + 2 * WEIGHT
    assert peak(train(device, checkpointed=True)) == held + unit_inputs + recomputed + gradients + SCALARS


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tensors_without_data_do_what_real_ones_do(checkpointed: bool) -> None:
    assert train(META, checkpointed) == train(CPU, checkpointed)


def test_all_that_was_allocated_is_freed() -> None:
    events = train(META, checkpointed=True)
    allocated = {event.key for event in events if isinstance(event, Allocate)}
    freed = [event.key for event in events if isinstance(event, Free)]
    assert len(freed) == len(set(freed))
    assert set(freed) <= allocated


def test_views_and_changes_in_place_take_no_memory() -> None:
    tensor = torch.empty(8, 8, device=META)
    with (trace := MemoryTrace(META)):
        tensor.t()[3:].add_(1)
    assert trace.events == []


def test_what_leaves_the_device_is_not_counted() -> None:
    with (trace := MemoryTrace(META)):
        tensor = torch.empty(8, dtype=torch.float16, device=META)
        copy = tensor.to("cpu", torch.float32)
    assert copy.shape == (8,)
    assert copy.dtype == torch.float32
    assert allocated_sizes(trace.events) == [16]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_square_matrix(masked: bool) -> None:
    query = torch.empty(2, 4, 1024, 64, device=META, requires_grad=True)
    mask = torch.empty(1, 1, 1024, 1024, device=META) if masked else None
    with (trace := MemoryTrace(META)):
        scaled_dot_product_attention(query, query, query, mask).sum().backward()
    assert peak(trace.events) < 8 * query.nbytes
    assert peak(trace.events) < 2 * 4 * 1024 * 1024 * 4


@pytest.mark.parametrize("formats", ["images", "weights", "neither"])
def test_convolution_keeps_channels_last(formats: str) -> None:
    """Otherwise later copies would be counted that no GPU makes."""
    images, weights = torch.empty(2, 8, 4, 4, device=META), torch.empty(8, 8, 3, 3, device=META)
    if formats == "images":
        images = images.to(memory_format=torch.channels_last)
    if formats == "weights":
        weights = weights.to(memory_format=torch.channels_last)
    with (trace := MemoryTrace(META)):
        result = torch.nn.functional.conv2d(images, weights, padding=1)
    assert result.is_contiguous(memory_format=torch.channels_last) == (formats != "neither")
    assert trace.events == [Allocate(0, result.nbytes)]


@pytest.mark.parametrize(("trains", "bytes_a_score"), [(False, 4 + 4 + 1), (True, 4 + 4 + 4 + 4)])
def test_plain_attention_takes_what_cuda_does(trains: bool, bytes_a_score: int) -> None:
    """Forward, scores, probabilities, and a byte for what is masked; backward, four matrices in fp32.

    These are the probabilities, their gradient, the product of the two and the gradient of the scores.
    """
    query = torch.empty(2, 4, 4096, 1, dtype=torch.float16, device=META, requires_grad=trains)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), (trace := MemoryTrace(META)):
        output = scaled_dot_product_attention(query, query, query)
        if trains:
            output.sum().backward()
    assert peak(trace.events) == pytest.approx(bytes_a_score * 2 * 4 * 4096 * 4096, rel=0.01)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_first_product_of_each_thread_needs_a_workspace(checkpointed: bool) -> None:
    with META:
        units = [unit(), unit()]
        inputs = torch.ones(BATCH, WIDTH)
    trace = MemoryTrace(META)
    for _ in range(2):
        start = len(trace.events)
        with trace, trace.watching(units):
            loss_of(units, inputs, checkpointed).backward()
        passed = [e for e in trace.events[start:] if isinstance(e, NeedWorkspace | EnterBackward)]
        assert passed == [NeedWorkspace(0), EnterBackward(1), NeedWorkspace(1), EnterBackward(0)]


def trace_of_two_units() -> MemoryTrace:
    """Forward and backward through them, watched."""
    with META:
        units = [unit(), unit()]
        inputs = torch.ones(BATCH, WIDTH)
    trace = MemoryTrace(META)
    with trace, trace.watching(units):
        loss_of(units, inputs, checkpointed=False).backward()
    return trace


def test_arithmetic_of_units_is_counted() -> None:
    trace = trace_of_two_units()
    product = 2 * BATCH * WIDTH * WIDTH
    assert trace.flops == [2 * product, 2 * product]
    assert (
        trace.total_flops == 4 * product + 4 * product + 3 * product
    )  # forward, weights, inputs but the first


def test_boundaries_of_units_are_marked() -> None:
    trace = trace_of_two_units()
    marks = [event for event in trace.events if isinstance(event, EnterUnit | LeaveUnit | EnterBackward)]
    forward = [EnterUnit(0), LeaveUnit(0), EnterUnit(1), LeaveUnit(1)]
    assert marks == [*forward, EnterBackward(1), EnterBackward(0)]


def test_watching_ends_with_its_block() -> None:
    with META:
        module, inputs = unit(), torch.ones(BATCH, WIDTH)
    trace = MemoryTrace(META)
    with trace:
        with trace.watching([module]):
            module(inputs)
        marks = len(trace.events)
        module(inputs)
    assert not [event for event in trace.events[marks:] if isinstance(event, EnterUnit | LeaveUnit)]
