"""Adapters of a module whose own hooks rebuild adapted layers.

`setup` runs at the start of each fit, validate, test and predict, and a module may build its layers there each time,
with the values that they had. The adapters go onto the new layers.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lora_plugins import AdapterFileError, LoraModel, StateError
from lora_plugins.files import PackedAdapter
from lora_plugins.integrations.lightning.module import BUILDING_HOOKS, adapted_targets, find_target, lost_layers
from lora_plugins.integrations.lightning.shims import MethodShims


@dataclass(frozen=True)
class _Kept:
    """The adapters of one target before a hook, by name, and the factors of the active ones."""

    path: str
    target: nn.Module
    adapters: Mapping[str, PackedAdapter]
    active: Mapping[str, float]

    def put_back(self, module: nn.Module, hook: str) -> None:
        """Puts the adapters onto rebuilt layers.

        Raises:
            StateError: If a new layer has other values than the one that the adapter was trained on.
        """
        target = find_target(module, self.path or None)
        lost = [name for adapter in self.adapters for name in lost_layers(self.target, adapter)]
        if target is self.target and not lost:
            return
        LoraModel(self.target).unload()
        try:
            for name, packed in self.adapters.items():
                lora = LoraModel.load_packed(target, packed, name)
        except AdapterFileError as error:
            raise StateError(
                f"{type(module).__name__}.{hook}() built layers again that are adapted, with other values: {error} "
                "Build them once (`if self.head is None`), give them the values that they had, or name them in "
                "modules_to_save."
            ) from error
        lora.set_adapter([*self.active], weights=[*self.active.values()])


def after_building(
    shims: MethodShims, module: LightningModule, then: Callable[[], None], before: Callable[[], None] | None = None
) -> None:
    """Calls `then` after the last hook in which a module may build layers, and `before` ahead of `configure_model`."""
    if is_overridden("configure_model", module):  # WeightAveraging calls it ahead of `setup` as well
        shims.after("setup", lambda _: shims.after("configure_model", lambda _: then(), before))
    else:
        shims.after("setup", lambda _: then())


def follow_building(shims: MethodShims, module: LightningModule) -> None:
    """Moves the adapters of a module onto layers that its own hooks rebuild."""
    for hook in BUILDING_HOOKS:
        if is_overridden(hook, module):
            _follow(shims, module, hook)


def _follow(shims: MethodShims, module: LightningModule, hook: str) -> None:
    kept: list[_Kept] = []

    def keep() -> None:
        adapted = adapted_targets(module).items()
        kept[:] = [_kept(path, target) for path, target in adapted if not LoraModel(target).merged_adapters]

    def put_back(_: object) -> None:
        for each in kept:
            each.put_back(module, hook)
        kept.clear()

    shims.after(hook, put_back, keep)


def _kept(path: str, target: nn.Module) -> _Kept:
    lora = LoraModel(target)
    packed = {name: lora.pack(name) for name in lora.adapters}
    # The fingerprints in a manifest are the model's own, which forgets them when a base is loaded.
    adapters = {name: PackedAdapter(copy.deepcopy(each.manifest), each.tensors) for name, each in packed.items()}
    return _Kept(path, target, adapters, lora.active_weights)
