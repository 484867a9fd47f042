"""What is done and said where something trains or changes the frozen base, which checksums tell."""

from collections.abc import Collection, Mapping, Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import StateError
from lora_plugins.errors import counted, listing
from lora_plugins.integrations.lightning.module import checksum, frozen_tensors
from lora_plugins.integrations.lightning.shims import callbacks_of


def frozen_names(module: nn.Module) -> set[str]:
    """Returns the names of the tensors of the base that require no gradient: all but those of new layers."""
    return {name for name, tensor in frozen_tensors(module).items() if not tensor.requires_grad}


def freeze_again(module: nn.Module, frozen: Collection[str]) -> None:
    """Freezes again what `configure_optimizers` has made trainable of what was frozen, with a warning that names it."""
    base = frozen_tensors(module)
    thawed = {name: base[name] for name in base if name in frozen and base[name].requires_grad}
    for tensor in thawed.values():
        tensor.requires_grad_(False)
    if thawed:
        rank_zero_warn(
            f"configure_optimizers of {type(module).__name__} made {counted(len(thawed), 'tensor')} of the frozen base "
            f"trainable, as an option that freezes nothing does: {listing(thawed)}. They are frozen again, and only "
            "adapters are trained. What is to be trained in full, such as a new head, belongs in modules_to_save."
        )


def check_backbone(trainer: Trainer, module: LightningModule) -> None:
    """Checks before training that no BackboneFinetuning is going to train tensors of the base.

    Raises:
        StateError: If one is, naming them.
    """
    backbone = getattr(module, "backbone", None)
    if backbone is None:  # where one is required, Lightning says so
        return
    for callback in callbacks_of(trainer):
        if not isinstance(callback, BackboneFinetuning):
            continue
        if type(callback).finetune_function is not BackboneFinetuning.finetune_function:
            continue  # what a subclass thaws by code of its own, if anything, is not known
        epoch = callback.unfreeze_backbone_at_epoch
        meant = {id(each) for each in callback.filter_params(backbone, callback.train_bn, requires_grad=False)}
        thawed = [name for name, tensor in frozen_tensors(module).items() if id(tensor) in meant]
        if thawed and epoch < (trainer.max_epochs or 0) and trainer.max_steps == -1:  # with it, fit may end before
            raise StateError(
                f"{type(callback).__name__} would make {counted(len(thawed), 'tensor')} of the frozen base trainable "
                f"in epoch {epoch}: {listing(thawed)}. An adapter's checkpoint does not hold them. To train them from "
                "the first epoch on, list their modules in modules_to_save; to train adapters only, remove the "
                "callback."
            )


def check_in_no_optimizer(thawed: Mapping[str, nn.Parameter], held: Collection[int]) -> None:
    """Checks that no optimizer has one of `thawed`, tensors of the base that require a gradient.

    `held` are the parameters that optimizers have, by `id`.

    Raises:
        StateError: If some are among them, naming them.
    """
    trained = [name for name, parameter in thawed.items() if id(parameter) in held]
    if trained:
        raise StateError(
            f"{counted(len(trained), 'tensor of the frozen base was', 'tensors of the frozen base were')} made "
            f"trainable, by another callback (BaseFinetuning does that) or by the module: {listing(trained)}. An "
            "adapter's checkpoint does not hold them. To train them, list their modules in modules_to_save; to keep "
            "them frozen, remove the callback, or give the optimizer only what requires a gradient, where a module "
            "switches gradients of its parts, as GANs do."
        )


def changed(before: Mapping[str, int], tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors whose bits have changed."""
    return [name for name, tensor in tensors.items() if name in before and checksum(tensor) != before[name]]


def check_unchanged(moved: Sequence[str]) -> None:
    """Checks that none of the frozen base has changed.

    Raises:
        StateError: If there are some, naming them.
    """
    if moved:
        raise StateError(
            f"{counted(len(moved), 'frozen tensor')} changed during training: {listing(moved)}. The adapter's "
            "checkpoints do not hold them and would be put onto another base. Likely causes: a module that unfreezes "
            "a part of itself, such as its head, which belongs in modules_to_save; a callback or a training step that "
            "writes into weights, which is allowed for a teacher: freeze it with requires_grad_(False); a layer that "
            "updates statistics in a buffer while frozen; or an optimizer that writes into everything it has, as "
            "LBFGS does once training has diverged: give it only what requires a gradient."
        )
