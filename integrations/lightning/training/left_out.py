"""Warns before a fit of what it leaves out: new layers that nothing trains, and copies that no average reaches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import ref

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lora_plugins import Plan
from lora_plugins.adapter import present_state
from lora_plugins.errors import listing
from lora_plugins.inplace import full_name, submodule
from lora_plugins.integrations.lightning.module import NetworkCopy, find_copies, find_target, kept_copies
from lora_plugins.plan import forgotten_layers
from lora_plugins.utils import plain_name, within


@dataclass(frozen=True)
class LeftOut:
    """What a fit leaves out.

    Args:
        layers: Names, below the target, of layers that look new and that nothing trains or moves.
        copies: Copies of weights, without A and B, by the names of the collections that have them.
    """

    layers: Sequence[str] = ()
    copies: Mapping[str, Sequence[ref[Tensor]]] = field(default_factory=dict)  # weak: those replaced leave memory

    @classmethod
    def of(cls, module: LightningModule, target: str | None, plan: Plan) -> "LeftOut":
        """Finds what is left out.

        A copy of a part, as a teacher, has the new layers of its original: they follow those, where they are trained.
        """
        adapted = find_target(module, target)
        frozen = {name for name, required in present_state(adapted).requires_grad.items() if not required}
        forgotten = forgotten_layers(adapted, plan, frozen)
        copies = find_copies(module) if forgotten else []
        new = [name for name in forgotten if not _follows(module, full_name(plain_name(target or ""), name), copies)]
        return cls(new, {name: [*map(ref, tensors)] for name, tensors in kept_copies(module).items()})

    def tell_layers(self, target: nn.Module) -> None:
        """Warns of the layers."""
        if self.layers:
            rank_zero_warn(
                f"{listing(self.layers, 3)} of {type(target).__name__} look newly initialized, and nothing trains "
                "them. A new head belongs in modules_to_save, or in an attribute head_modules of the module; one that "
                "is to stay as it is can be left so."
            )

    def tell_copies(self, module: LightningModule) -> None:
        """Warns of the copies that are still there, where `on_fit_start` has made no others in their place."""
        now = kept_copies(module) if self.copies else {}
        still = [name for name, tensors in self.copies.items() if _share(tensors, now.get(name, []))]
        if still:
            rank_zero_warn(
                f"{listing(still, 3)} of {type(module).__name__} has copies of weights, made before there were "
                "adapters: what averages them, or measures the distance to them, does not see A and B, and pairs of "
                "parameters and copies may not belong together. After a merge they are still the pretrained weights: "
                "a module that puts them in place of its own, to validate say, is the pretrained one then. Make the "
                "copies in on_fit_start, and those in buffers in on_load_checkpoint too, or let EMAWeightAveraging "
                "average."
            )


def _share(some: Iterable[ref[Tensor]], others: Iterable[Tensor]) -> bool:
    return not {id(each()) for each in some}.isdisjoint(id(tensor) for tensor in others)


def _follows(module: LightningModule, name: str, copies: Sequence[NetworkCopy]) -> bool:
    originals = [f"{copy.origin}{name.removeprefix(copy.name)}" for copy in copies if within(name, [copy.name])]
    return any(p.requires_grad for each in originals for p in submodule(module, each).parameters(recurse=False))
