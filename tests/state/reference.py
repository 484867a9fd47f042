"""What `LoraModel` means, plainly: the base's tensors, the tensors of each adapter, and which of them act.

Tensors are kept with the bits that the model has to have. Whatever is computed is computed in float64, by a copy of the
base model that never saw an adapter and gets the effective weights `W + ΔW` written in. Nothing here calls
lora_plugins.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import parametrize

from tests.state.spec import CHANGING, Spec
from tests.state.stored import Stored
from tests.state.zoo import Site, Zoo, build, sites

ROUNDINGS = 16
"""How many roundings of the size of one output may add up in a block: at most three layers, each of which rounds its
base output, its update and their sum, and sums of at most twelve products. No more do in what an init computes."""

ORIGINALS = ("parametrizations.weight.original0", "parametrizations.weight.original1")
"""Where weight norm keeps magnitude and direction."""

TOKENS = ("bias_k", "bias_v")
"""What attention calls biases and has as one more key and value: it is added to nothing."""


@dataclass(frozen=True)
class PlannedSlot:
    """One A and B of an adapter.

    Args:
        site: The layer.
        suffix: What follows `lora_A` in the names of its tensors.
        weight: Full name of the weight.
        rows: First row and end of the part of the weight's matrix; None for all.
        columns: Whether the weight has its inputs first.
        r: Rank.
        scaling: Factor of `B @ A`.
        targets: Full names of all weights that get the update, those of tied layers and other names included.
        holders: Names of the modules under which the tensors stand in the state dict.
    """

    site: str
    suffix: str
    weight: str
    rows: tuple[int, int] | None
    columns: bool
    r: int
    scaling: float
    targets: tuple[str, ...]
    holders: tuple[str, ...]

    def key(self, factor: str) -> str:
        """Returns the name of a tensor in the state dict, up to the adapter's name."""
        return f"{self.holders[0]}.lora_{factor}{self.suffix}"

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns the part of a weight that is updated, as `(out, in)`."""
        matrix = weight.flatten(1).T if self.columns else weight.flatten(1)
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    def placed(self, matrix: Tensor, like: Tensor) -> Tensor:
        """Lays an update out as the whole weight, zero outside of the part."""
        whole = torch.zeros_like(like.flatten(1).T if self.columns else like.flatten(1))
        start, stop = self.rows or (0, len(whole))
        whole = torch.cat([whole[:start], matrix, whole[stop:]])
        return (whole.T if self.columns else whole).reshape(like.shape)


@dataclass
class Adapter:
    """One adapter.

    Args:
        spec: What was asked for.
        slots: Where its updates go.
        trained: Names of the model's own parameters that it trains.
        buffers: Names of the model's own buffers that are its own.
        frozen: Names of the norms that it freezes.
        tensors: A, B and what a variant adds, by their name in the state dict without the adapter's.
        values: Its values of the model's own tensors, a changed base included.
        unseen: Those of `values` whose bits are not known yet, since they were never in place, with the share of the
            largest value by which they may be off beside rounding.
    """

    spec: Spec
    slots: tuple[PlannedSlot, ...]
    trained: tuple[str, ...]
    buffers: tuple[str, ...]
    frozen: frozenset[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    unseen: dict[str, float] = field(default_factory=dict)

    def cast(self, dtype: torch.dtype) -> "Adapter":
        """Casts its values, and what an update is made of, which is of single precision at least."""
        factors = torch.promote_types(dtype, torch.float32)
        self.tensors = {name: tensor.to(factors) for name, tensor in self.tensors.items()}
        for name in self.unseen:  # its bits were rounded in the type of before
            self.unseen[name] += ROUNDINGS * torch.finfo(self.values[name].dtype).eps
        self.values = {name: cast(value, dtype) for name, value in self.values.items()}
        return self

    @property
    def changes_base(self) -> bool:
        """Whether its init replaces the base weights."""
        return self.spec.init in CHANGING


Leaves = dict[str, Tensor]


@dataclass
class Result:
    """What the reference computes in one forward.

    Args:
        outputs: By block.
        leaves: What gradients can be asked of, by name in the model; `input` is the input.
        buffers: The statistics afterwards.
        size: The largest element of a weight, or term of one, which rounding of what is computed from it grows with.
    """

    outputs: dict[str, Tensor]
    leaves: Leaves
    buffers: dict[str, Tensor]
    size: float


class Reference:
    """The state of one model.

    Args:
        model: The untouched model.
        blocks: Its blocks.
        plain: Computed weights that a merge for good has made plain parameters.
    """

    def __init__(self, model: Zoo, blocks: tuple[str, ...], plain: frozenset[str] = frozenset()) -> None:
        self.blocks = blocks
        self.dtype = next(model.parameters()).dtype
        self.sites: dict[str, Site] = sites(model)
        self.plain: frozenset[str] = frozenset()
        self.make_plain(plain)
        self.twin = _twin(blocks)
        self.read_structure(model)
        self.base = {self.first[name]: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self.requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
        self.norms = [name[: -len(".running_mean")] for name in self.base if name.endswith(".running_mean")]
        self.stored: dict[str, Stored] = {}
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.weights: dict[str, float] = {}
        self.trainable = True
        self.merged: tuple[str, ...] = ()
        self.merged_weights: dict[str, Tensor] = {}
        self.contexts: list[tuple[str | None, ...] | None] = []
        self.training = False
        self.was_cast = False
        self.magnified = 0.0  # the largest term of a row that DoRA gave its magnitude to, in units of what became of it

    def read_structure(self, model: Zoo) -> None:
        """Notes which names mean the same module or tensor, in a model without adapters."""
        modules: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            modules.setdefault(id(module), []).append(name)
        self.aliases = {name: tuple(names) for names in modules.values() for name in names}
        tensors: dict[int, str] = {}
        self.first: dict[str, str] = {}
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            self.first[name] = tensors.setdefault(id(tensor), name)
        self.parameters = [name for name, _ in model.named_parameters()]

    def make_plain(self, weights: Iterable[str]) -> None:
        """Notes that computed weights are parameters from now on: their layers are like any other."""
        self.plain |= frozenset(weights)
        self.sites |= {name: Site(name) for name in (weight.removesuffix(".weight") for weight in weights)}

    # What an adapter would be

    def plan(self, spec: Spec) -> Adapter:
        """Returns the adapter that a spec describes, without tensors."""
        trained = self._trained(spec)
        saved = {alias for root in spec.saves for alias in self.aliases.get(root, (root,))}
        norms = [name for name in self.norms if not _within(name, saved)]
        tracked = set(norms) if spec.norm == "track" else set()
        buffers = tuple(
            name
            for name in self.base
            if name not in self.parameters and (_within(name, saved) or _within(name, tracked))
        )
        frozen = frozenset(norms) - tracked
        return Adapter(spec, tuple(self._slots(spec)), trained, buffers, frozen)

    def groups(self, targets: tuple[str, ...]) -> list[list[str]]:
        """Returns the targeted sites, those that share a weight together, in the order of the model."""
        found: dict[str, list[str]] = {}
        for name in self.sites:
            if name in targets:
                tensor = next(iter(self.sites[name].tensors.values()))
                found.setdefault(self.first.get(f"{name}.{tensor}", name), []).append(name)
        return list(found.values())

    def of_one_type(self, group: list[str]) -> bool:
        """Whether sites that share a weight use it alike, and not one as a table and another one as a matrix."""
        return len({self.sites[name].lookup for name in group}) == 1

    def sharing(self, slot: PlannedSlot) -> set[str]:
        """Returns all names of the tensor that a slot updates."""
        first = self.first.get(slot.weight, slot.weight)
        return {name for name, other in self.first.items() if other == first} or {slot.weight}

    def is_computed(self, site: str) -> bool:
        """Whether something computes the weight of a layer."""
        return self.sites[site].computed

    def _slots(self, spec: Spec) -> Iterator[PlannedSlot]:
        for group in self.groups(spec.sites):
            site = self.sites[group[0]]
            r = next((spec.ranks[name] for name in group if name in spec.ranks), spec.r)
            alpha = next((spec.alphas[name] for name in group if name in spec.alphas), spec.alpha)
            parts = next((spec.parts[name] for name in group if name in spec.parts), ())
            whole = {part: (tensor, None) for part, tensor in site.tensors.items()}
            cut = {part: (place[0], place[1:]) for part, place in site.parts.items() if part in parts}
            for part, (tensor, rows) in (cut or whole).items():
                names = [f"{alias}.{tensor}" for alias in self.aliases[site.name]]
                tied = [f"{alias}.weight" for other in group[1:] for alias in self.aliases[other]]
                yield PlannedSlot(
                    site=site.name,
                    suffix=f"_{part}" if part else "",
                    weight=f"{site.name}.{tensor}",
                    rows=rows,
                    columns=site.columns,
                    r=r,
                    scaling=alpha / (math.sqrt(r) if spec.rslora else r),
                    targets=(*names, *tied),
                    holders=tuple(alias for name in group for alias in self.aliases[name]),
                )

    def _trained(self, spec: Spec) -> tuple[str, ...]:
        saved = {alias for root in spec.saves for alias in self.aliases.get(root, (root,))}
        own = {self.first[name] for name in self.first if _within(name, saved)}
        biases = {
            "none": set(),
            "all": {
                name for name in self.parameters if "bias" in (last := name.rpartition(".")[2]) and last not in TOKENS
            },
            "lora_only": {f"{name}.{bias}" for name in spec.sites for bias in self.sites[name].biases},
        }[spec.bias]
        return tuple(name for name in self.parameters if name in own | biases)

    # What is where

    @property
    def disabled(self) -> bool:
        """Whether the innermost context, the one that acts, makes the model the base."""
        return bool(self.contexts) and self.contexts[-1] is None

    def owners(self) -> dict[str, str]:
        """Returns which adapter's value of a tensor of the model is in place."""
        if self.contexts:
            return {}
        return {name: adapter for adapter in self.active for name in self.adapters[adapter].values}

    def value(self, name: str, row: str | None = None) -> Tensor:
        """Returns what is in place of a tensor of the model; for a row of a mixed batch, given its adapter."""
        if name in self.merged_weights:
            return self.merged_weights[name]
        owner = row if row is not None and name in self.adapters[row].values else self.owners().get(name)
        return self.base[name] if owner is None else self.adapters[owner].values[name]

    def weights_of(self, layers: Iterable[str]) -> dict[str, str]:
        """Returns the weights of some layers, each with one of the layers; a computed one under its own name."""
        named = {f"{site}.{tensor}": site for site in layers for tensor in self.sites[site].tensors.values()}
        return {self.first.get(name, name): site for name, site in named.items()}

    def store(self, name: str, stored: Stored) -> None:
        """Notes that a weight is stored from now on: its dense value is the base's."""
        self.stored[name] = stored
        self.base[name] = stored.dense()

    def cast(self, dtype: torch.dtype) -> None:
        """Casts everything."""
        self.dtype, self.was_cast = dtype, True
        self.base = {name: cast(tensor, dtype) for name, tensor in self.base.items()}
        for name, stored in self.stored.items():
            self.stored[name] = replace(stored, exact=False)  # it was made of a float value of another type
            self.base[name] = stored.dense(dtype)
        self.merged_weights = {name: cast(value, dtype) for name, value in self.merged_weights.items()}
        for adapter in self.adapters.values():
            adapter.cast(dtype)

    def sources(self) -> dict[str, Tensor]:
        """Returns the tensors of a float model that files of this one load on."""
        return self.base | {name: stored.source for name, stored in self.stored.items()}

    def set_value(self, name: str, value: Tensor) -> None:
        """Notes that what is in place of a tensor has changed."""
        owner = self.owners().get(name)
        (self.base if owner is None else self.adapters[owner].values)[name] = value

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what the model's state dict has to be."""
        found: dict[str, Tensor] = {}
        for name, first in self.first.items():
            if first in self.stored:
                tensors = self.stored[first].tensors | {"dense_like": torch.zeros(1, dtype=self.dtype)}
                found |= {f"{name}_stored.{key}": value for key, value in tensors.items()}
            else:
                found[name] = self.value(first)
        for name, adapter in self.adapters.items():
            for slot in adapter.slots:
                for factor in self.factors(adapter):
                    tensor = adapter.tensors[slot.key(factor)]
                    found |= {f"{holder}.lora_{factor}{slot.suffix}.{name}": tensor for holder in slot.holders}
        return found

    @staticmethod
    def factors(adapter: Adapter) -> tuple[str, ...]:
        """Returns which tensors each slot of an adapter has."""
        return ("A", "B", *{"lora": (), "dora": ("magnitude",), "gated": ("gate",)}[adapter.spec.variant])

    def trainable_names(self) -> set[str]:
        """Returns the names of the parameters that require a gradient."""
        if not self.adapters:
            known = set(self.parameters) - self.stored.keys()
            return {name for name, required in self.requires_grad.items() if required and name in known}
        if not self.trainable:
            return set()
        acting = [name for name in self.active if name not in self.merged]
        factors = {
            f"{slot.key(factor)}.{name}"
            for name in acting
            for slot in self.adapters[name].slots
            for factor in self.factors(self.adapters[name])
        }
        if self.contexts:  # the base's values are in place of those that are trained
            return factors
        return factors | {name for adapter in acting for name in self.adapters[adapter].trained}

    def frozen_norms(self) -> set[str]:
        """Returns the norms that stay in eval mode."""
        counted = () if self.disabled else self.active
        frozen = [self.adapters[name].frozen for name in counted or self.adapters]
        return set.intersection(*map(set, frozen)) if frozen else set()

    def moves(self) -> bool:
        """Whether a forward in training mode moves running statistics."""
        return self.training and bool(set(self.norms) - self.frozen_norms())

    # What is computed

    def run(self, x: Tensor, tokens: Tensor, training: bool) -> Result:
        """Returns what the model computes of an input, in float64."""
        if self.contexts and self.contexts[-1] is not None:
            return self._run_rows(x, tokens, self.contexts[-1])
        return self._run(x, tokens, training, () if self.disabled else self.active)

    def _run_rows(self, x: Tensor, tokens: Tensor, rows: tuple[str | None, ...]) -> Result:
        each = {row: self._run(x, tokens, False, () if row is None else (row,), row) for row in dict.fromkeys(rows)}
        outputs = {
            block: torch.stack([each[row].outputs[block][at] for at, row in enumerate(rows)]) for block in self.blocks
        }
        return Result(outputs, {}, {}, max(result.size for result in each.values()))

    def _run(
        self, x: Tensor, tokens: Tensor, training: bool, acting: tuple[str, ...], row: str | None = None
    ) -> Result:
        leaves: Leaves = {"input": x.detach().double().clone().requires_grad_()}
        self.magnified = 0.0
        weights = self.effective(acting, leaves, row)
        buffers = {
            name: (value.double() if value.is_floating_point() else value).clone()
            for name, value in ((name, self.value(first, row)) for name, first in self.first.items())
            if name not in weights and name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        }
        self.twin.train(training)
        for name in self.frozen_norms():
            self.twin.get_submodule(name).eval()
        outputs = functional_call(self.twin, weights | buffers, (leaves["input"], tokens), tie_weights=False)
        size = max(self.magnified, *(float(weight.detach().abs().max()) for weight in weights.values()))
        return Result(outputs, leaves, buffers, size)

    def effective(self, acting: tuple[str, ...], leaves: Leaves, row: str | None = None) -> dict[str, Tensor]:
        """Returns the weights of the twin with the updates of some adapters; notes the leaves they are made of.

        Args:
            acting: The adapters.
            leaves: Those that are there already; more are added.
            row: The adapter of a row of a mixed batch.
        """

        def leaf(name: str, tensor: Tensor) -> Tensor:
            if name not in leaves:
                leaves[name] = tensor.detach().double().requires_grad_()
            return leaves[name]

        raw: dict[str, Tensor] = {}
        for name, _ in self.twin.named_parameters(remove_duplicate=False):
            site = name.rpartition(".")[0]
            if name.endswith(".weight") and site in self.sites and self.is_computed(site):
                originals = [f"{site}.{part}" for part in ORIGINALS]
                magnitude, direction = (leaf(key, self.value(key, row)) for key in originals)
                raw[name] = magnitude * direction / direction.norm(dim=1, keepdim=True)
            else:
                raw[name] = leaf(self.first[name], self.value(self.first[name], row))
        weights = dict(raw)
        for adapter in acting:
            for slot in self.adapters[adapter].slots:
                # What is merged is in the parameter already, except for weights that are computed.
                if adapter in self.merged and not self.is_computed(slot.site):
                    continue
                for target in slot.targets:
                    update = self.share(adapter) * self.update(adapter, slot, raw[target], leaf)
                    weights[target] = weights[target] + slot.placed(update, raw[target])
        return weights

    def share(self, adapter: str) -> float:
        """Returns what the update of an acting adapter is multiplied by."""
        return 1.0 if self.contexts else self.weights.get(adapter, 1.0)

    def update(self, name: str, slot: PlannedSlot, weight: Tensor, leaf=lambda _, tensor: tensor.double()) -> Tensor:
        """Returns by what the part of a weight changes, as `(out, in)`."""
        adapter = self.adapters[name]
        get = {
            factor: leaf(f"{slot.key(factor)}.{name}", adapter.tensors[slot.key(factor)])
            for factor in self.factors(adapter)
        }
        product = slot.scaling * get["B"] @ get["A"]
        if adapter.spec.variant == "gated":
            return get["gate"] * product
        if adapter.spec.variant == "dora":
            matrix = slot.matrix(weight)
            direction = matrix + product
            norms = row_norms(direction.detach())[:, None]
            terms = slot.scaling * get["B"].abs() @ get["A"].abs() + matrix.abs()
            growth = get["magnitude"].abs().clamp(min=1)[:, None] / norms  # 1: of the magnitude's own gradient
            self.magnified = max(self.magnified, float((growth * terms).detach().max()))
            return get["magnitude"][:, None] / norms * direction - matrix
        return product

    def deltas(self, names: tuple[str, ...], weighted: bool = False) -> dict[str, Tensor]:
        """Returns the sum of the updates of some adapters to each weight that they change."""
        raw = self.effective((), {})
        found: dict[str, Tensor] = {}
        for name in names:
            for slot in self.adapters[name].slots:
                for target in slot.targets:
                    update = slot.placed(self.update(name, slot, raw[target].detach()), raw[target]).detach()
                    update = self.share(name) * update if weighted else update
                    found[target] = found[target] + update if target in found else update
        return found

    def copy(self) -> "Reference":
        """Returns a reference that goes its own way."""
        twin, self.twin = self.twin, None
        other = deepcopy(self)
        self.twin = other.twin = twin
        return other


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts a tensor of floating numbers, and no other."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def row_norms(matrix: Tensor) -> Tensor:
    """Norms of the rows, 1 for a row of zeros."""
    norms = matrix.norm(dim=1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def fresh(
    blocks: tuple[str, ...],
    base: Mapping[str, Tensor],
    plain: frozenset[str],
    required: Mapping[str, bool],
) -> Zoo:
    """Makes an untouched model with these values."""
    dtype = next(tensor.dtype for tensor in base.values() if tensor.is_floating_point())
    model = build(blocks, dtype)
    for weight in plain:
        _make_plain(model, weight)
    names = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in base.items():
            names[name].copy_(tensor)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(required.get(name, True))
    return model


def _twin(blocks: tuple[str, ...]) -> Zoo:
    twin = build(blocks)
    for name, site in sites(twin).items():
        if site.computed:
            _make_plain(twin, f"{name}.weight")
    return twin


def _make_plain(model: Zoo, weight: str) -> None:
    layer = model.get_submodule(weight.removesuffix(".weight"))
    layer.requires_grad_(True)  # else torch makes it a buffer
    parametrize.remove_parametrizations(layer, "weight")


def _within(name: str, roots: set[str]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)
