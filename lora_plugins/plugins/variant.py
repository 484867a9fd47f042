"""What a variant plugin says: how A and B change a weight, where that is more than adding their product."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from lora_plugins import words
from lora_plugins.plugins.kind import A_NAME, PluginKind
from lora_plugins.plugins.layer import LayerPlugin

PLAIN = "lora"
"""What `LoraConfig(variant=...)` says for no variant."""


class VariantPlugin(ABC):
    """A variant of LoRA, chosen by `LoraConfig(variant=...)`.

    A plugin is stateless. It sees the part of a weight that an adapter updates as a matrix `W`, `(out, in)`, and says
    by which matrix that weight changes; a layer then computes what it would compute with `W` plus that. It may have
    tensors of its own, which are trained, saved, merged and removed with A and B. All layer types whose
    matrix has a row for each output are served, with dropout where their branch honors it.

    Attributes:
        name: What `LoraConfig(variant=...)` says.
    """

    name: ClassVar[str]

    @abstractmethod
    def shapes(self, rows: int, columns: int, r: int) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of the variant's own tensors by name, such as `{"magnitude": (rows,)}`.

        A tensor called `magnitude` is `lora_magnitude` in the layer.

        Args:
            rows: Outputs of the matrix.
            columns: Its inputs.
            r: Rank.
        """

    @abstractmethod
    def first_values(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float) -> Mapping[str, Tensor]:
        """Returns the first values of the variant's own tensors, by name.

        It draws no random numbers, since all processes of a run have to agree: take values that must differ from those
        of A, which the init drew, as in `A.flip(0)`. In layers that look rows up, A is zero and B is drawn.

        Args:
            weight: `W`, `(out, in)`, as the init left it.
            A: `(r, in)`, its first value.
            B: `(out, r)`, likewise.
            scaling: The scaling.
        """

    @abstractmethod
    def delta_weight(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float, own: Mapping[str, Tensor]) -> Tensor:
        """Returns the change of `W`, `(out, in)`, in plain operations that autograd follows.

        The same values give the same matrix each time: it draws no random numbers, and knows of no mode.

        Args:
            weight: `W`, `(out, in)`, in the type of A.
            A: `(r, in)`.
            B: `(out, r)`.
            scaling: The scaling.
            own: The variant's own tensors by name.
        """

    def row_factors(self, direction: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Returns what each row of the direction `W + scaling * B @ A` is multiplied by, `(out,)`.

        Optional, for a variant whose `delta_weight` is `f * (W + scaling * B @ A) - W` with these `f` held constant in
        the gradients of W, A and B. Layers then compute with that weight in one function that keeps little
        besides its input.

        Args:
            direction: `W + scaling * B @ A`, `(out, in)`, detached. It may be written over afterwards, so that nothing
                with a gradient may depend on it but through what is computed from it first, such as its norms.
            own: The variant's own tensors by name, in which the factors are differentiable.
        """
        raise NotImplementedError(f"{type(self).__name__} does not only rescale rows.")

    @property
    def rescales_rows(self) -> bool:
        """Whether all it does to the updated weight is to rescale its rows: whether it has `row_factors`."""
        return type(self).row_factors is not VariantPlugin.row_factors

    def refusal(self, plugin: LayerPlugin[Any]) -> str | None:
        """Returns why the variant cannot serve a layer type whose matrix has a row for each output; None if it can."""
        return None


def _contradiction(plugin: VariantPlugin) -> str:
    return f"has the name {PLAIN!r}, which stands for no variant" if plugin.name == PLAIN else ""


VARIANTS = PluginKind[VariantPlugin](
    name="variants",
    title="variant",
    base=VariantPlugin,
    rules={"name": A_NAME},
    claims={"variant": lambda plugin: plugin.name},
    contradiction=_contradiction,
    reserved=(PLAIN,),
    words=words.VARIANTS,
)
"""Variants of LoRA, chosen by `LoraConfig(variant=...)`."""
