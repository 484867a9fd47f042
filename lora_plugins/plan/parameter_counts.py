"""How many parameters of a model are trained, of how many."""

from torch import nn

from lora_plugins.inplace import element_count


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Returns how many values of a model are trained, and how many it has; those of adapters are among both.

    A weight that is stored in fewer bytes counts as the dense one, and a tied parameter once.
    """
    counts = {
        id(parameter): (element_count(module, parameter), parameter.requires_grad)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    }
    return sum(count for count, trained in counts.values() if trained), sum(count for count, _ in counts.values())
