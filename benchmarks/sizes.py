"""Sizes calculated from counted parameters: adapters, files, optimizer states, full fine-tuning.

Full fine-tuning was not run. Only the parts in memory while training count: UNet and text encoders, not the
VAE.
"""

from benchmarks.counts import RANK, Counted
from benchmarks.results import GIB
from benchmarks.tables import NONE
from sdxl_lora.reporting.markdown import table

MOMENTS = 8
MOMENTS_8_BIT = 2 * (1 + 4 / 256)  # one byte each, and an fp32 scale per block of 256
FROZEN = 2  # fp16
ADAPTER = 2 + 4 + 4 + MOMENTS_8_BIT  # fp16 weight, fp32 master and gradient, 8-bit moments
TRAINED = {
    "weights and gradients in fp32, AdamW": 4 + 4 + MOMENTS,
    "weights and gradients in fp32, 8-bit AdamW": 4 + 4 + MOMENTS_8_BIT,
    "all in 16 bits, 8-bit AdamW": 2 + 2 + MOMENTS_8_BIT,
}
"""Bytes per trained parameter with its gradient and moments, for three kinds of full fine-tuning."""
FULL = """\
## LoRA and full fine-tuning: calculated memory

Calculated, not measured, for a trained UNet and text encoders frozen in fp16. *States* are weights,
gradients and moments. *Peak* adds the rest of the measured peak of training with adapters, mainly
activations, which full fine-tuning needs as well. Common claim: full fine-tuning takes 25 GB or more, LoRA
50-60 % less.

"""


def base_parameters(counted: Counted) -> int:
    """Return the number of parameters of UNet and text encoders."""
    return sum(counted.parameters.values()) - counted.parameters["vae"]


def adapter_claims(counted: Counted) -> list[tuple[str, ...]]:
    """Return the rows about sizes: technique, claim, measured on, memory, time, true."""
    each = counted.adapter_parameters["trained"]
    adapters = RANK * each
    share = adapters / base_parameters(counted)
    trainable = f"{adapters / 1e6:.1f} M, {share:.2%} of UNet and text encoders"
    ranks = f"number: at ranks {10e6 / each:.0f} to {50e6 / each:.0f}; share: no"
    files = f"{adapters * 2 / 1e6:.0f} MB in 16 bits, {adapters * 4 / 1e6:.0f} MB in fp32"
    holds = f"up to rank {100e6 / 2 / each:.0f} in 16 bits, {100e6 / 4 / each:.0f} in fp32"
    states = f"{adapters * MOMENTS / GIB:.2f} -> {adapters * MOMENTS_8_BIT / GIB:.2f} GiB"
    on = f"rank {RANK}, counted"
    return [
        ("LoRA: trainable parameters", "10-50 M, 4-5 % of the model", on, trainable, NONE, ranks),
        ("LoRA: file size", "10-100 MB", on, files, NONE, holds),
        ("8-bit Adam: states only", "a quarter", on, states, NONE, "yes"),
    ]


def full_fine_tuning(counted: Counted, lora_peak_gib: float | None) -> str:
    """Return the section on full fine-tuning.

    Args:
        lora_peak_gib: measured peak of training with adapters on all parts, GiB; None if not measured.
    """
    unet, base = counted.parameters["unet"], base_parameters(counted)
    lora = FROZEN * base + ADAPTER * RANK * counted.adapter_parameters["trained"]
    rest = None if lora_peak_gib is None else lora_peak_gib - lora / GIB
    kinds = {f"full, {kind}": each * unet + FROZEN * (base - unet) for kind, each in TRAINED.items()}
    rows = []
    for kind, states in {f"LoRA, rank {RANK}, fp16, 8-bit AdamW": lora, **kinds}.items():
        peak = "not measured yet" if rest is None else f"{states / GIB + rest:.1f}"
        saved = 1 - (lora / states if rest is None else (lora + rest * GIB) / (states + rest * GIB))
        rows.append((kind, f"{states / GIB:.1f}", peak, NONE if kind not in kinds else f"{saved:.0%}"))
    compared = "states" if rest is None else "peak"
    return FULL + table(["", "states, GiB", "peak, GiB", f"LoRA's {compared} smaller by"], rows) + "\n"
