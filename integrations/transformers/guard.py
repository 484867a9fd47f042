"""Checks of a run: what is trained is in the optimizer, in the checkpoints and in the backward."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerState, TrainingArguments

from lora_plugins import LoraModel, StateError
from lora_plugins.adapter import adapter_tensors, check_in_place, model_state
from lora_plugins.errors import listing
from lora_plugins.files import checksum
from lora_plugins.inplace import model_modules, named_parameters, persistent_buffers
from lora_plugins.plan import Plan, forgotten_layers


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter.requires_grad}


def unheld(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Returns the names of the parameters that are to be trained and that an optimizer does not hold."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [name for name, parameter in trained(model).items() if id(parameter) not in held]


def unsaved_buffers(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Returns by name the checksums of the buffers in a state dict that are not saved with the adapter."""
    buffers = persistent_buffers(model_modules(model))
    return {name: checksum(buffer) for name, buffer in buffers.items() if name not in plan.saved_buffers}


def check_active(model: nn.Module, adapter_name: str) -> None:
    """Refuses a model on which the adapter is not the only active one, is merged, or has lost a layer.

    Raises:
        StateError: If there is none, others are active, it is merged, or one of its layers was replaced.
    """
    state = model_state(model)
    if state is None:
        raise StateError(
            "The model has no adapter any more: it was merged or unloaded. Make the model and the trainer again; "
            "an adapter that is trained on a merged base fits no other."
        )
    state.check("train")
    acting = state.acting.adapters
    if acting != (adapter_name,):
        raise StateError(
            f"LoraTrainer trains the adapter {adapter_name!r}, and {listing(acting) or 'none'} is active. Call "
            f"LoraModel(model).set_adapter({adapter_name!r}) first, outside of disable_adapter()."
        )
    if state.weights:
        raise StateError(
            f"The adapter {adapter_name!r} acts with the weight {state.weights[adapter_name]}, which no checkpoint "
            f"would hold. Call LoraModel(model).set_adapter({adapter_name!r}) first; a factor belongs in alpha."
        )
    check_in_place(model, state, adapter_name)


class TrainingGuard(TrainerCallback):
    """Checks the first steps of a run, each epoch and each save, and writes the adapter where a push takes it from."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self._seen = False
        self._buffers: dict[str, str] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Prints what is trained, once it is known to be in the optimizer and in the checkpoints.

        Raises:
            StateError: If it is not.
        """
        model, self._seen = kwargs["model"], False
        self._check(model, kwargs["optimizer"])
        plan = LoraModel(model).plans[self.adapter_name]
        self._buffers = unsaved_buffers(model, plan)
        if state.is_world_process_zero:
            print(f"LoRA adapter {self.adapter_name!r}: {plan.summary()}")
        if forgotten := forgotten_layers(model, plan):
            warnings.warn(
                f"{listing(forgotten, 3)} look newly initialized, and nothing trains them. A new head belongs in "
                "modules_to_save of the LoraConfig; one that is to stay as it is can be left so.",
                stacklevel=2,
            )

    def on_epoch_begin(self, *_: Any, **kwargs: Any) -> None:
        """Checks that no other callback has merged or switched the adapter, or unfrozen something else.

        Raises:
            StateError: If one has.
        """
        self._check(kwargs["model"], kwargs["optimizer"])
        self._check_buffers(kwargs["model"])

    on_save = on_epoch_begin  # an epoch can be the whole run

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Checks buffers once more, unless another callback has merged the adapter by now.

        Raises:
            StateError: If some have changed that no checkpoint holds.
        """
        if model_state(kwargs["model"]) is not None:
            self._check_buffers(kwargs["model"])

    def _check(self, model: nn.Module, optimizer: Optimizer) -> None:
        check_active(model, self.adapter_name)
        plan, tensors = LoraModel(model).plans[self.adapter_name], trained(model)
        if not tensors:
            raise StateError(
                f"Nothing of the model requires a gradient, so that nothing would be trained. Call LoraModel(model)."
                f"set_adapter({self.adapter_name!r}), and freeze no more than is to stay as it is."
            )
        lost = tensors.keys() - adapter_tensors(model).keys() - set(plan.trained)
        if lost:
            raise StateError(
                f"{listing(sorted(lost))} are trained and are no part of the adapter, so that no checkpoint would hold "
                "them. Name them in modules_to_save, or leave them frozen."
            )
        if missing := unheld(model, optimizer):
            raise StateError(
                f"The optimizer does not hold {listing(missing)}, which are to be trained. If the adapter was put on "
                "the model anew since the optimizer was made, make the trainer again."
            )

    def _check_buffers(self, model: nn.Module) -> None:
        now = unsaved_buffers(model, LoraModel(model).plans[self.adapter_name])
        moved = [name for name, before in self._buffers.items() if now.get(name, before) != before]
        if moved:
            raise StateError(
                f"Training changes {listing(moved)}, buffers that are no part of the adapter, so that no checkpoint "
                "would hold them. Name their modules in modules_to_save; of those that need not be kept, register the "
                "buffer again with persistent=False before the trainer is made."
            )

    def on_pre_optimizer_step(self, *_: Any, **kwargs: Any) -> None:
        """Checks the gradients of the first step, and what its forward has changed.

        Raises:
            StateError: If no tensor of the adapter has one, or if the forward changes what no checkpoint would hold.
        """
        if self._seen:
            return
        self._seen, model = True, kwargs["model"]
        self._check_buffers(model)
        tensors = trained(model)
        factors = adapter_tensors(model).keys() & tensors.keys()
        without = [name for name, parameter in tensors.items() if parameter.grad is None]
        if factors and factors <= set(without):
            raise StateError(
                "The first backward gave the adapter no gradient. Activation checkpointing with use_reentrant=True "
                "causes this when its inputs need none: set use_reentrant=False. So does code that takes gradients "
                "within the backward, such as an optimizer in a hook; let the Trainer's optimizer step."
            )
        if without:
            warnings.warn(f"{listing(without)} got no gradient in the first step, and stay as they are.", stacklevel=2)

    def on_push_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """Writes the adapter into the output folder, which is what the Trainer pushes."""
        model = kwargs["model"]
        if args.should_save and model_state(model) is not None:
            LoraModel(model).save_adapter(Path(str(args.output_dir)), self.adapter_name)
