"""What a denoiser learns to predict: the noise, the velocity, or the flow from pictures to noise."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_plugins import ConfigError
from lora_plugins.tasks.errors import unknown

AUTO, EPSILON, VELOCITY = "auto", "epsilon", "v_prediction"
PREDICTIONS = (AUTO, EPSILON, VELOCITY)
BETAS = "beta_schedule"
"""What the configuration of a scheduler with a fixed variance schedule has."""


@dataclass(frozen=True)
class Noised:
    """Latents with noise.

    Attributes:
        latents: (N, C, H, W).
        times: (N,), as the denoiser takes them.
        target: (N, C, H, W), what it is to predict.
        weights: (N,), of the squared error of each.
    """

    latents: Tensor
    times: Tensor
    target: Tensor
    weights: Tensor


class Objective(Protocol):
    """Draws times and adds noise."""

    def __call__(self, latents: Tensor, noise: Tensor) -> Noised:
        """Adds noise (N, C, H, W) to latents (N, C, H, W) at random times."""
        ...


@dataclass(frozen=True)
class NoisePrediction:
    """Diffusion with a fixed variance schedule (Ho et al., 2020, arXiv 2006.11239).

    Attributes:
        alphas: (T,), the share of the signal's variance at each time, the cumulative product of the paper's alphas.
        velocity: Whether the velocity is predicted (Salimans and Ho, 2022, arXiv 2202.00512) instead of the noise.
        min_snr_gamma: The largest signal-to-noise ratio that counts, min-SNR weighting (Hang et al., 2023, arXiv
            2303.09556); None for the plain squared error.
    """

    alphas: Tensor
    velocity: bool
    min_snr_gamma: float | None

    def __call__(self, latents: Tensor, noise: Tensor) -> Noised:
        """See `Objective`."""
        times = torch.randint(len(self.alphas), (len(latents),)).to(latents.device)
        share = self.alphas.to(latents)[times].view(-1, 1, 1, 1)
        signal, spread = share.sqrt(), (1 - share).sqrt()
        target = signal * noise - spread * latents if self.velocity else noise
        return Noised(signal * latents + spread * noise, times, target, self.weights(times))

    def weights(self, times: Tensor) -> Tensor:
        """The weights (N,) of errors at some times (N,)."""
        if self.min_snr_gamma is None:
            return torch.ones(times.shape, device=times.device)
        share = self.alphas.to(times.device)[times]
        # The paper weighs errors of the picture by min(ratio, gamma), where ratio = share / (1 - share); those of noise
        # and velocity are ratio and ratio + 1 times as large. A ratio is not formed: that of pure noise is 0.
        limit = self.min_snr_gamma * (1 - share)
        return torch.minimum(share, limit) if self.velocity else (limit / share).clamp(max=1)


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow, with times from a logit-normal distribution (Esser et al., 2024, arXiv 2403.03206, section 3.1).

    Attributes:
        times: The number of times that the denoiser counts.
        shift: How much times are shifted towards noise: as the scheduler does when it samples, or 1, which is not at
            all, where that depends on the size of the picture (Flux). diffusers' training scripts do the same.
    """

    times: int
    shift: float

    def __call__(self, latents: Tensor, noise: Tensor) -> Noised:
        """See `Objective`."""
        drawn = torch.sigmoid(torch.randn(len(latents))).to(latents)
        share = self.shift * drawn / (1 + (self.shift - 1) * drawn)
        spread = share.view(-1, 1, 1, 1)
        return Noised(
            (1 - spread) * latents + spread * noise, share * self.times, noise - latents, torch.ones_like(share)
        )


def objective_of(scheduler: Any, prediction: str, min_snr_gamma: float | None) -> Objective:
    """The objective that goes with a scheduler of diffusers.

    `prediction` is `auto` for what the scheduler says, or `epsilon` or `v_prediction` where it is wrong.

    Raises:
        ConfigError: For an unknown word, or one that does not go with the scheduler.
    """
    config, class_name = scheduler.config, type(scheduler).__name__
    if prediction not in PREDICTIONS:
        raise unknown("prediction", prediction, PREDICTIONS)
    if min_snr_gamma is not None and not min_snr_gamma > 0:
        raise ConfigError(f"min_snr_gamma is {min_snr_gamma}; it is above 0, usually 5.")
    flow = "FlowMatch" in class_name or config.get("prediction_type") == "flow_prediction"
    if flow and (prediction != AUTO or min_snr_gamma is not None):
        raise ConfigError(
            f"The pipeline has a {class_name}: flow matching has no min_snr_gamma and no other prediction. Leave "
            "both out."
        )
    if flow:
        return FlowMatching(int(config["num_train_timesteps"]), _shift(config))
    if BETAS not in config:
        raise ConfigError(
            f"The pipeline has a {class_name}, whose noise follows no schedule of betas: models of this kind (EDM and "
            "its like) are trained with another loss, which is not served."
        )
    said = predicted_by(scheduler, prediction)
    if said not in (EPSILON, VELOCITY):
        raise ConfigError(
            f"The scheduler predicts {said!r}, which is not served. {unknown('prediction', said, PREDICTIONS)}"
        )
    return NoisePrediction(_alphas(config), said == VELOCITY, min_snr_gamma)


def predicted_by(scheduler: Any, prediction: str) -> str:
    """What a denoiser predicts, by the scheduler of its pipeline where `prediction` is `auto`."""
    return str(scheduler.config.get("prediction_type", EPSILON)) if prediction == AUTO else prediction


def take_prediction(pipe: Any, prediction: str) -> None:
    """Lets a pipeline sample what its denoiser was trained to predict, where its scheduler says something else."""
    if prediction in (EPSILON, VELOCITY) and prediction != predicted_by(pipe.scheduler, AUTO):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction)


def _shift(config: Mapping[str, Any]) -> float:
    if config.get("use_dynamic_shifting"):
        return 1.0
    return float(config.get("flow_shift") or config.get("shift") or 1.0)  # solvers for several kinds have the former


def _alphas(config: Mapping[str, Any]) -> Tensor:
    schedulers: Any = import_module("diffusers")  # whose schedulers have no types
    alphas: Tensor = schedulers.DDPMScheduler.from_config(dict(config)).alphas_cumprod
    return alphas


def with_offset(noise: Tensor, offset: float) -> Tensor:
    """Noise (N, C, H, W) with an offset for each channel, which lets pictures become lighter or darker as a whole.

    Offset noise (Guttenberg, 2023, crosslabs.org/blog/diffusion-with-offset-noise).
    """
    if not offset:
        return noise
    return noise + offset * torch.randn(*noise.shape[:2], 1, 1).to(noise)
