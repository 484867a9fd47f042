"""`LoraTrainer`: the Trainer of transformers, with LoRA.

These methods of `transformers.Trainer` are private and overridden here, and nowhere else: `_save`,
`_load_from_checkpoint` and `_load_best_model`. Trainers of other libraries override them too. One private attribute of
models is set while a trainer is made, `_hf_peft_config_loaded`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, get_last_checkpoint
from transformers.training_args import OptimizerNames

from lora_plugins import ConfigError, LoraConfig, LoraModel, StateError
from lora_plugins.adapter import adapter_tensors, check_same, model_state
from lora_plugins.arguments import check_config
from lora_plugins.errors import listing, no_folder
from lora_plugins.field_checks import Check, check_fields, check_flag, check_name, check_share
from lora_plugins.integrations.transformers.guard import TrainingGuard, check_active, unheld
from lora_plugins.integrations.transformers.hub_card import write_card
from lora_plugins.integrations.transformers.reloading import holds_adapter, restore
from lora_plugins.merge import DEFAULT_MAX_ERROR, check_merge_later
from lora_plugins.names import DEFAULT_ADAPTER
from lora_plugins.utils import replace_torch_file

_DECLARED = "_hf_peft_config_loaded"
"""Private attribute by which the Trainer tells that a quantized model has adapters."""

_OF_A_RUN = (TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)
"""Files of a checkpoint without which the Trainer would start anew with the optimizer or the schedule, silently."""

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
"""The name of a checkpoint's folder, into which every Trainer writes its own state last."""

_OF_A_MODEL = "Of a whole model, load the weights with from_pretrained and train from there."
"""What to do with a checkpoint of a Trainer that trained no adapter."""

_IN_BACKWARD = ("lomo", "adalomo")
"""Optimizers that change tensors in the backward, as those do whose names end in `_LAYERWISE`."""

_LAYERWISE = "_layerwise"

_CHECKS: Mapping[str, Check] = {
    "adapter_name": check_name,
    "merge_on_train_end": check_flag,
    "dequantize": check_flag,
    "max_error": check_share,
}
"""What the arguments of a LoraTrainer can be, by name."""


