"""How many values of a model a parameter stands for: a weight in fewer bytes counts as the dense one."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_plugins.inplace.library_kinds import foreign_kind
from lora_plugins.inplace.stored_weight import LIKE, StoredWeight


def element_count(module: nn.Module, parameter: Tensor) -> int:
    """Returns how many values a parameter of a module stands for.

    Of the tensors of a stored weight, one stands for the whole dense weight and the others for nothing. A parameter
    that has no shape yet stands for nothing.
    """
    if isinstance(module, StoredWeight):
        return module.shape.numel() if parameter is module._parameters[LIKE] else 0
    if is_lazy(parameter):
        return 0
    kind = foreign_kind(parameter)
    return parameter.numel() if kind is None else kind.elements(parameter)
