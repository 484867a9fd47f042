"""Layers that share a weight: one adapter, that of the first of them, serves all."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_plugins.errors import TargetError
from lora_plugins.plan.sites import Site, WeightKey
from lora_plugins.plugins import Tie


@dataclass(frozen=True)
class Target:
    """A layer to adapt, with the other targeted layers that share its weight."""

    site: Site
    ties: list[tuple[Site, Tie]] = field(default_factory=list)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The layer, and those that are tied to it."""
        return (self.site, *(site for site, _ in self.ties))

    @property
    def names(self) -> tuple[str, ...]:
        """All names of all of them."""
        return tuple(name for site in self.sites for name in site.names)


def grouped(sites: Iterable[Site]) -> list[Target]:
    """Gives targets that share a weight one adapter, that of the first of them.

    Raises:
        TargetError: If a layer shares one weight and has others of its own.
    """
    owners: dict[WeightKey, tuple[Target, str]] = {}
    groups: list[Target] = []
    for site in sites:
        tensors = list({slot.tensor: None for slot in site.slots})
        keys = {tensor: site.weights[tensor].key for tensor in tensors}
        shared = [tensor for tensor in tensors if keys[tensor] in owners]
        if not shared:
            group = Target(site)
            groups.append(group)
            owners.update({keys[tensor]: (group, tensor) for tensor in tensors})
            continue
        owner, source = owners[keys[shared[0]]]
        if len(tensors) > 1:
            raise TargetError(
                f"{site.name!r} shares a weight with {owner.site.name!r} and has others of its own. Exclude one of "
                "the two."
            )
        owner.ties.append((site, Tie(site.name, shared[0], source)))
    return groups
