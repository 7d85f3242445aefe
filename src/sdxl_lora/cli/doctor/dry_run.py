"""A dry run of a recipe's training: a step or two on random noise, without a data set.

Everything else is as in the stage: model, adapters, kernels, precision, micro-batches, checkpointing.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from sdxl_lora.adapters.lora import adapter_weights, add_adapters, lora_parameters, save_lora
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
"""Standard deviation of B's initial values. Training starts with B = 0, where the gradient of A is zero."""
_CAPTION = "a picture"
_TOLERATED_OVERFLOWS = 8  # steps in which the loss scale of fp16 may fall from its initial value


class DryRun:
    """A model with adapters and its train step, as the training loop has them."""

    def __init__(
        self,
        params: Params,
        spec: TrainingSpec,
        config: TrainingConfig,
        checkpointed: Collection[str],
        device: torch.device,
    ) -> None:
        """Load the base model and add adapters.

        Args:
            config: the section `training`, without `auto`.
            checkpointed: names of the units with activation checkpointing.
        """
        self.config = config
        self._spec, self._model = spec, params.model
        self._denoiser = load_denoiser(params.model, config.precision, device, config.quantization)
        add_adapters(self._denoiser.parts, params.lora, params.seed)
        self.attention = prepare_modules(self._denoiser, config, spec.latents, checkpointed)
        self._names = _randomize_adapters(self._denoiser)
        self._train_step = make_train_step(self._denoiser, config)
        for module in self._denoiser.modules:
            module.train()
        self._num_micro_batches = 0

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of a step by the adapters' names, multiplied by the loss scale of fp16."""
        tokens = tokenize(load_tokenizers(self._model), [_CAPTION])
        size = self.config.batch_size // self.config.accumulation
        for _ in range(self.config.accumulation):
            self._train_step.accumulate(_noise_batch(self._spec, tokens, size, self._num_micro_batches))
            self._num_micro_batches += 1
        return dict(zip(self._names, self._train_step.gradients(), strict=True))

    def step(self) -> StepResult:
        """Take a training step; with fp16, repeat it until it does not overflow."""
        for _ in range(_TOLERATED_OVERFLOWS):
            self.gradients()
            result = self._train_step.update(1.0)
            if torch.tensor([result.loss, result.grad_norm]).isfinite().all():
                break
        return result

    def state(self) -> dict[str, Tensor]:
        """Return a copy of all tensors that the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self._train_step.state_dict().items()}

    def resumes_bit_exactly(self, folder: Path) -> bool:
        """Return whether a step from a checkpoint gives the same bits as the step without resuming."""
        checkpoints = Checkpointer(folder, minutes=None)
        checkpoints.save(1, self.state(), {})
        num_micro_batches = self._num_micro_batches
        self.step()
        expected = self.state()
        checkpoint = checkpoints.newest()
        assert checkpoint is not None, "saved a moment ago"
        self._train_step.load_state_dict(checkpoint.tensors)
        self._num_micro_batches = num_micro_batches  # the key of the noise: the same batches again
        self.step()
        return _equal(expected, self.state())

    def round_trips(self, folder: Path) -> bool:
        """Save the adapters and return whether the file holds the same bits. Ends the dry run."""
        self._train_step.finish()
        save_lora(folder, self._denoiser.parts)
        parts = self._denoiser.parts
        weights = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in adapter_weights(part, module).items()
        }
        return _equal(weights, load_file(folder / WEIGHTS_FILE))


@torch.no_grad()
def _randomize_adapters(denoiser: Denoiser) -> list[str]:
    """Fill every B with random values, so that gradients reach every A; return the names of all adapters.

    The order is that of `lora_parameters`, by which the train step returns gradients.
    """
    names = []
    for part, module in denoiser.parts.items():
        name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter in lora_parameters(module):
            name = f"{part}.{name_of[id(parameter)]}"
            if not parameter.any():
                draws = torch.randn(parameter.shape, generator=keyed_generator("doctor", name))
                parameter.copy_(draws * _START)
            names.append(name)
    return names


def _noise_batch(spec: TrainingSpec, token_ids: Tensor, size: int, number: int) -> TrainingBatch:
    """Return a micro-batch of standard normal latents and embeddings, a function of `number`.

    Args:
        token_ids: tokens of one caption, (1, 2, 77).
    """
    draws = keyed_generator("doctor", number)
    shape, (width, pooled_width) = (size, *spec.latents[1:]), spec.shapes.embedding_widths
    frozen = not spec.trains_text_encoders
    side = spec.latents[-1] * spec.shapes.pixels_per_latent
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
    """Return whether both have the same names and equal tensors."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name].to(tensor.device)) for name, tensor in first.items()
    )
