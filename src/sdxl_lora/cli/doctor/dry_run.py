"""The training that a recipe asks for, tried for a step or two on drawn noise: needs no data set.

Everything else is as in the stage: model, adapters, kernels, precision, micro-batches, checkpointing.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora.adapters.lora import (
    WEIGHTS,
    adapter_weights,
    add_adapters,
    lora_parameters,
    named_parts,
    save_lora,
)
from sdxl_lora.config import Params, TrainingConfig
from sdxl_lora.data.encoded_dataset import Batch
from sdxl_lora.memory.training_forecast import Workload
from sdxl_lora.models.tokenizers import load_tokenizers, tokenize
from sdxl_lora.runtime.rng import generator
from sdxl_lora.training.batches import Draws, Examples
from sdxl_lora.training.checkpointer import Checkpoints
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.train_step import Update
from sdxl_lora.training.trainer import make_engine, prepare

START = 1e-2
"""Standard deviation of B at the start. In training it is zero, which keeps every gradient from A."""
CAPTION = "a picture"
TOLERATED_OVERFLOWS = 8  # steps in which fp16's loss scale may come down from where it starts


class Trial:
    """A model with adapters under an engine, as the training loop has them."""

    def __init__(
        self,
        params: Params,
        work: Workload,
        config: TrainingConfig,
        checkpointed: Collection[str],
        device: torch.device,
    ) -> None:
        """Loads the base model.

        Args:
            config: of the training, without `auto`.
            checkpointed: names of the units that compute their activations twice.
        """
        self.config = config
        self._work, self._model = work, params.model
        self._denoiser = load_denoiser(params.model, config.precision, device, config.quantization)
        add_adapters(self._denoiser.unet, self._denoiser.text_encoders, params.lora, params.seed)
        self.attention = prepare(self._denoiser, config, work.latents, checkpointed)
        self._names = start_adapters(self._denoiser)
        self._engine = make_engine(self._denoiser, config)
        for module in self._denoiser.modules:
            module.train()
        self._drawn = 0

    def gradients(self) -> dict[str, Tensor]:
        """What a step's micro-batches add up to, by the adapters' names; multiplied by fp16's loss scale."""
        tokens = tokenize(load_tokenizers(self._model), [CAPTION])
        size = self.config.batch_size // self.config.accumulation
        for _ in range(self.config.accumulation):
            self._engine.accumulate(noise_examples(self._work, tokens, size, self._drawn))
            self._drawn += 1
        return dict(zip(self._names, self._engine.gradients(), strict=True))

    def step(self) -> Update:
        """A step; with fp16, the first one that does not overflow."""
        for _ in range(TOLERATED_OVERFLOWS):
            self.gradients()
            update = self._engine.update(1.0)
            if torch.tensor([update.loss, update.grad_norm]).isfinite().all():
                break
        return update

    def state(self) -> dict[str, Tensor]:
        """A copy of all that the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self._engine.state_dict().items()}

    def resumed(self, folder: Path) -> bool:
        """Whether a step from a checkpoint on the disk is, to the bit, the step from where that was saved."""
        checkpoints = Checkpoints(folder, minutes=None)
        checkpoints.save(1, self.state(), {})
        drawn = self._drawn
        self.step()
        expected = self.state()
        checkpoint = checkpoints.newest()
        assert checkpoint is not None, "saved a moment ago"
        self._engine.load_state_dict(checkpoint.tensors)
        self._drawn = drawn
        self.step()
        return equal(expected, self.state())

    def saved(self, folder: Path) -> bool:
        """Writes the adapters and reads them back; whether the file holds them to the bit. Ends the trial."""
        self._engine.finish()
        save_lora(folder, self._denoiser.unet, self._denoiser.text_encoders)
        parts = named_parts(self._denoiser.unet, self._denoiser.text_encoders)
        weights = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in adapter_weights(part, module).items()
        }
        return equal(weights, load_file(folder / WEIGHTS))


@torch.no_grad()
def start_adapters(denoiser: Denoiser) -> list[str]:
    """Draws every B, so that gradients reach every A; the names of all adapters, as the engine has them."""
    names = []
    for part, module in named_parts(denoiser.unet, denoiser.text_encoders).items():
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter in lora_parameters(module):
            name = f"{part}.{own[id(parameter)]}"
            if not parameter.any():
                draws = torch.randn(parameter.shape, generator=generator("doctor", name))
                parameter.copy_(draws * START)
            names.append(name)
    return names


def noise_examples(work: Workload, token_ids: Tensor, size: int, number: int) -> Examples:
    """A micro-batch of standard normal latents and embeddings, drawn for `number`.

    Args:
        token_ids: of a caption, (1, 2, 77).
    """
    draws = generator("doctor", number)
    shape, (width, pooled_width) = (size, *work.latents[1:]), work.shapes.embedding_widths
    frozen = not work.trains_text_encoders
    side = work.latents[-1] * work.shapes.pixels_per_latent
    latents = torch.randn(shape, generator=draws)
    batch = Batch(
        latents_mean=latents,
        latents_std=torch.zeros(shape),
        token_ids=token_ids.repeat(size, 1, 1),
        time_ids=torch.tensor([[side, side, 0, 0, side, side]] * size, dtype=torch.int32),
        prompt_embeds=torch.randn(size, 77, width, generator=draws) if frozen else None,
        pooled_prompt_embeds=torch.randn(size, pooled_width, generator=draws) if frozen else None,
    )
    drawn = Draws(
        latents=latents,
        noise=torch.randn(shape, generator=draws),
        timesteps=torch.randint(1000, (size,), generator=draws),
        captioned=torch.ones(size),
    )
    return Examples(batch, drawn, images=["noise"] * size, dropout_seed=number)


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, and the same bits under each."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name].to(tensor.device)) for name, tensor in first.items()
    )
