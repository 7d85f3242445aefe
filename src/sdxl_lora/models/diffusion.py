"""The mathematics of denoising diffusion on latents. Knows no model.

Symbols as in Ho et al. 2020 (arXiv:2006.11239): x_0 latents, eps noise, x_t noisy latents,
alpha_bar = prod(1 - beta), the share of signal power left at timestep t.
"""

import torch
from torch import Tensor

from sdxl_lora.config import PredictionType


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return noisy latents x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4).

    Args:
        latents: x_0, (B, ...).
        noise: eps, standard normal, shaped as `latents`.
        alpha_bar: at each example's timestep, in [0, 1], (B,).
    """
    alpha_bar = _per_example(alpha_bar, latents)
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def prediction_target(
    latents: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: PredictionType
) -> Tensor:
    """Return the target of the prediction: eps, or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.

    The velocity v is from Salimans & Ho 2022 (arXiv:2202.00512), appendix D. Shapes as in `add_noise`.
    """
    if prediction_type == "epsilon":
        return noise
    alpha_bar = _per_example(alpha_bar, latents)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Return the loss weight of each example under Min-SNR weighting (Hang et al. 2023, arXiv:2303.09556).

    Capping the SNR at `gamma` keeps nearly clean images from dominating the loss. Finite at zero terminal SNR
    (alpha_bar = 0) and for clean latents (alpha_bar = 1), where min(SNR, gamma) / SNR is 0 / 0.

    Args:
        alpha_bar: at each example's timestep, in [0, 1], (B,).
        gamma: the cap, positive; the paper uses 5.

    Returns:
        Weights in [0, 1], (B,).
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)  # min(SNR, gamma) / SNR
    return torch.minimum(snr, torch.full_like(snr, gamma)) / (snr + 1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each example, in fp32, (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, ...), to multiply with `like`, (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))
