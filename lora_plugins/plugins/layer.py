"""What a layer plugin says: which class it adapts, and how a low-rank matrix is laid out like its weight."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lora_plugins.plugins.kind import (
    A_FLAG,
    A_NAME,
    PluginKind,
    are_module_classes,
    are_options,
    class_path,
    is_module_class,
)
from lora_plugins.plugins.slot import Slot
from lora_plugins.plugins.term import StackedAdapters, Term

BranchUse = Literal["never", "dropout", "always"]

Layer = TypeVar("Layer", bound=nn.Module)


class LayerPlugin(ABC, Generic[Layer]):
    """What a type of layer is, to LoRA: `class MyPlugin(RowMajorPlugin[MyLayer])`.

    A plugin is stateless. It sees the weight of a layer as a matrix `(out, in)`; A is `(r, in)`, B is `(out, r)`, and
    the update `scaling * B @ A` is laid out like the weight by `from_matrix`. That alone makes a layer type work:
    the adapted layer then runs its own `forward` with the updated weight. A `branch` is an optional faster way to
    the same result, and the only way to honor dropout.

    Attributes:
        name: Unique name of the layer type, as plans and files show it.
        module_type: The module class, or a path from which it can be imported (`"package.module.Class"`), which is
            compared without importing the package. Subclasses are adapted too; the most specific plugin wins.
        lookup: True for layers that look rows of the weight up by index. There A starts at zero instead of B, and
            dropout is refused, as indices cannot be dropped.
        branch_types: The classes, or their import paths, whose `forward` is known to be what `branch` computes.
            Subclasses are included only if they change nothing that their base has, as others may transform their
            weight or their input.
        branch_use: When `branch` replaces the layer's own forward for `branch_types`: `always`, or only while
            `dropout` acts, or `never`.
        branch_takes_delta: Whether `branch` adds `term.delta` where a term has one, in place of `scaling * B @ A`.
            Only then is it called with a variant, whose update may be any matrix; otherwise the layer runs its own
            `forward` with the effective weight, and refuses a variant with dropout.
        branch_takes_rescaling: Whether `branch` computes with `term.rescaling` where its only term has one, which then
            covers all rows of the weight and has no `delta`; and whether `mixed`, if there is one, honors
            `adapters.factors`.
        rows_are_outputs: Whether each row of the matrix belongs to one output. Variants such as DoRA need that; the
            rows of a transposed convolution are an output at one place of the kernel.
        function: torch's function of `input`, `weight` and `bias` that the layer's forward calls, if `branch` and
            `mixed` read only the bias of the layer. A module that calls this function with the layer's weight then
            gets their result, with the bias of the call, where no weight has it: with dropout and in mixed batches.
        class_attributes: Properties and methods of the class of adapted layers, by name. For a layer whose forward
            reads its weights elsewhere than in the attributes that the slots name, such as a list of them, or keeps
            what it computes from them. The forward itself is none of them.
    """

    name: ClassVar[str]
    module_type: ClassVar[type[nn.Module] | str]
    lookup: ClassVar[bool] = False
    branch_types: ClassVar[Sequence[type[nn.Module] | str]] = ()
    branch_use: ClassVar[BranchUse] = "never"
    branch_takes_delta: ClassVar[bool] = False
    branch_takes_rescaling: ClassVar[bool] = False
    rows_are_outputs: ClassVar[bool] = True
    function: ClassVar[Callable[..., Tensor] | None] = None
    class_attributes: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def to_matrix(self, weight: Tensor) -> Tensor:
        """Views a weight as a matrix `(out, in)`: a reshape or a permutation, never a computation."""

    @abstractmethod
    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Lays a matrix `(out, in)` out as a weight of the given shape: the inverse of `to_matrix`."""

    def slots(self, layer: Layer) -> Sequence[Slot]:
        """Returns where a whole-layer adapter goes."""
        return (Slot("weight"),)

    def parts(self, layer: Layer) -> Mapping[str, Slot]:
        """Returns the slots of `q`, `k` and `v` where one layer computes all three; empty where it does not."""
        return {}

    def biases(self, layer: Layer) -> Sequence[str]:
        """Returns the attribute names of the biases that `bias="lora_only"` trains."""
        return ("bias",)

    def forget(self, layer: Layer) -> None:
        """Drops what a layer has kept that it computed from its weight; by default nothing.

        It is called whenever a layer gets its own class back, since no update is active any more: after a merge for
        good too, where the weight is another one than before the layer was adapted.
        """

    def inputs(self, layer: Layer, slot: Slot, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the vectors that the matrix of a slot is multiplied by, `(n, in)`, for inits that learn from them.

        Optional: without it, such an init refuses the layer, as where it raises a `NotImplementedError`. A subclass is
        taken to feed its weight as its base class does.

        Args:
            layer: The layer; read its options, not its weight.
            slot: One of the layer's slots.
            *args: What the layer's `forward` was called with.
            **kwargs: Likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what its weight is multiplied by.")

    def branch(
        self,
        layer: Layer,
        base: Mapping[str, Tensor],
        terms: Sequence[Term],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Computes the layer's output with its update, without forming the updated weight.

        Args:
            layer: The layer; read its options, not its weight.
            base: The weights that the terms are added to, by slot tensor name: untouched, or with merged updates.
            terms: The active updates, at least one.
            *args: What the layer's `forward` was called with.
            **kwargs: Likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} says branch_use={self.branch_use!r} but has no branch.")

    def mixed(
        self,
        layer: Layer,
        base: Mapping[str, Tensor],
        adapters: StackedAdapters,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Computes the layer's output where each row of the batch has an update of its own; inference only.

        Optional: without it, `LoraModel.mixed_batch` refuses the layer. It is for updates of one weight, and may raise
        a `NotImplementedError` for what only a call tells.

        Args:
            layer: The layer; read its options, not its weight.
            base: The weights that the updates are added to, by slot tensor name.
            adapters: The adapters of the rows.
            *args: What the layer's `forward` was called with; the batch is the first dimension of the first one.
            **kwargs: Likewise.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot mix adapters in one batch.")

    def mixing_problem(self, layer: Layer) -> str:
        """Returns why `mixed` cannot serve a layer of this type, such as an option of it; empty if it can."""
        return ""


class RowMajorPlugin(LayerPlugin[Layer]):
    """A layer whose weight has its outputs first: `(out, ...)`."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Flattens `(out, ...)` to `(out, in)`."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Reshapes `(out, in)` to `(out, ...)`."""
        return matrix.reshape(shape)


class ColumnMajorPlugin(LayerPlugin[Layer]):
    """A layer whose weight has its inputs first: `(in, ...)`."""

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Flattens `(in, ...)` to `(in, out)` and transposes it."""
        return weight.flatten(1).T

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """Transposes `(out, in)` and reshapes it to `(in, ...)`."""
        return matrix.T.reshape(shape)


def _contradiction(plugin: LayerPlugin[Any]) -> str:
    if plugin.class_attributes is not type(plugin).class_attributes:
        return "sets 'class_attributes' of an instance. Adapted layers have those of the plugin's class"
    if plugin.branch_use == "never":
        return ""
    if type(plugin).branch is LayerPlugin.branch:
        return f"says branch_use={plugin.branch_use!r} and has no branch"
    if not plugin.branch_types:
        return f"says branch_use={plugin.branch_use!r} and names no branch_types, so it is never used"
    return ""


LAYERS = PluginKind[LayerPlugin[Any]](
    name="layers",
    title="layer type",
    base=LayerPlugin,
    rules={
        "name": A_NAME,
        "module_type": (is_module_class, "a module class or its import path, 'package.module.Class'"),
        "lookup": A_FLAG,
        "branch_types": (are_module_classes, "a list of module classes or import paths"),
        "branch_use": (lambda value: value in get_args(BranchUse), f"one of {get_args(BranchUse)}"),
        "branch_takes_delta": A_FLAG,
        "branch_takes_rescaling": A_FLAG,
        "rows_are_outputs": A_FLAG,
        "function": (lambda value: value is None or callable(value), "a function of torch or None"),
        "class_attributes": (
            lambda value: are_options(value) and "forward" not in value,
            "a mapping of attributes by name, without 'forward': what computes in its place is 'branch'",
        ),
    },
    claims={
        "module class": lambda plugin: class_path(plugin.module_type),
        "layer type": lambda plugin: plugin.name,
    },
    contradiction=_contradiction,
)
"""Layer types, each for one module class and its subclasses."""
