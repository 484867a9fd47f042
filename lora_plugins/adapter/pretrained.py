"""`save_pretrained` of an adapted model warns: `from_pretrained` will not put the adapter back.

Models of transformers, diffusers, segmentation-models-pytorch and others write their state dict with `save_pretrained`.
That of an adapted model holds the base and, under names that `from_pretrained` drops, the adapter. None of these
libraries is imported: any module with a method of that name is served, by an attribute in its place while the model has
adapters.
"""

import warnings
from typing import Any

from torch import nn

from lora_plugins.adapter.attach import adapter_tensors
from lora_plugins.adapter.state import ModelState

SAVE = "save_pretrained"


class WarnedSave:
    """The method `save_pretrained` of one module, which warns where an adapter would be dropped.

    It is an object, since a copy or a pickle of the module has to have one of its own.

    Args:
        module: The module.
        state: The adapters of the model that it is, or is in.
    """

    def __init__(self, module: nn.Module, state: ModelState) -> None:
        self._module, self._state = module, state

    @property
    def __wrapped__(self) -> Any:
        """The module's own method, by which `inspect.signature` finds its parameters."""
        return getattr(type(self._module), SAVE).__get__(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Warns, and saves."""
        written = set(adapter_tensors(self._module))
        if (given := kwargs.get("state_dict")) is not None:
            written &= set(given)
        if self._state.acting.adapters and written:
            warnings.warn(
                f"{type(self._module).__name__}.save_pretrained writes base and adapter apart, and from_pretrained "
                "drops the adapter: what was trained would be lost. Save the adapter with LoraModel(model)."
                "save_adapter(path), or merge it before: LoraModel(model).merge_and_unload(). Where the Trainer of "
                "transformers calls it, train with LoraTrainer in its place, which saves the adapter; in a fit of "
                "Lightning, LoraCallback(config, save_adapter_to=folder) does.",
                stacklevel=2,
            )
        return self.__wrapped__(*args, **kwargs)


def warn_on_save(model: nn.Module, state: ModelState) -> None:
    """Lets `save_pretrained` warn, of a model and of the models in it; an attribute of the user's stays."""
    for module in model.modules():
        if SAVE not in vars(module) and callable(getattr(type(module), SAVE, None)):
            vars(module)[SAVE] = WarnedSave(module, state)


def restore_save(model: nn.Module) -> None:
    """Undoes `warn_on_save`."""
    for module in model.modules():
        if isinstance(vars(module).get(SAVE), WarnedSave):
            del vars(module)[SAVE]
