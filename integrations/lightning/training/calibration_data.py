"""Adapters that wait for a checkpoint, and the training batches that inits such as `eva` and `lora_ga` learn from.

Such adapters join the module later than others: after Lightning has restored a checkpoint, whose adapter is complete
and needs no data, and before the strategy wraps the module and makes its optimizers. The data of an init are the first
training batches, given to the `training_step` of a copy of the module, so that nothing of the run is disturbed: no log,
no metric, no random number. Checked against Lightning 2.6.6.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import count
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import nn

from lora_plugins import INITS, Calibration, ConfigError, InitData, LoraConfig, LoraModel, StateError, calibrate
from lora_plugins.integrations.lightning.module import find_target
from lora_plugins.integrations.lightning.shims import MethodShims, train_loaders
from lora_plugins.integrations.lightning.strategies import is_sharded
from lora_plugins.plugins import registry_of
from lora_plugins.utils import ending, own_randomness, run_seed


def needs_data(config: LoraConfig) -> bool:
    """Whether the config's init is calibrated on data.

    Raises:
        PluginError: If there is no such init.
    """
    return registry_of(config).get(INITS, config.init).needs is not None


def stores_changed_base(config: LoraConfig) -> bool:
    """Whether the config's init changes a base that is then stored in fewer bytes: the pretrained values are gone.

    A checkpoint has to come first then: it brings the base of its adapter, and the init may draw or round another here.

    Raises:
        PluginError: If there is no such init.
    """
    return config.quantize is not None and registry_of(config).get(INITS, config.init).changes_base


def adapt_after_restoring(trainer: Trainer, adapt: Callable[[], None]) -> MethodShims:
    """Calls `adapt` when Lightning has restored a checkpoint or has none.

    Returns:
        The shims that do it; they remove themselves when `adapt` is called.

    Raises:
        StateError: If the trainer's strategy splits the module before that.
    """
    if is_sharded(trainer):
        raise StateError(
            f"{type(trainer.strategy).__name__} splits the module before a checkpoint is restored, and so before an "
            "init can learn from data. Train the first steps with strategy='ddp' or on one device, or choose an init "
            "that needs no data."
        )
    shims = MethodShims(trainer.strategy)

    def once() -> None:
        shims.remove()  # what loads a checkpoint later, such as a tuner, finds the module adapted
        adapt()

    shims.after("setup", lambda _: None, before=once)
    return shims


def calibrate_on_train_batches(
    trainer: Trainer, module: LightningModule, target: str | None, config: LoraConfig, limit: int
) -> Calibration:
    """Calibrates an init on the first batches of a trainer; module, trainer and random numbers stay as they are.

    Raises:
        ConfigError: If there are no training batches, or `training_step` returns no loss where one is needed.
        StateError: If the module optimizes by hand, so that its `training_step` cannot be called by itself.
    """
    if not module.automatic_optimization:
        raise StateError(
            f"{type(module).__name__} optimizes by hand, so its training_step cannot be run to see data for the init "
            f"{config.init!r}. Adapt the module before fit: LoraModel(module, config, init_data=InitData(loader, "
            "step))."
        )
    batches = trainer.limit_train_batches
    limit = min(limit, batches) if isinstance(batches, int) else limit
    replica = _replica(trainer, module)
    adapted = find_target(replica, target)
    plan = LoraModel.plan(adapted, config)
    replica.train(plan.init.needs == "gradients")
    device, precision, index = trainer.strategy.root_device, trainer.precision_plugin, count()
    numbered = is_param_in_hook_signature(replica.training_step, "batch_idx", min_args=2)

    def step(_: nn.Module, batch: Any) -> Any:
        batch = precision.convert_input(trainer.strategy.batch_to_device(batch, device))
        # Not under autocast, in which small gradients vanish without the scaler of the training loop.
        with nullcontext() if isinstance(precision, MixedPrecision) else precision.forward_context():
            return replica.training_step(batch, next(index)) if numbered else replica.training_step(batch)

    try:
        with _without_loggers(trainer), _train_batches(trainer) as loader:
            return calibrate(adapted, plan, InitData(loader, step, limit))
    except Exception as error:
        error.add_note(
            f"This happened while the init {config.init!r} was shown training batches, on a copy of the module and "
            "before there are optimizers. A training_step that cannot run then needs LoraModel(module, config, "
            "init_data=InitData(loader, step)) before fit, or another init."
        )
        raise


def _replica(trainer: Trainer, module: LightningModule) -> LightningModule:
    """Copies the module to the device and the precision of the run, without its logging."""
    try:
        replica = copy.deepcopy(module)
    except Exception as error:
        raise StateError(
            f"{type(module).__name__} cannot be copied ({error}), and the init learns from data on a copy of it. "
            "Choose an init that needs no data, or adapt the module before fit, by LoraModel."
        ) from error
    with suppress(ValueError):  # which says that it is not compiled; compiled steps would be those of the module
        replica = to_uncompiled(replica)
    replica.trainer = trainer
    for part in replica.modules():
        if isinstance(part, LightningModule):
            part.__dict__.update(log=_ignore, log_dict=_ignore)
    on_device = replica.to(trainer.strategy.root_device)
    return cast(LightningModule, trainer.precision_plugin.convert_module(on_device))


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Replaces `log` of the copy, as there is no step that a value could belong to."""


@contextmanager
def _without_loggers(trainer: Trainer) -> Iterator[None]:
    """Ignores what `training_step` writes to a logger."""
    loggers = trainer.loggers
    with ending(partial(setattr, trainer, "loggers", loggers)):
        trainer.loggers = [DummyLogger() for _ in loggers]
        yield


@contextmanager
def _train_batches(trainer: Trainer) -> Iterator[Iterator[Any]]:
    """Gives the trainer's training batches, as its loop will see them."""
    seed = run_seed("data")
    with ExitStack() as stack:
        stack.enter_context(own_randomness(seed))
        loaders = train_loaders(trainer)
        if loaders is None:
            raise ConfigError(
                "There are no training batches for the init to learn from: fit was given no train_dataloader."
            )
        combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
        for loader in combined.flattened:
            stack.enter_context(own_randomness(seed, None, loader))
        try:
            yield (batch for batch, _, _ in combined)
        finally:
            combined.reset()
