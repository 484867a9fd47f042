"""The task of text-to-image diffusion."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_plugins import ConfigError, LoraModel
from lora_plugins.adapter import model_state
from lora_plugins.errors import listing
from lora_plugins.field_checks import (
    Check,
    check_factor,
    check_fields,
    check_flag,
    check_name,
    check_names,
    choice_of,
    number_from,
    optional,
)
from lora_plugins.integrations.diffusers import default_targets, family_of, in_eval_mode, load_pipeline, parts_of
from lora_plugins.integrations.lightning.callback import lora_callbacks
from lora_plugins.tasks.diffusion.conditioning import CONDITIONING, Condition
from lora_plugins.tasks.diffusion.memory import Memory, Tensors
from lora_plugins.tasks.diffusion.objectives import AUTO, Objective, objective_of, take_prediction, with_offset
from lora_plugins.tasks.diffusion.packaged import pipeline_source
from lora_plugins.tasks.diffusion.pictures_module import PictureBatch, PicturesDataModule
from lora_plugins.tasks.training import BaseTask, OptimizerCallable, SchedulerCallable
from lora_plugins.utils import ending

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LR, WEIGHT_DECAY = 1e-4, 0.01
"""Of the default optimizer, AdamW."""

_CHECKS: Mapping[str, Check] = {
    "model": check_name,
    "layers": check_names,
    "train_text_encoder": check_flag,
    "min_snr_gamma": optional(check_factor),
    "offset_noise": number_from(0),
    "prior_weight": number_from(0),
    "cache": check_flag,
    "gradient_checkpointing": check_flag,
    "dtype": choice_of(*DTYPES),
    "revision": optional(check_name),
}
"""What the arguments can be, by name; the others are checked by whoever takes them."""


class TextToImageTask(BaseTask):
    """Fine-tunes a text-to-image pipeline of diffusers, by itself or with a `LoraCallback(target="parts")`.

    Args:
        model: A folder that `save_pretrained` of a pipeline wrote, a name on the Hugging Face Hub, or
            `package:digits_diffusion`, which is shipped.
        layers: Kinds of layers of the denoiser that are adapted if a `LoraConfig` names no `target_modules`: some of
            `attention`, `feed_forward` and `convolutions`.
        train_text_encoder: Whether text encoders are trained too; their attention projections are adapted then.
        prediction: What the denoiser predicts: `auto` for what the scheduler says, or `epsilon` or `v_prediction`.
        min_snr_gamma: The largest signal-to-noise ratio that counts in the loss, such as 5; none by default.
        offset_noise: The strength of noise that is the same in all pixels of a channel, such as 0.1.
        prior_weight: The weight of the loss on pictures of the class.
        cache: Whether latents of pictures, and prompts that a frozen text encoder reads, are computed once and kept.
        gradient_checkpointing: Whether activations are computed again in the backward, for less memory.
        optimizer: Makes the optimizer; see `VisionTask`.
        lr: Learning rate of the default optimizer.
        weight_decay: Weight decay of the default optimizer.
        lr_scheduler: Makes a scheduler of the optimizer and the number of its steps; see `VisionTask`.
        ema: Decay of an exponential moving average of the trained parameters, such as 0.99; 0 for none.
        dtype: Type of the weights of the pipeline: `float32`, `bfloat16` or `float16`.
        revision: The branch, tag or commit of a name on the Hub.

    Attributes:
        pipe: The pipeline, with the parts that are trained.
        parts: The denoiser and the text encoders, by their names in the pipeline.
        family: The family of the pipeline.
        lora_targets: The layers to adapt if a `LoraConfig` names no `target_modules`.

    Raises:
        ConfigError: If there is no such pipeline, it is of a kind that is not served, or arguments do not go together.
    """

    def __init__(
        self,
        model: str,
        *,
        layers: Sequence[str] = ("attention",),
        train_text_encoder: bool = False,
        prediction: str = AUTO,
        min_snr_gamma: float | None = None,
        offset_noise: float = 0.0,
        prior_weight: float = 1.0,
        cache: bool = True,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr: float = LR,
        weight_decay: float = WEIGHT_DECAY,
        lr_scheduler: SchedulerCallable | None = None,
        ema: float = 0.0,
        dtype: str = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        given = {
            "model": model,
            "layers": layers,
            "train_text_encoder": train_text_encoder,
            "prediction": prediction,
            "min_snr_gamma": min_snr_gamma,
            "offset_noise": offset_noise,
            "prior_weight": prior_weight,
            "cache": cache,
            "gradient_checkpointing": gradient_checkpointing,
            "lr": lr,
            "weight_decay": weight_decay,
            "ema": ema,
            "dtype": dtype,
            "revision": revision,
        }
        check_fields(given, _CHECKS)
        self._set_optimization(optimizer, lr, weight_decay, lr_scheduler, ema, default=(LR, WEIGHT_DECAY))
        self.save_hyperparameters({**given, "layers": list(layers)})
        self.model, self.train_text_encoder = model, train_text_encoder
        self.offset_noise, self.prior_weight, self.cache = offset_noise, prior_weight, cache
        self.pipe = load_pipeline(pipeline_source(model), DTYPES[dtype], revision=revision)
        self.family = family_of(self.pipe)
        self.conditioning = CONDITIONING[self.family.name]
        self.parts = parts_of(self.pipe)
        self.parts.train()  # from_pretrained leaves them in eval mode
        self.objective = self._objective(prediction, min_snr_gamma)
        self.lora_targets = default_targets(self.family, self.parts, layers, text_encoder=train_text_encoder)
        self._freeze()
        if gradient_checkpointing:
            self._save_memory()
        self._latents = Memory(self._encode_picture)
        self._conditions = Memory(self._encode_prompt)
        self._pixels: Tensor | None = None

    def _objective(self, prediction: str, min_snr_gamma: float | None) -> Objective:
        objective = objective_of(self.pipe.scheduler, prediction, min_snr_gamma)
        take_prediction(self.pipe, prediction)
        return objective

    def _freeze(self) -> None:
        trained = [self.family.denoiser, *(self.family.text_encoders if self.train_text_encoder else ())]
        for module in (self.parts, self.pipe.vae):
            module.requires_grad_(False)
        for name in trained:
            if name in self.parts:
                self.parts[name].requires_grad_(True)

    def _save_memory(self) -> None:
        cast(Any, self.parts[self.family.denoiser]).enable_gradient_checkpointing()
        for name in self.family.text_encoders if self.train_text_encoder else ():
            if name in self.parts:
                cast(Any, self.parts[name]).activation_checkpointing_enable()

    @property
    def multiple(self) -> int:
        """What height and width of pictures have to be multiples of."""
        return int(self.pipe.vae_scale_factor) * self.conditioning.multiple(self.pipe)

    def setup(self, stage: str) -> None:
        """Checks the sizes of pictures, and lets the base model draw pictures of the class that are missing.

        Raises:
            ConfigError: For sizes that the pipeline cannot take, or a precision that would cast a part of it.
        """
        data = self._datamodule()
        if stage != "fit" or not isinstance(data, PicturesDataModule):
            return
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise ConfigError(
                f"precision is {precision}, which casts the trained parts of the pipeline and no other. Set `dtype` of "
                "the task in its place, such as bfloat16, which casts all of them."
            )
        wrong = sorted(size for size in data.sizes if any(side % self.multiple for side in size))
        if wrong:
            raise ConfigError(
                f"Pictures of {wrong[0][0]}x{wrong[0][1]} pixels do not fit {self.model}, whose sides are multiples of "
                f"{self.multiple}. Set `resolution`, and `bucket_step` if there are buckets."
            )
        if data.class_pictures is not None:
            if self.trainer.is_global_zero:
                with self.on_device() as pipe, without_adapters(self.parts):
                    data.class_pictures.draw_missing(pipe)
            self.trainer.strategy.barrier()

    @contextmanager
    def on_device(self) -> Iterator[Any]:
        """Puts the pipeline on the device of the training inside a `with` block.

        Before a training and after it, the trainer has the task elsewhere.
        """
        try:
            yield self.pipe.to(self.trainer.strategy.root_device)
        finally:
            self.pipe.to(self.device)

    def on_fit_start(self) -> None:
        """Moves the autoencoder, forgets an earlier fit, and checks that text encoders are trained if they are to be.

        Raises:
            ConfigError: If an adapter is on one that is not, or on none where they are.
        """
        self.pipe.vae.to(self.device)  # which is no module of the task: it is neither trained nor saved
        for memory in (self._latents, self._conditions):  # pictures and encoders may have changed since
            memory.rows.clear()
        if model_state(self.parts) is None:
            return
        if self.train_text_encoder:
            encoders = [self.parts[name] for name in self.family.text_encoders if name in self.parts]
            if not any(parameter.requires_grad for part in encoders for parameter in part.parameters()):
                raise ConfigError(
                    "train_text_encoder is true, and the adapter trains nothing in a text encoder. Leave "
                    "target_modules out, or name layers of one there; or set `train_text_encoder: false`."
                )
            return
        names = [layer.name for plan in LoraModel(self.parts).plans.values() for layer in plan.layers]
        inside = [name for name in names if not name.startswith(f"{self.family.denoiser}.")]
        if inside:
            raise ConfigError(
                f"The adapter is on {listing(inside, 3)}, and the text encoder is not trained. Set "
                "`train_text_encoder: true`, or leave these layers out of target_modules."
            )

    def on_train_start(self) -> None:
        """Lets each process draw noise of its own: they were seeded alike."""
        super().on_train_start()
        if self.trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + self.global_rank)

    def training_step(self, batch: PictureBatch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        latents = self.latents_of(batch)
        noise = with_offset(torch.randn(latents.shape).to(latents), self.offset_noise)
        noised = self.objective(latents, noise)
        condition = self.condition_of(batch.prompts)
        dtype = DTYPES[self.hparams["dtype"]]
        told = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in condition.items()}
        predicted: Tensor = self.conditioning.denoise(
            self.pipe, noised.latents.to(dtype), noised.times, told, batch.sizes
        )
        errors = (predicted.float() - noised.target).square().flatten(1).mean(1) * noised.weights
        loss = errors[~batch.is_class].mean()
        once: dict[str, Any] = {"batch_size": len(errors), "on_step": False, "on_epoch": True}
        self.log("train/subject_loss", loss, sync_dist=True, **once)
        if bool(batch.is_class.any()):
            prior = errors[batch.is_class].mean()
            self.log("train/class_loss", prior, **once)  # of one process: another may have no such picture
            loss = loss + self.prior_weight * prior
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, **once)
        return loss

    @torch.no_grad()
    def latents_of(self, batch: PictureBatch) -> Tensor:
        """Latents (N, C, h, w) of pictures, float32, scaled as the denoiser takes them; drawn anew each time."""
        self._pixels = batch.pixels
        found = self._latents.of(batch.names) if self.cache else self._encode_pixels(batch.pixels)
        self._pixels = None
        return self._scaled(found["mean"] + found["deviation"] * torch.randn(found["mean"].shape).to(found["mean"]))

    def _scaled(self, latents: Tensor) -> Tensor:
        """Latents as the denoiser takes them; the pipelines undo this before they decode."""
        config = self.pipe.vae.config
        shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is None or deviation is None:
            return cast(Tensor, (latents - shift) * scale)
        mean, deviation = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, deviation))
        return cast(Tensor, (latents - mean) * scale / deviation)

    def condition_of(self, prompts: list[str]) -> Condition:
        """What the denoiser is conditioned on, from prompts."""
        if self.train_text_encoder:
            return self._encode_prompts(prompts)
        with torch.no_grad(), in_eval_mode(self.pipe):  # T5 has dropout
            return self._conditions.of(prompts) if self.cache else self._encode_prompts(prompts)

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        return self.conditioning.encode(self.pipe, prompts, self.device)

    def _encode_prompt(self, prompt: str, number: int) -> Tensors:
        return self._encode_prompts([prompt])

    def _encode_picture(self, name: str, number: int) -> Tensors:
        return self._encode_pixels(cast(Tensor, self._pixels)[number : number + 1])

    def _encode_pixels(self, pixels: Tensor) -> dict[str, Tensor]:
        """Mean and standard deviation of latents, in float32: some autoencoders overflow in half precision."""
        gray = int(self.pipe.vae.config.in_channels) == 1
        pixels = pixels.mean(1, keepdim=True) if gray else pixels
        with torch.autocast(self.device.type, enabled=False), _upcast(self.pipe.vae) as vae:
            encoded = vae.encode(pixels.to(vae.dtype))
        if hasattr(encoded, "latent_dist"):
            return {"mean": encoded.latent_dist.mean.float(), "deviation": encoded.latent_dist.std.float()}
        return {"mean": encoded.latents.float(), "deviation": torch.zeros_like(encoded.latents).float()}

    def next_commands(self, trainer: Any) -> dict[str, str]:
        """Commands that can be pasted, by what they do: pictures from what a run has left."""
        adapters = [
            file.path for callback in lora_callbacks(trainer) for file in callback.adapter_files if file.is_ours
        ]
        stored = getattr(trainer.checkpoint_callback, "best_model_path", "")
        left = [f"--adapter {shlex.quote(path)}" for path in adapters]
        left += [f"--checkpoint {shlex.quote(stored)}"] if stored else []
        prompts = [picture.prompt for picture in getattr(self._datamodule(), "pictures", [])] or ["PROMPT"]
        return {"Draw pictures": f"lora-plugins generate {left[0]} --prompt {shlex.quote(prompts[0])}"} if left else {}


def without_adapters(parts: nn.Module) -> AbstractContextManager[object]:
    """Lets the trained parts of a pipeline compute as those of the base model inside a `with` block."""
    return nullcontext() if model_state(parts) is None else LoraModel(parts).disable_adapter()


@contextmanager
def _upcast(vae: Any) -> Iterator[Any]:
    """Holds an autoencoder in float32 inside a `with` block if it says that it has to be, as pipelines do."""
    stored = vae.dtype
    if stored == torch.float32 or not vae.config.get("force_upcast"):
        yield vae
        return
    with ending(lambda: nn.Module.to(vae, stored)):  # as diffusers' own methods warn of each cast
        yield nn.Module.float(vae)