class LoraTrainer(Trainer):
    """The Trainer of transformers, which adapts the model, trains the adapter and saves it alone.

    Everything else is as in `transformers.Trainer`, and so are its arguments. `checkpoint-N` holds an adapter folder in
    place of the model, beside the state of the optimizer; `save_model` writes one as well, and
    `LoraModel.load_adapter(model, folder)` reads both. `load_best_model_at_end` and `resume_from_checkpoint` give the
    adapter the values of a checkpoint, on the base that the trainer was given.

    A model that has no adapter any more, since it was merged, is saved as the Trainer saves any model.

    Args:
        *args: As in `transformers.Trainer`: the model first, then the `TrainingArguments`.
        lora_config: What is adapted, and how; heads to train go into its `modules_to_save`. None for a model that is
            adapted already, by `LoraModel(model, config)` or by `model_init`.
        adapter_name: The adapter that is trained.
        merge_on_train_end: Whether `train` ends with `merge_and_unload`, after the best checkpoint was loaded if one
            was asked for. The trainer then holds an ordinary model.
        dequantize: Whether the merged model has dense weights where those of the base are stored in fewer bytes; with
            `merge_on_train_end` only.
        max_error: Share of an update that this merge may lose to rounding, as in `LoraModel.merge_and_unload`.
        **kwargs: As in `transformers.Trainer`.

    Raises:
        ConfigError: If `lora_config` is of another library, or another argument is invalid, as `dequantize` is without
            `merge_on_train_end`.
        TargetError: If it does not fit the model.
        StateError: If the model has no adapter and none is given, has another one of that name, or is to be sharded by
            FSDP or DeepSpeed; if an optimizer is given that does not hold the adapter, or `optim` names one that steps
            within the backward; or if weights that are stored in fewer bytes are to be merged without `dequantize`.
        MergeError: If weights are to be merged that a layer which is not adapted has too.
    """

    model: nn.Module

    def __init__(
        self,
        *args: Any,
        lora_config: LoraConfig | None = None,
        adapter_name: str = DEFAULT_ADAPTER,
        merge_on_train_end: bool = False,
        dequantize: bool = False,
        max_error: float = DEFAULT_MAX_ERROR,
        **kwargs: Any,
    ) -> None:
        if "peft_config" in kwargs:
            raise ConfigError("LoraTrainer has no argument 'peft_config'. It is 'lora_config' here.")
        if lora_config is not None:
            check_config("LoraTrainer", lora_config)
        if any(isinstance(value, LoraConfig) for value in (*args, kwargs.get("args"))):
            raise ConfigError("LoraTrainer has its config by name: LoraTrainer(model, args, ..., lora_config=config).")
        self.lora_config = lora_config
        self.adapter_name = adapter_name
        self.merge_on_train_end = merge_on_train_end
        self.dequantize = dequantize
        self.max_error = max_error
        check_fields(vars(self), _CHECKS)
        if dequantize and not merge_on_train_end:
            raise ConfigError(
                "dequantize=True says how the model is merged, and nothing is merged. Add merge_on_train_end=True, or "
                "leave it out: merge_and_unload(dequantize=True) takes it later."
            )
        self._declared: list[nn.Module] | None = []
        self._declare(args[0] if args else kwargs.get("model"))
        try:
            super().__init__(*args, **kwargs)
        finally:
            for model in self._declared:
                del model.__dict__[_DECLARED]
            self._declared = None
        self._optimizer_is_given = self.optimizer is not None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise StateError(
                "LoraTrainer does not shard models by FSDP or DeepSpeed. Train in DDP, or with LoraCallback of "
                "lora_plugins.integrations.lightning."
            )
        self._check_steps()
        if self.model_init is None:  # after the Trainer has set the seed, from which A and B start
            self._check_optimizer()
            self._adapt(self.model)
        self.add_callback(TrainingGuard(adapter_name))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Makes a model, and adapts it."""
        model = self._adapt(super().call_model_init(trial))
        self._declare(model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains the adapter; see `transformers.Trainer.train`.

        Raises:
            StateError: If the adapter was merged, is not the one that is active, or something is trained that no
                checkpoint would hold.
        """
        if self.model_init is None:
            check_active(self.model, self.adapter_name)
        output = super().train(*args, **kwargs)
        if self.merge_on_train_end:
            LoraModel(self.model).merge_and_unload(max_error=self.max_error, dequantize=self.dequantize)
        return output

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the model card of the adapter, `README.md`, into the output folder.

        Of the Trainer's own arguments `license` and `finetuned_from`, the name of the base, are used. A merged model
        has the Trainer's own card.
        """
        if model_state(self.model) is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            LoraModel(self.model).save_adapter(folder, self.adapter_name)
            source = str(getattr(getattr(self.model, "config", None), "_name_or_path", None) or "")
            base = kwargs.get("finetuned_from") or (None if Path(source).exists() else source)  # a path says nothing
            name = self.hub_model_id or self.args.hub_model_id or folder.name  # the first is set by a push alone
            best = self.args.load_best_model_at_end
            write_card(folder, name, base, kwargs.get("license"), self.state, best=best)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the names of the parameters that weight decay applies to.

        The Trainer leaves out what is called "bias" or "norm"; what the adapter is called says nothing of its tensors,
        which are decayed in the layers of which something else is.
        """
        decayed: list[str] = super().get_decay_parameter_names(model)
        if super().get_decay_parameter_names(nn.ParameterDict({self.adapter_name: nn.Parameter(torch.zeros(1))})):
            return decayed
        layers = {_holder(name) for name in decayed}
        factors = {id(tensor) for tensor in adapter_tensors(model).values()}
        named = [name for name, parameter in model.named_parameters() if id(parameter) in factors]
        return decayed + [name for name in named if _holder(_holder(name)) in layers]

    def _declare(self, model: Any) -> None:
        """Lets the Trainer's constructor accept a quantized model: it knows no adapters but PEFT's."""
        if self._declared is not None and getattr(model, "is_quantized", False) and _DECLARED not in model.__dict__:
            model.__dict__[_DECLARED] = True
            self._declared.append(model)

    def _adapt(self, model: nn.Module) -> nn.Module:
        """Puts the adapter on a model that does not have it."""
        state = model_state(model)
        if state is None or self.adapter_name not in state.adapters:
            if self.lora_config is None:
                raise StateError(
                    f"The model has no adapter {self.adapter_name!r}. Give LoraTrainer a lora_config, or adapt the "
                    "model before: LoraModel(model, config)."
                )
            self._check_merge_later(model, self.lora_config)
            if state is None:
                LoraModel(model, self.lora_config, self.adapter_name)
            else:
                LoraModel(model).add_adapter(self.adapter_name, self.lora_config)
                LoraModel(model).set_adapter(self.adapter_name)
        else:
            if self.lora_config is not None:
                check_same(state, self.adapter_name, self.lora_config)
            self._check_merge_later(model)
        check_active(model, self.adapter_name)
        return model

    def _check_merge_later(self, model: nn.Module, planned: LoraConfig | None = None) -> None:
        if self.merge_on_train_end:
            plan = None if planned is None else LoraModel.plan(model, planned)
            check_merge_later(model, dequantize=self.dequantize, otherwise="merge_on_train_end=False", plan=plan)

    def _check_steps(self) -> None:
        """Refuses optimizers of the Trainer that leave no gradients behind, and no state to save."""
        name = OptimizerNames(self.args.optim).value
        chosen = self.optimizer is None and self.optimizer_cls_and_kwargs is None
        if chosen and (name in _IN_BACKWARD or name.endswith(_LAYERWISE)):
            raise StateError(
                f"optim={name!r} changes tensors within the backward, where it cannot be checked that the adapter is "
                "trained, and gives checkpoints no state to resume from. It saves memory where all weights are "
                "trained; gradients of A and B are small. Choose another, such as optim='adamw_torch'."
            )

    def _check_optimizer(self) -> None:
        """Refuses an optimizer of the user's that was made before the model was adapted."""
        if self.optimizer is None:
            return
        state = model_state(self.model)
        if state is not None and self.adapter_name in state.adapters:
            missing = listing(unheld(self.model, self.optimizer))
        else:
            missing = f"A and B of the adapter {self.adapter_name!r}"
        if missing:
            raise StateError(
                f"The optimizer does not hold {missing}, which are to be trained. Adapt the model before the "
                "optimizer is made: LoraModel(model, config), then LoraTrainer without lora_config; or give "
                "optimizer_cls_and_kwargs instead of optimizers."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Writes the adapter, what prepares its inputs, and the arguments."""
        if model_state(self.model) is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(str(output_dir if output_dir is not None else self.args.output_dir))
        LoraModel(self.model).save_adapter(folder, self.adapter_name)
        preparing: Any = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if preparing is not None:
            preparing.save_pretrained(folder)
        replace_torch_file(folder / TRAINING_ARGS_NAME, self.args)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restores the adapter from a checkpoint, before the optimizer is made."""
        folder = Path(resume_from_checkpoint)
        missing = [name for name in _OF_A_RUN if not (folder / name).is_file()]
        if _was_begun(folder) and TRAINER_STATE_NAME in missing:
            raise StateError(
                f"{folder} has neither an adapter nor {TRAINER_STATE_NAME}: a run was stopped while it wrote this "
                "checkpoint. Remove it, and resume from an earlier one or start without resume_from_checkpoint."
            )
        if holds_adapter(folder) and missing:
            raise StateError(
                f"{folder} has no {missing[0]}: a run was stopped while it wrote this checkpoint, or it was written by "
                "save_model, or with save_only_model. Resume from an earlier checkpoint; or go on with the adapter "
                "alone: LoraModel.load_adapter(model, folder), then LoraTrainer without lora_config and train()."
            )
        self._restore(folder)

    def _load_best_model(self) -> None:
        """Restores the adapter from the best checkpoint."""
        self._restore(Path(str(self.state.best_model_checkpoint)))

    def _restore(self, folder: Path) -> None:
        if not folder.is_dir():
            raise StateError(no_folder(folder))
        if not holds_adapter(folder):
            last = cast(Any, get_last_checkpoint)(str(folder))
            instead = f"Name the checkpoint in it: {last}." if last else _OF_A_MODEL
            raise StateError(f"{folder} holds no adapter: it is no checkpoint of a LoraTrainer. {instead}")
        restore(self.model, self.adapter_name, folder)
        if self.optimizer is None or not unheld(self.model, self.optimizer):
            return
        if self._optimizer_is_given:
            raise StateError(
                f"The adapter of {folder} had to be put on the model anew, and the optimizer that the trainer was "
                "given holds the tensors that were. Let the trainer make it: optimizer_cls_and_kwargs."
            )
        self.optimizer, self.lr_scheduler = None, None  # made again when training starts


def _was_begun(folder: Path) -> bool:
    """Whether a folder is that of a checkpoint, by its name, and has no adapter yet."""
    return folder.is_dir() and _CHECKPOINT.fullmatch(folder.name) is not None and not holds_adapter(folder)


def _holder(name: str) -> str:
    """Returns the module that holds a tensor or another module."""
    return name.rpartition(".")[0]
