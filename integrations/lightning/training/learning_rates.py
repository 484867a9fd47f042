"""Separate learning rates for A, B and what is trained in full.

That B learns faster than A is LoRA+ (Hayou et al., arXiv 2402.12354), which suggests a ratio of about 16. Heads start
from random values and often need another rate than adapters of a pretrained layer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lora_plugins import StateError
from lora_plugins.adapter import adapter_tensors
from lora_plugins.field_checks import check_factor
from lora_plugins.integrations.lightning.module import adapted_targets
from lora_plugins.integrations.lightning.training.optimizer_groups import NAMES, flatten, parameters_of

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Entries of a parameter group that are learning rates; schedulers of torch write the last three."""

_LISTED_RATES = ("base_lrs", "max_lrs", "_last_lr")
"""Attributes of schedulers of torch 2.13 that have one learning rate for each group; AdaBound has the first as well."""

_LISTED_ENTRIES = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
"""Attributes that have something else for each group."""

_FOLLOWS, _RATIO = "follows", "lr_ratio"
"""Entries of a part of a group: the index of that group, and the multiple of its rate that the part learns at."""


def parameter_groups(
    module: nn.Module, *, lr: float, loraplus_lr_ratio: float = 1.0, heads_lr_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Returns parameter groups with separate learning rates for A, B and what is trained in full.

    For use in `configure_optimizers`, where the module is adapted already. `LoraCallback` has the same options, for
    modules that are not to be changed and for YAML files.

    Args:
        module: The LightningModule.
        lr: Learning rate of A, and of what a variant adds, such as the magnitudes of DoRA.
        loraplus_lr_ratio: Learning rate of B, as a multiple of that of A.
        heads_lr_ratio: Learning rate of everything else that requires a gradient, as a multiple of that of A: heads,
            biases, what lies outside the adapters' targets.

    Returns:
        The groups `A`, `B` and `heads`, under the key `name`; those that would be empty are left out.
    """
    members = _members(_kinds(module), [p for p in module.parameters() if p.requires_grad])
    rates = {"A": lr, "B": lr * loraplus_lr_ratio, "heads": lr * heads_lr_ratio}
    return [{"name": name, "params": params, "lr": rates[name]} for name, params in members.items() if params]


@dataclass(frozen=True)
class LearningRates:
    """The ratios of learning rates to those of `configure_optimizers`.

    Args:
        loraplus_lr_ratio: Learning rate of B, as a multiple of that of A.
        heads_lr_ratio: Learning rate of heads, biases and what lies outside the adapters' targets, as a multiple too.

    Raises:
        ConfigError: If one of them is not a positive, finite number.
    """

    loraplus_lr_ratio: float = 1.0
    heads_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_factor(name, value)

    def check_restored(self, saved: Mapping[str, float]) -> None:
        """Checks that a run is resumed with the ratios that it was started with.

        Its optimizer's state has the parameter groups and the learning rates that these made.

        Raises:
            StateError: If one differs.
        """
        own = vars(self)
        differing = [f"{name}={value}, here {own.get(name)}" for name, value in saved.items() if value != own.get(name)]
        if differing:
            raise StateError(
                f"The checkpoint was trained with {'; '.join(differing)}. The state of its optimizer belongs to the "
                "parameter groups of those ratios, and brings their learning rates. Give LoraCallback the same, or "
                "start a new run from the weights of the checkpoint: load_from_checkpoint, then fit without ckpt_path."
            )

    def split_groups(self, module: nn.Module, configured: Any) -> None:
        """Splits every parameter group of existing optimizers into parts that follow its learning rate.

        What has a ratio of 1, as A has, stays in its group; the rest gets new groups after the others, with the same
        options. Whoever sets the rate of the group, a scheduler or a loop over all groups, each step has the multiples.
        An optimizer that was split for an earlier fit is left as it is.

        Raises:
            StateError: If an optimizer or a scheduler could not be told of the new groups, or an optimizer has no
                learning rate.
        """
        if self == LearningRates():
            return
        kinds = _kinds(module)
        leaves = [
            leaf for leaf in flatten(configured) if not hasattr(leaf, "param_groups") or self._splits(kinds, leaf)
        ]
        _check_told(leaves)
        _check_rates(leaves)
        schedulers = [leaf for leaf in leaves if isinstance(leaf, LRScheduler)]
        for optimizer in leaves:
            if isinstance(optimizer, Optimizer):
                listing_groups = [optimizer, *(s for s in schedulers if s.optimizer is optimizer)]
                for index in range(len(optimizer.param_groups)):
                    self._split(kinds, optimizer, index, listing_groups)
                # A step of SAM's own is one of the optimizer inside; a wrapper may be no Optimizer, as cassle's LARS.
                for part in _parts(optimizer):
                    if hasattr(part, "register_step_pre_hook"):
                        part.register_step_pre_hook(self.follow)

    @classmethod
    def follow_all(cls, optimizers: Iterable[Optimizer]) -> None:
        """As `follow`, of several optimizers."""
        for optimizer in optimizers:
            cls.follow(optimizer)

    @staticmethod
    def follow(optimizer: Optimizer, *_: Any) -> None:
        """Gives each part of a group its multiple of the group's rate, ahead of a step, and again after its closure."""
        for group in optimizer.param_groups:
            if _FOLLOWS in group:
                rate = optimizer.param_groups[group[_FOLLOWS]]["lr"] * group[_RATIO]
                if isinstance(group["lr"], Tensor):  # which a compiled step has captured
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def _splits(self, kinds: Mapping[int, str], optimizer: Optimizer) -> bool:
        """Whether some group of an optimizer is to be split, as that of what is not adapted may not, and is not yet."""
        groups = optimizer.param_groups
        is_split = any(_FOLLOWS in group for group in groups)
        return not is_split and any(self._leaving(_members(kinds, group["params"])) for group in groups)

    def _leaving(self, members: Mapping[str, list[nn.Parameter]]) -> dict[str, float]:
        """Returns the ratios of what leaves a group of such members, by name."""
        ratios = {"B": self.loraplus_lr_ratio, "heads": self.heads_lr_ratio}
        return {name: ratio for name, ratio in ratios.items() if members[name] and ratio != 1}

    def _split(self, kinds: Mapping[int, str], optimizer: Optimizer, index: int, listing_groups: list[Any]) -> None:
        group, members = optimizer.param_groups[index], _members(kinds, optimizer.param_groups[index]["params"])
        parts = self._leaving(members)
        moved = {id(parameter) for name in parts for parameter in members[name]}
        whole = dict(group)
        group.update(_with_members(whole, [parameter for parameter in whole["params"] if id(parameter) not in moved]))
        for name, ratio in parts.items():
            own = {"name": f"{group['name']}_{name}"} if "name" in group else {}  # LearningRateMonitor wants it unique
            part = {**_with_members(whole, members[name]), **own, **_scaled(group, ratio)}
            optimizer.add_param_group({**part, _FOLLOWS: index, _RATIO: ratio})
            for each in listing_groups:
                _extend(each, index, ratio)


def _with_members(group: dict[str, Any], members: list[nn.Parameter]) -> dict[str, Any]:
    """Returns a group with some of its parameters, and with their names if it was made of `named_parameters()`."""
    if NAMES not in group:
        return {**group, "params": members}
    names = {id(parameter): name for name, parameter in zip(group[NAMES], group["params"], strict=True)}
    return {**group, "params": members, NAMES: [names[id(parameter)] for parameter in members]}


def _scaled(group: dict[str, Any], factor: float) -> dict[str, Any]:
    return {key: group[key] * factor for key in _GROUP_RATES if key in group}


def _extend(listing_groups: Any, index: int, factor: float) -> None:
    """Adds to what an optimizer or a scheduler lists a new group, at a multiple of the rate of the one at `index`."""
    for part in _parts(listing_groups):
        for name in (*_LISTED_RATES, *_LISTED_ENTRIES):
            entries = getattr(part, name, None)
            if isinstance(entries, list):
                entries.append(entries[index] * factor if name in _LISTED_RATES else entries[index])


def _parts(whole: Any) -> list[Any]:
    """Returns a scheduler or optimizer and those that it is made of, as SequentialLR, ChainedScheduler or Lookahead."""
    inner = list(getattr(whole, "_schedulers", ()))
    if isinstance(whole, Optimizer):
        inner += [value for value in vars(whole).values() if isinstance(value, Optimizer)]
    return [whole, *(part for each in inner for part in _parts(each))]


def _kinds(module: nn.Module) -> dict[int, str]:
    """Returns "A" or "B" for each tensor of the module's adapters, by its `id`; what a variant adds is with A."""
    slots = {
        id(parameter): name.split(".")[-2].removeprefix("lora_").partition("_")[0]  # a part of a fused weight: A_q
        for target in adapted_targets(module).values()
        for name, parameter in adapter_tensors(target).items()
    }
    return {key: "B" if slot == "B" else "A" for key, slot in slots.items()}


def _members(kinds: Mapping[int, str], parameters: list[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Sorts parameters into those of A, of B, and others."""
    members: dict[str, list[nn.Parameter]] = {"A": [], "B": [], "heads": []}
    for parameter in parameters:
        members[kinds.get(id(parameter), "heads")].append(parameter)
    return members


def _check_told(leaves: Iterable[Any]) -> None:
    """Checks that all optimizers and schedulers keep what each parameter group has where torch's own do."""
    for leaf in leaves:
        if hasattr(leaf, "step") and (reason := _why_untold(leaf)):
            raise StateError(
                f"{type(leaf).__name__} {reason}, and could not be told of the parameter groups that loraplus_lr_ratio "
                "and heads_lr_ratio make. Use parameter_groups(...) in configure_optimizers instead."
            )


def _why_untold(leaf: Any) -> str:
    if not isinstance(leaf, Optimizer | LRScheduler):
        return "is no Optimizer or LRScheduler of torch"
    if isinstance(leaf, LRScheduler):
        return ""
    kept = [name for name, value in vars(leaf).items() if _keeps_parameters(value, leaf)]
    return f"keeps parameters beside its groups ({kept[0]})" if kept else ""


def _keeps_parameters(value: Any, optimizer: Optimizer) -> bool:
    """Whether an attribute of an optimizer has its parameters where a change of its groups does not reach them."""
    if isinstance(value, Optimizer):
        return value.param_groups is not optimizer.param_groups
    held = parameters_of([optimizer])
    return isinstance(value, list) and any(isinstance(each, Optimizer) or id(each) in held for each in value)


def _check_rates(leaves: Iterable[Any]) -> None:
    """Checks that each optimizer has learning rates: those that find their own cannot be scaled."""
    for leaf in leaves:
        if isinstance(leaf, Optimizer) and any("lr" not in group for group in leaf.param_groups):
            raise StateError(
                f"{type(leaf).__name__} has no 'lr' in its parameter groups, since it finds its own learning rate, so "
                "loraplus_lr_ratio and heads_lr_ratio have nothing to multiply. Leave both at 1, or use another "
                "optimizer."
            )
