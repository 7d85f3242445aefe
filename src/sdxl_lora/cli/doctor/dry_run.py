"""The training that a recipe asks for, tried for a step or two on drawn noise: needs no data set.

Everything else is as in the stage: model, adapters, kernels, precision, micro-batches, checkpointing.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora.adapters.lora import adapter_weights, add_adapters, lora_parameters, named_parts, save_lora
from sdxl_lora.adapters.lora_file import WEIGHTS_FILE
from sdxl_lora.config import Params, TrainingConfig
from sdxl_lora.data.encoded_dataset import Batch
from sdxl_lora.memory.training_trace import TrainingSpec
from sdxl_lora.models.tokenizers import load_tokenizers, tokenize
from sdxl_lora.runtime.rng import keyed_generator
from sdxl_lora.training.batches import NoiseDraws, TrainingBatch
from sdxl_lora.training.checkpointer import Checkpointer
from sdxl_lora.training.denoiser import Denoiser, load_denoiser
from sdxl_lora.training.train_step import StepResult
from sdxl_lora.training.trainer import make_train_step, prepare_modules

_START = 1e-2
"""Standard deviation of B at the start. In training it is zero, which keeps every gradient from A."""
_CAPTION = "a picture"
_TOLERATED_OVERFLOWS = 8  # steps in which fp16's loss scale may come down from where it starts


class DryRun:
    """A model with adapters under an engine, as the training loop has them."""

    def __init__(
        self,
        params: Params,
        work: TrainingSpec,
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
        self.attention = prepare_modules(self._denoiser, config, work.latents, checkpointed)
        self._names = _start_adapters(self._denoiser)
        self._engine = make_train_step(self._denoiser, config)
        for module in self._denoiser.modules:
            module.train()
        self._drawn = 0

    def gradients(self) -> dict[str, Tensor]:
        """What a step's micro-batches add up to, by the adapters' names; multiplied by fp16's loss scale."""
        tokens = tokenize(load_tokenizers(self._model), [_CAPTION])
        size = self.config.batch_size // self.config.accumulation
        for _ in range(self.config.accumulation):
            self._engine.accumulate(_noise_examples(self._work, tokens, size, self._drawn))
            self._drawn += 1
        return dict(zip(self._names, self._engine.gradients(), strict=True))

    def step(self) -> StepResult:
        """A step; with fp16, the first one that does not overflow."""
        for _ in range(_TOLERATED_OVERFLOWS):
            self.gradients()
            update = self._engine.update(1.0)
            if torch.tensor([update.loss, update.grad_norm]).isfinite().all():
                break
        return update

    def state(self) -> dict[str, Tensor]:
        """A copy of all that the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self._engine.state_dict().items()}

    def resumes_bit_exactly(self, folder: Path) -> bool:
        """Whether a step from a checkpoint on the disk is, to the bit, the step from where that was saved."""
        checkpoints = Checkpointer(folder, minutes=None)
        checkpoints.save(1, self.state(), {})
        drawn = self._drawn
        self.step()
        expected = self.state()
        checkpoint = checkpoints.newest()
        assert checkpoint is not None, "saved a moment ago"
        self._engine.load_state_dict(checkpoint.tensors)
        self._drawn = drawn
        self.step()
        return _equal(expected, self.state())

    def round_trips(self, folder: Path) -> bool:
        """Writes the adapters and reads them back; whether the file holds them to the bit. Ends the trial."""
        self._engine.finish()
        save_lora(folder, self._denoiser.unet, self._denoiser.text_encoders)
        parts = named_parts(self._denoiser.unet, self._denoiser.text_encoders)
        weights = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in adapter_weights(part, module).items()
        }
        return _equal(weights, load_file(folder / WEIGHTS_FILE))


@torch.no_grad()
def _start_adapters(denoiser: Denoiser) -> list[str]:
    """Draws every B, so that gradients reach every A; the names of all adapters, as the engine has them."""
    names = []
    for part, module in named_parts(denoiser.unet, denoiser.text_encoders).items():
        own = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter in lora_parameters(module):
            name = f"{part}.{own[id(parameter)]}"
            if not parameter.any():
                draws = torch.randn(parameter.shape, generator=keyed_generator("doctor", name))
                parameter.copy_(draws * _START)
            names.append(name)
    return names


def _noise_examples(work: TrainingSpec, token_ids: Tensor, size: int, number: int) -> TrainingBatch:
    """A micro-batch of standard normal latents and embeddings, drawn for `number`.

    Args:
        token_ids: of a caption, (1, 2, 77).
    """
    draws = keyed_generator("doctor", number)
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
    drawn = NoiseDraws(
        latents=latents,
        noise=torch.randn(shape, generator=draws),
        timesteps=torch.randint(1000, (size,), generator=draws),
        caption_mask=torch.ones(size),
    )
    return TrainingBatch(batch, drawn, images=["noise"] * size, dropout_seed=number)


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, and the same bits under each."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name].to(tensor.device)) for name, tensor in first.items()
    )
