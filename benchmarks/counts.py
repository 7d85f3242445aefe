"""Parameters and floating-point operations of SDXL in its real shapes, counted without a GPU.

`python -m benchmarks.counts` counts them on the meta device, where nothing is computed, and writes
benchmarks/counted.json. That takes a minute, so the report reads the file.
"""

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sdxl_lora.adapters.lora import add_adapters, named_parts
from sdxl_lora.config import load_params
from sdxl_lora.models import architecture

META = torch.device("meta")
TERA = 1e12
TEXT_TOKENS = 77
RANK = 16  # counted with adapters of this rank
COUNTED = Path("benchmarks/counted.json")
RECIPE = Path("recipes/sdxl-naruto-16gb.yaml")


class Counted(BaseModel):
    """Counted figures; `trained` and `frozen` say whether the text encoders have adapters and run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    parameters: dict[str, int]
    """Parameters of each part of SDXL."""
    adapter_parameters: dict[str, int]
    """Parameters of the 16 GB recipe's adapters per unit of rank."""
    forward_tflop: dict[str, float]
    """Work of the forward pass of one example at 1024 px and rank 16, TFLOP."""
    backward_tflop: dict[str, float]
    """Work of its backward pass with a frozen base and without recomputation, TFLOP."""


def main() -> None:
    COUNTED.write_text(count().model_dump_json(indent=2) + "\n", encoding="utf-8")


def load() -> Counted:
    return Counted.model_validate_json(COUNTED.read_text(encoding="utf-8"))


def count() -> Counted:
    """Count everything; takes a minute."""
    modules = {kind: adapted(kind == "trained") for kind in ("trained", "frozen")}
    adapters = {kind: sum(map(num_trained, parts)) // RANK for kind, parts in modules.items()}
    tflop = {kind: tflop_per_example(*parts) for kind, parts in modules.items()}
    return Counted(
        parameters=parameters(),
        adapter_parameters=adapters,
        forward_tflop={kind: forward for kind, (forward, _) in tflop.items()},
        backward_tflop={kind: backward for kind, (_, backward) in tflop.items()},
    )


def parameters() -> dict[str, int]:
    """Count the parameters of each part of SDXL."""
    base = architecture.SDXL_BASE
    parts = {"unet": base.make_unet("fp32", META), "vae": base.make_vae("fp32", META)}
    parts["text_encoder"], parts["text_encoder_2"] = base.make_text_encoders("fp32", META)
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def adapted(text_encoders: bool) -> tuple[nn.Module, ...]:
    """Return the UNet, and the text encoders if asked for, frozen and with the 16 GB recipe's adapters."""
    unet = architecture.SDXL_BASE.make_unet("fp32", META)
    encoders = architecture.SDXL_BASE.make_text_encoders("fp32", META) if text_encoders else None
    modules = (unet, *(encoders or ()))
    config = load_params(RECIPE).lora.model_copy(update={"rank": RANK})
    add_adapters(named_parts(unet, encoders), config, seed=0)
    return modules


def num_trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def tflop_per_example(unet: nn.Module, *encoders: nn.Module) -> tuple[float, float]:
    """Count the forward and backward work of one training example at 1024 px, TFLOP.

    PyTorch counts matrix products, attention and convolutions, a multiply-add as 2. The VAE is not run.
    """
    prompt_embeds = torch.zeros(1, TEXT_TOKENS, 2048, device="meta")
    pooled = torch.zeros(1, 1280, device="meta")
    with FlopCounterMode(display=False) as counter:
        if encoders:
            token_ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long, device="meta")
            first, second = (encoder(token_ids, output_hidden_states=True) for encoder in encoders)
            prompt_embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            pooled = second.text_embeds
        latents = torch.zeros(1, 4, 128, 128, device="meta")
        condition = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6, device="meta")}
        timesteps = torch.zeros(1, dtype=torch.long, device="meta")
        prediction = unet(latents, timesteps, prompt_embeds, added_cond_kwargs=condition).sample
        forward = counter.get_total_flops()
        prediction.mean().backward()
        total = counter.get_total_flops()
    return round(forward / TERA, 4), round((total - forward) / TERA, 4)


if __name__ == "__main__":
    main()
