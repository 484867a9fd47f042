"""Recurrent layers: `nn.LSTM`, `nn.GRU`, `nn.RNN`, whose weights one kernel reads from a list, and their cells.

Each weight has an update of its own: that of the inputs, that of the hidden state and, where `proj_size` is given, that
of the projection, for every layer and direction. A weight holds all gates of its layer, one below the other, so the
matrix view is the weight itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_plugins.plugins import RowMajorPlugin, Slot

_LIST = "_flat_weights"
"""Attribute of a recurrent layer with its tensors in the order of its kernel; `_flat_weights_names` has their names."""


def _slots(names: Sequence[str]) -> tuple[Slot, ...]:
    return tuple(Slot(name, name.removeprefix("weight_")) for name in names if name.startswith("weight_"))


def _tensors(layer: nn.RNNBase, read: Callable[[str], Tensor | None]) -> list[Tensor | None]:
    return [read(name) for name in layer._flat_weights_names]


def _effective(layer: nn.RNNBase) -> list[Tensor | None]:
    """Returns the list with the effective weights, formed at each reading: nothing of them is kept on the layer."""
    weights = _tensors(layer, lambda name: getattr(layer, name, None))
    on_gpu = any(weight is not None and weight.is_cuda for weight in weights)
    return _in_one_block(layer, weights) if on_gpu else weights


def _in_one_block(layer: nn.RNNBase, weights: list[Tensor | None]) -> list[Tensor | None]:
    """Moves tensors into one block of memory, as cuDNN wants them; parameters themselves stay where they are."""
    own = {id(parameter) for parameter in layer._parameters.values()}
    copies = [weight.clone() if weight is not None and id(weight) in own else weight for weight in weights]
    reader = nn.RNNBase.__new__(nn.RNNBase)
    reader.__dict__ = {**layer.__dict__, _LIST: copies}
    reader.flatten_parameters()
    return copies


def _keep_parameters(layer: nn.RNNBase, _: object = None) -> None:
    """Puts the layer's own parameters into its own list, which copies take along, and which is read without adapters.

    A weight that is computed is left out. The layer fills the list again before it reads it.
    """
    layer.__dict__[_LIST] = _tensors(layer, layer._parameters.get)


class RecurrentPlugin(RowMajorPlugin[nn.RNNBase]):
    """`torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`, with all of their options."""

    name = "recurrent"
    module_type = nn.RNNBase
    class_attributes: ClassVar[Mapping[str, Any]] = {
        _LIST: property(_effective, _keep_parameters),
        # Before a forward and a copy, compares the list with the attributes: here each reading of it is a new one.
        "_update_flat_weights": _keep_parameters,
        # Copies the list, for nn.DataParallel, before the replica has tensors that it could be read from.
        "_replicate_for_data_parallel": nn.Module._replicate_for_data_parallel,
    }

    def slots(self, layer: nn.RNNBase) -> Sequence[Slot]:
        """Returns one slot over each weight, named after its kind, layer and direction, such as `ih_l0_reverse`."""
        return _slots(layer._flat_weights_names)

    def biases(self, layer: nn.RNNBase) -> Sequence[str]:
        """Returns two biases for each layer and direction, unless the layer has none."""
        return tuple(name for name in layer._flat_weights_names if name.startswith("bias_"))


class RecurrentCellPlugin(RowMajorPlugin[nn.RNNCellBase]):
    """`torch.nn.LSTMCell`, `torch.nn.GRUCell` and `torch.nn.RNNCell`."""

    name = "recurrent_cell"
    module_type = nn.RNNCellBase

    def slots(self, layer: nn.RNNCellBase) -> Sequence[Slot]:
        """Returns `ih` over the weight of the input and `hh` over that of the hidden state."""
        return _slots(["weight_ih", "weight_hh"])

    def biases(self, layer: nn.RNNCellBase) -> Sequence[str]:
        """Returns `bias_ih` and `bias_hh`."""
        return ("bias_ih", "bias_hh")
