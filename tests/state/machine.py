"""Carries out calls on a model and on the reference, and compares both after each.

A call is a generator: up to its `yield` it calls lora_plugins, which may refuse; after it the reference follows.
"""

import pickle
import re
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins import LoraError, LoraModel, StateError
from tests.state import checks
from tests.state.checks import DivergenceError
from tests.state.plugins import registry
from tests.state.reference import ORIGINALS, Adapter, PlannedSlot, Reference, cast, fresh, row_norms
from tests.state.rules import MaybeError, Saved, Step, errors_of
from tests.state.spec import Spec
from tests.state.stored import Stored, not_nearest
from tests.state.zoo import batch, build

Call = Iterator[None]

IDENTITIES = frozenset({"kaiming", "gaussian", "orthogonal"})
"""The inits that start at the untouched model."""


RESIDUAL = frozenset({"pissa", "olora"})
"""The inits that store what they leave of a weight."""

READS = frozenset({"save", "snap", "mode", "copy", "look", "broken_forward"})
"""The calls that change nothing that a backward could need."""

BLOCKS = frozenset({"disable", "mixed", "close"})
"""The calls that open and end blocks, after which all is what it was before."""


REFUSED_BACKWARDS = (
    "modified by an inplace operation",
    "would give no gradient",
    "was changed between a forward and its backward",
)
"""What an error about a tensor that has changed says."""


@dataclass
class Pending:
    """A forward whose backward has not come yet.

    Args:
        loss: Its loss.
        parameters: What was trained at that moment, by name, and the input.
        expected: The gradients that the backward has to give.
        allowed: The tolerance of an output.
        dropped: Whether dropout acted.
        outside: Whether it was outside of all blocks.
        changes: The kinds of calls since.
    """

    loss: Tensor
    parameters: dict[str, Tensor]
    expected: dict[str, Tensor]
    allowed: float
    dropped: bool
    outside: bool
    changes: set[str] = field(default_factory=set)


class NoHandleError(Exception):
    """A call needs a handle, and there was never one."""


class Machine:
    """A model and its reference.

    Args:
        blocks: The blocks of the model.
        dtype: Its type.
        seed: Of its weights.
        folder: Where adapters are saved.
        kind: The class of the handles, so that one with a defect can be tried.
    """

    def __init__(
        self, blocks: tuple[str, ...], dtype: torch.dtype, seed: int, folder: Path, kind: type[LoraModel] = LoraModel
    ) -> None:
        torch.manual_seed(seed)
        self.kind = kind
        self.blocks, self.seed, self.folder = blocks, seed, folder
        self.model = build(blocks, dtype, seed)
        self.reference = Reference(self.model, blocks)
        self.lora: LoraModel | None = None
        self.contexts: list[AbstractContextManager[Any]] = []
        self.saved: dict[int, Saved] = {}
        self.snapshot: tuple[dict[str, Tensor], Reference, object] | None = None
        self.pending: Pending | None = None
        self.objects: dict[str, nn.Parameter] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model."""
        return self.reference.dtype

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        """An input in that type."""
        return batch(self.dtype, self.seed)

    @property
    def handle(self) -> LoraModel:
        """The handle, which outlives the adapters."""
        if self.lora is None:
            raise NoHandleError
        return self.lora

    def do(self, step: Step, compare: bool = True) -> str:
        """Carries out one step and compares everything.

        Args:
            step: What to do.
            compare: False where only later steps are of interest.

        Returns:
            `done` or `refused`.

        Raises:
            DivergenceError: If the model is not what the reference says.
        """
        allowed = errors_of(step, self.reference, self.saved)
        call = getattr(self, step.kind)(**step.arguments)
        drawn = torch.get_rng_state()
        try:
            next(call)
        except LoraError as error:
            if not allowed:
                raise DivergenceError(f"{step.kind} refused", f"{type(error).__name__}: {error}") from error
            if MaybeError not in allowed and not isinstance(error, tuple(allowed)):
                raise DivergenceError(
                    f"{step.kind} refused by another error", f"{type(error).__name__}: {error}"
                ) from error
            outcome = "refused"
        except (DivergenceError, NoHandleError):
            raise
        except Exception as error:
            raise DivergenceError(f"{step.kind} raised", f"{type(error).__name__}: {error}") from error
        else:
            if allowed and MaybeError not in allowed:
                names = ", ".join(sorted(error.__name__ for error in allowed))
                raise DivergenceError(f"{step.kind} not refused", f"expected {names}")
            next(call, None)
            outcome = "done"
        if not torch.equal(torch.get_rng_state(), drawn) and not checks.drops(self.reference):
            raise DivergenceError("random numbers", f"{step.kind} drew from the global generator")
        self._check_objects()
        if self.pending and outcome == "done" and step.kind != "forward":
            self.pending.changes.add(step.kind)
        if self.pending and self.reference.moves():
            self.pending = None  # the comparison below moves statistics, which torch itself does not notice
        if compare:
            checks.check(self.model, self.lora, self.reference, self.inputs)
        return outcome

    def _check_objects(self) -> None:
        """An optimizer holds parameters: as long as a name is there, it means the same one."""
        objects = {name: p for name, p in self.model.named_parameters() if "_stored." not in name}
        other = [name for name, parameter in self.objects.items() if objects.get(name, parameter) is not parameter]
        if other:
            raise DivergenceError("identity", f"{other} are other parameters than before")
        self.objects = objects

    def close_all(self) -> None:
        """Leaves all contexts, whatever they do."""
        while self.contexts:
            with suppress(Exception):
                self.contexts.pop().__exit__(None, None, None)

    # Adding and removing

    def add(self, name: str, spec: Spec, new: bool = False) -> Call:
        if self.lora is None or new:
            self.lora = self.kind(self.model, spec.config(), name, registry=registry())
        else:
            self.handle.add_adapter(name, spec.config())
        yield
        adapter = self.reference.plan(spec)
        self._first_values(name, adapter)
        self._join(name, adapter)

    def _join(self, name: str, adapter: Adapter) -> None:
        if not self.reference.adapters:
            self.reference.active, self.reference.trainable, self.reference.weights = (name,), True, {}
        self.reference.adapters[name] = adapter

    def _first_values(self, name: str, adapter: Adapter) -> None:
        """Reads what an init gave, and checks what it promises."""
        base = self.reference.base
        self._read_factors(name, adapter)
        if adapter.spec.quantize:
            self._store(adapter)
        adapter.values = {key: base[key].clone() for key in (*adapter.trained, *adapter.buffers)}
        identity = adapter.spec.init in IDENTITIES
        for slot in adapter.slots:
            product = slot.scaling * adapter.tensors[slot.key("B")].double() @ adapter.tensors[slot.key("A")].double()
            if identity:
                checks.near("init", slot.site, product, torch.zeros_like(product), checks.tolerance(torch.float32))
            if adapter.changes_base and self.reference.first[slot.weight] not in self.reference.stored:
                self._changed_base(adapter, slot, product)
        for slot in adapter.slots:
            self._first_own(adapter, slot)

    def _read_factors(self, name: str, adapter: Adapter) -> None:
        found = self.model.state_dict()
        for slot in adapter.slots:
            for factor in self.reference.factors(adapter):
                key = slot.key(factor)
                if f"{key}.{name}" not in found:
                    raise DivergenceError("state dict keys", f"{key}.{name} is missing")
                adapter.tensors[key] = found[f"{key}.{name}"].clone()
                expected = torch.promote_types(self.dtype, torch.float32)
                if adapter.tensors[key].dtype != expected:
                    raise DivergenceError("type", f"{key}.{name} is {adapter.tensors[key].dtype}, expected {expected}")

    def _store(self, adapter: Adapter) -> None:
        """Reads what is stored of an adapter's weights from now on, and checks that it is as near as it can be."""
        reference = self.reference
        wanted: dict[str, Tensor] = {}
        for name in reference.weights_of(adapter.spec.sites):
            if name not in reference.stored:
                wanted[name] = reference.base[name].double().clone(memory_format=torch.contiguous_format)
        for slot in adapter.slots if adapter.spec.init in RESIDUAL else ():
            A, B = (adapter.tensors[slot.key(factor)].double() for factor in "AB")
            slot.matrix(wanted[reference.first[slot.weight]]).sub_(slot.scaling * B @ A)
        changed = {reference.first[slot.weight] for slot in adapter.slots} if adapter.spec.init in RESIDUAL else set()
        for name, value in wanted.items():
            there = self._stored(name, adapter.spec.quantize, value, reference.base[name])
            reference.store(name, replace(there, residual=name in changed))

    def _stored(self, name: str, storage: str, wanted: Tensor, source: Tensor, exact: bool = True) -> Stored:
        found = self.model.state_dict()
        tensors = {key: found.get(f"{name}_stored.{key}") for key in ("codes", "scale_codes", "scale_maxima")}
        if any(tensor is None for tensor in tensors.values()):
            raise DivergenceError("state dict keys", f"{name} is not stored")
        if reason := not_nearest(storage, tensors, wanted, source.dtype):
            raise DivergenceError("stored value", f"{name}: {reason}")
        return Stored(storage, {key: tensor.clone() for key, tensor in tensors.items()}, source.clone(), exact)

    def _changed_base(self, adapter: Adapter, slot: PlannedSlot, product: Tensor) -> None:
        name = self.reference.first[slot.weight]
        original = self.reference.base[name]
        weight = adapter.values.get(name, original).clone(memory_format=torch.contiguous_format)  # for a view
        matrix = slot.matrix(original).double()
        if adapter.spec.init == "loftq":
            # One scale for all, as no weight here is larger than a block; ties of rounding are left open.
            scale = matrix.abs().max() / 127
            steps = matrix / scale
            changed, ties = steps.round() * scale, bool((steps.frac().abs() - 0.5).abs().min() < 1e-3)
        else:
            changed, ties = matrix - product, False
        slot.matrix(weight).copy_(changed)
        adapter.values[name] = weight
        adapter.unseen[name] = adapter.unseen.get(name, 0.0) + ties / 127

    def _first_own(self, adapter: Adapter, slot: PlannedSlot) -> None:
        if adapter.spec.variant == "dora":
            name = self.reference.first.get(slot.weight)
            weight = adapter.values.get(name, self.reference.base[name]) if name else self._computed(slot.site)
            product = slot.scaling * adapter.tensors[slot.key("B")].double() @ adapter.tensors[slot.key("A")].double()
            expected = row_norms(slot.matrix(weight.double()) + product)
            checks.near(
                "first magnitude",
                slot.site,
                adapter.tensors[slot.key("magnitude")],
                expected,
                checks.tolerance(self.dtype) + adapter.unseen.get(name or "", 0.0),  # of a tie, rounded either way
            )
        if adapter.spec.variant == "gated":
            checks.near("first gate", slot.site, adapter.tensors[slot.key("gate")], torch.ones(1), 0.0)

    def _computed(self, site: str) -> Tensor:
        magnitude, direction = (self.reference.base[f"{site}.{key}"].double() for key in ORIGINALS)
        return magnitude * direction / direction.norm(dim=1, keepdim=True)

    def delete(self, name: str) -> Call:
        self.handle.delete_adapter(name)
        yield
        reference = self.reference
        if len(reference.adapters) == 1:
            self._emptied()
            return
        del reference.adapters[name]
        reference.active = tuple(other for other in reference.active if other != name)

    def unload(self, dequantize: bool | None = None) -> Call:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.handle.unload(**({} if dequantize is None else {"dequantize": dequantize}))
        yield
        warned = [str(each.message) for each in told if re.search("stays? stored as", str(each.message))]
        if bool(warned) != (dequantize is None and bool(self.reference.stored)):
            raise DivergenceError("warning", f"unload(dequantize={dequantize}) says {warned}")
        self._emptied()
        if dequantize:
            self._made_dense()

    def _made_dense(self) -> None:
        """Takes over the bits of the dense values, which the reference knows up to rounding."""
        reference = self.reference
        dense = {name: reference.base[name].double() for name in reference.stored}
        reference.stored = {}
        self._take_weights(self.model.state_dict(), dense, reference.base)

    def _emptied(self) -> None:
        reference = self.reference
        reference.adapters, reference.active, reference.merged, reference.merged_weights = {}, (), (), {}

    def merge_and_unload(self, max_error: float = 0.1, dequantize: bool = False) -> Call:
        reference = self.reference
        acting = reference.active
        unmerged = tuple(name for name in acting if name not in reference.merged)
        expected = self._with_deltas(unmerged)
        in_place = {name: reference.value(name).clone() for name in reference.base}
        sites = {slot.site for name in acting for slot in reference.adapters[name].slots}
        computed = {f"{site}.weight": None for site in sorted(sites) if reference.is_computed(site)}
        weights = reference.effective(acting, {})
        merged_before = dict(reference.merged_weights)
        options = {"dequantize": True} if dequantize else {}
        self.handle.merge_and_unload(max_error=max_error, **options)
        yield
        found = self.model.state_dict()
        self._emptied()
        again = {
            name: expected.pop(name, value).double()
            for name, value in ({} if dequantize else merged_before | expected).items()
            if name in reference.stored
        }
        for name, value in again.items():
            self._store_again(name, value, max_error)
        reference.base = in_place | {name: reference.base[name] for name in again}
        if dequantize:
            expected |= {name: in_place[name].double() for name in reference.stored.keys() - expected.keys()}
            reference.stored = {}
        for weight in computed:
            if weight not in found:
                raise DivergenceError("state dict keys", f"{weight} is still computed")
            for part in ORIGINALS:
                del reference.base[f"{weight.removesuffix('.weight')}.{part}"]
            expected[weight] = weights[weight]
        reference.make_plain(computed)
        required = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        reference.requires_grad |= {name: required[name] for name in computed}
        self._take_weights(found, expected, reference.base)
        reference.read_structure(fresh(self.blocks, reference.base, reference.plain, {}))

    def _store_again(self, name: str, merged: Tensor, max_error: float) -> None:
        """A merged value that is stored again, which may lose what was allowed."""
        reference = self.reference
        before = reference.stored[name]
        after = self._stored(name, before.storage, merged, merged.to(self.dtype), exact=False)
        lost = float((after.dense().double() - merged).norm())
        update = float((merged - reference.base[name].double()).norm())
        if not lost <= max_error * update * 1.01 + checks.tolerance(self.dtype) * (1 + float(merged.norm())):
            raise DivergenceError("merge for good", f"{name} loses {lost:.3g} of an update of {update:.3g}")
        reference.store(name, after)

    # Acting

    def set(self, names: tuple[str, ...], trainable: bool = True, weights: tuple[float, ...] | None = None) -> Call:
        self.handle.set_adapter(names[0] if len(names) == 1 else list(names), weights=weights, trainable=trainable)
        yield
        self.reference.active, self.reference.trainable = names, trainable
        self.reference.weights = dict(zip(names, weights or (), strict=False))

    def merge(self, names: tuple[str, ...] | None, max_error: float = 0.1) -> Call:
        reference = self.reference
        chosen = tuple(name for name in reference.active if name not in reference.merged) if names is None else names
        known = [name for name in chosen if name in reference.adapters]
        expected = self._with_deltas(tuple(known))
        self.handle.merge_adapter(names, max_error=max_error)
        yield
        reference.merged = (*reference.merged, *chosen)
        self._take_weights(self.model.state_dict(), expected, reference.merged_weights)

    def _with_deltas(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Returns the weights with the updates of some adapters, in float64."""
        reference = self.reference
        deltas = reference.deltas(names, weighted=True)
        return {
            reference.first[name]: reference.value(reference.first[name]).double() + delta
            for name, delta in deltas.items()
            if name in reference.first
        }

    def _take_weights(self, found: dict[str, Tensor], expected: dict[str, Tensor], into: dict[str, Tensor]) -> None:
        """Compares merged weights, and takes over their bits."""
        reference = self.reference
        unmerged = tuple(name for name in reference.active if name not in reference.merged)
        acting = reference.deltas(unmerged, weighted=True) if unmerged else {}
        for name, weight in expected.items():
            stored = name in reference.stored
            tensor = self._read(name) if stored else found[name]
            if tensor.dtype != self.dtype:
                raise DivergenceError("type", f"merged {name} is {tensor.dtype}, expected {self.dtype}")
            wanted = weight + acting[name] if stored and name in acting else weight
            checks.near("merged weight", name, tensor, wanted, checks.tolerance(self.dtype, reference.magnified))
            into[name] = tensor.clone() if wanted is weight else weight.to(tensor.dtype)

    def _read(self, name: str) -> Tensor:
        """What a stored weight is with all that acts; where something is merged, the state dict has the base's."""
        layer, _, tensor = name.rpartition(".")
        return getattr(self.model.get_submodule(layer), tensor).detach()

    def unmerge(self) -> Call:
        self.handle.unmerge_adapter()
        yield
        self.reference.merged, self.reference.merged_weights = (), {}

    def disable(self) -> Call:
        context = self.handle.disable_adapter()
        context.__enter__()
        yield
        self.contexts.append(context)
        self.reference.contexts.append(None)

    def mixed(self, rows: tuple[str | None, ...]) -> Call:
        context = self.handle.mixed_batch(list(rows))
        context.__enter__()
        yield
        self.contexts.append(context)
        self.reference.contexts.append(rows)

    def close(self, failing: bool = False) -> Call:
        """Ends the innermost block, as its last line does or an exception inside of it."""
        if self.contexts:
            error = KeyError("of the block") if failing else None
            if self.contexts.pop().__exit__(error and KeyError, error, None):
                raise DivergenceError("block", "it swallows an exception")
        yield
        if self.reference.contexts:
            self.reference.contexts.pop()

    def mode(self, training: bool) -> Call:
        self.model.train(training)
        yield
        self.reference.training = training

    def broken_forward(self, module: str) -> Call:
        """A forward that is stopped in the middle, by a hook that raises."""
        handle = self.model.get_submodule(module).register_forward_hook(_stop)
        try:
            if not self.reference.moves():  # else statistics of what comes before have moved
                self.model(*self.inputs)
        except (KeyError, StateError):
            pass
        finally:
            handle.remove()
        yield

    def lay_out(self, channels_last: bool) -> Call:
        """Lays out what has four dimensions otherwise, with the same values."""
        self.model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        yield

    def cast(self, dtype: str, way: str = "data") -> Call:
        """Casts the model, but not a computed weight with merged updates, which has been rounded to its type."""
        sites = {slot.site for name in self.reference.merged for slot in self.reference.adapters[name].slots}
        if any(self.reference.is_computed(site) for site in sites):
            yield
            return
        with _converting(way):
            self.model.to(getattr(torch, dtype))
        self.objects = {} if way == "overwrite" else self.objects
        yield
        self.reference.cast(getattr(torch, dtype))
        self.snapshot = self.pending = None

    def look(self, spec: Spec) -> Call:
        """What reads only is allowed everywhere."""
        self.kind.plan(self.model, spec.config(), registry=registry())
        if self.reference.adapters:
            _ = self.handle.plans, self.handle.adapters, self.handle.active_adapters, self.handle.merged_adapters
        repr(self.model)
        yield

    # Training

    def scramble(self, name: str, seed: int) -> Call:
        """Gives an adapter random values, as training would in time; of what is in place only what it trains."""
        reference = self.reference
        generator = torch.Generator().manual_seed(seed)
        if name in reference.adapters and not reference.merged:
            adapter = reference.adapters[name]
            keys = {
                f"{slot.key(factor)}.{name}": slot.key(factor)
                for slot in adapter.slots
                for factor in reference.factors(adapter)
            }
            own = {key for key in adapter.trained if reference.owners().get(key) == name}
            named = dict(self.model.named_parameters())
            with torch.no_grad():
                for key in (*keys, *sorted(own)):
                    values = torch.randn(named[key].shape, generator=generator) * 0.5
                    named[key].copy_(values + (1 if "gate" in key or "magnitude" in key else 0))
                    target = adapter.tensors if key in keys else adapter.values
                    target[keys.get(key, key)] = named[key].detach().clone()
        yield

    def train_step(self) -> Call:
        """A step of SGD that moves nothing by more than a twentieth, so that nothing grows without bound."""
        reference = self.reference
        if reference.contexts or (reference.merged and reference.training):
            yield
            return
        dropped = checks.drops(reference)
        parameters = checks.trained(self.model)
        for parameter in parameters.values():
            parameter.grad = None
        _, loss = checks.forward(self.model, self.inputs)
        result = reference.run(*self.inputs, training=reference.training)
        checks.take_buffers(self.model, reference, result)
        if loss.requires_grad:
            loss.backward()
        found = {name: parameter.grad for name, parameter in parameters.items()}
        if not dropped:
            allowed = checks.tolerance(self.dtype, result.size)
            checks.compare_gradients(found, checks.expected_gradients(result, tuple(found)), allowed)
        largest = max((float(gradient.abs().max()) for gradient in found.values() if gradient is not None), default=0)
        lr = 0.05 / (1 + largest)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if parameters:
            torch.optim.SGD(parameters.values(), lr=lr).step()
        yield
        for name, value in before.items():
            gradient = found[name]
            self._assign(name, value if gradient is None else torch.add(value, gradient, alpha=-lr))
            parameters[name].grad = None

    def _assign(self, name: str, value: Tensor) -> None:
        """Gives a trained tensor of the reference its new bits."""
        key, _, adapter = name.rpartition(".")
        if "lora_" in key:
            self.reference.adapters[adapter].tensors[key] = value
        else:
            self.reference.set_value(name, value)

    def forward(self, of_input: bool = True) -> Call:
        """Goes forward and keeps the loss, for a `backward` in time.

        Without the gradient of the input fewer tensors are kept, whose change torch would notice.
        """
        reference = self.reference
        mixed = bool(reference.contexts) and not reference.disabled
        if mixed or (reference.merged and reference.training):
            yield
            return
        x = self.inputs[0].clone().requires_grad_(of_input)
        parameters = checks.trained(self.model) | ({"input": x} if of_input else {})
        outputs, loss = checks.forward(self.model, (x, self.inputs[1]))
        result = reference.run(*self.inputs, training=reference.training)
        checks.take_buffers(self.model, reference, result)
        checks.compare_outputs("output with gradients", outputs, result, self.dtype, checks.drops(reference))
        expected = checks.expected_gradients(result, tuple(parameters))
        yield
        allowed = checks.tolerance(self.dtype, result.size)
        self.pending = Pending(loss, parameters, expected, allowed, checks.drops(reference), not reference.contexts)

    def backward(self) -> Call:
        """Gradients of the state at the forward, or torch's error about a tensor that has changed."""
        pending, self.pending = self.pending, None
        yield
        if pending is None or not pending.loss.requires_grad:
            return
        for parameter in pending.parameters.values():
            parameter.grad = None
        try:
            pending.loss.backward()
        except RuntimeError as error:
            said = any(words in str(error) for words in REFUSED_BACKWARDS)
            if not said or self._is_as_at(pending):
                raise DivergenceError("backward raised", f"{type(error).__name__}: {error}") from error
            return
        found = {name: parameter.grad for name, parameter in pending.parameters.items()}
        for parameter in pending.parameters.values():
            parameter.grad = None
        try:
            checks.compare_gradients(found, pending.expected, pending.allowed, pending.dropped)
        except DivergenceError as divergence:
            raise DivergenceError(f"{divergence.check} after a change", divergence.detail) from divergence

    def _is_as_at(self, pending: Pending) -> bool:
        """Whether the backward has to be right: the state is that of the forward, except for blocks that have ended."""
        return not pending.changes - READS - (BLOCKS if pending.outside and not self.reference.contexts else set())

    # Files, state dicts and copies

    def combine(self, adapters: tuple[str, ...], weights: tuple[float, ...], name: str, way: str = "cat") -> Call:
        reference = self.reference
        found = self.handle.add_weighted_adapter(list(adapters), list(weights), name, way)
        yield
        exact: dict[str, Tensor] = {}
        for source, weight in zip(adapters, weights, strict=True):
            for target, delta in reference.deltas((source,)).items():
                exact[target] = exact.get(target, 0) + weight * delta
        config = self.handle.adapters[name]
        sources = [reference.adapters[adapter] for adapter in adapters]
        sites = {site for source in sources for site in source.spec.sites}
        parts = {site: part for source in sources for site, part in source.spec.parts.items()}
        spec = Spec(
            tuple(site for site in reference.sites if site in sites),
            bias=config.bias,
            saves=tuple(config.modules_to_save),
            parts=parts,
            norm=config.norm,
        )
        adapter = reference.plan(spec)
        adapter.slots = tuple(replace(slot, scaling=1.0) for slot in adapter.slots)
        self._read_factors(name, adapter)
        self._combined_values(adapter, sources, weights)
        self._join(name, adapter)
        self._compare_sum(name, exact, found, way)

    def _combined_values(self, adapter: Adapter, sources: list[Adapter], weights: tuple[float, ...]) -> None:
        for key in (*adapter.trained, *adapter.buffers):
            base = self.reference.base[key]
            owned = [
                (source.values[key], w) for source, w in zip(sources, weights, strict=True) if key in source.values
            ]
            if not base.is_floating_point():
                adapter.values[key] = (owned[0][0] if owned else base).clone()
                continue
            total = base.double() + sum(w * (value.double() - base.double()) for value, w in owned)
            adapter.values[key] = total.to(base.dtype)
            adapter.unseen[key] = 0.0

    def _compare_sum(self, name: str, exact: dict[str, Tensor], error: float, way: str) -> None:
        deltas = self.reference.deltas((name,))
        for target in exact.keys() | deltas.keys():
            some = next(value for value in (exact.get(target), deltas.get(target)) if value is not None)
            want, got = exact.get(target, torch.zeros_like(some)), deltas.get(target, torch.zeros_like(some))
            off = float((want - got).norm() / max(float(want.norm()), 1e-9)) if bool((want - got).any()) else 0.0
            # A and B are float32 where the model has half precision.
            bound = error * 1.001 + checks.tolerance(torch.promote_types(self.dtype, torch.float32))
            if not (off <= bound or float((want - got).norm()) <= bound):
                raise DivergenceError("combination", f"{way} of {target} is off by {off:.3g}, told was {error:.3g}")

    def save(self, slot: int, name: str | None) -> Call:
        self.handle.save_adapter(self.folder / str(slot), name)
        yield
        reference = self.reference
        name = reference.active[0] if name is None else name
        base = {key: cast(tensor, reference.dtype).clone() for key, tensor in reference.sources().items()}
        stored = dict(reference.stored)
        self.saved[slot] = Saved(
            name, deepcopy(reference.adapters[name]), base, reference.plain, stored, reference.was_cast
        )

    def load(self, slot: int, name: str | None) -> Call:
        found = self.saved[slot]
        handle = self.kind.load_adapter(self.model, self.folder / str(slot), name, registry=registry())
        yield
        self.lora = self.lora or handle
        self._store_loaded(found)
        adapter = deepcopy(found.adapter).cast(self.dtype)
        if adapter.changes_base and found.dtype != self.dtype:
            # What an init left of a wider base is the same once it is rounded as it was when the file was made.
            adapter.unseen |= dict.fromkeys(adapter.values, checks.tolerance(found.dtype))
        self._join(found.name if name is None else name, adapter)

    def swap(self, slot: int, name: str) -> Call:
        """Gives an adapter the values of a saved one, in the shapes that are there."""
        found = self.saved[slot]
        self.handle.swap_adapter(name, self.folder / str(slot))
        yield
        own, other = self.reference.adapters[name], deepcopy(found.adapter).cast(self.dtype)
        given = {(place.site, place.suffix): place for place in other.slots}
        for place in own.slots:
            for factor in self.reference.factors(own):
                own.tensors[place.key(factor)] = torch.zeros_like(own.tensors[place.key(factor)])
            if source := given.get((place.site, place.suffix)):
                self._swap_in(own, place, found.adapter, source)
        own.values, own.unseen = other.values, other.unseen

    def _swap_in(self, own: Adapter, place: PlannedSlot, other: Adapter, source: PlannedSlot) -> None:
        """A smaller rank is filled up with zeros, and another scaling goes into B, which is rounded once."""
        for factor in self.reference.factors(own):
            value, into = other.tensors[source.key(factor)].double(), own.tensors[place.key(factor)]
            if factor == "B":
                into[:, : value.shape[1]] = value * (source.scaling / place.scaling)
            else:
                into[: len(value)] = value

    def _store_loaded(self, found: Saved) -> None:
        """A file stores the base again, to the same bits."""
        reference = self.reference
        for name, there in found.stored.items():
            if name not in reference.stored:
                here = self._stored(name, there.storage, there.dense().double(), reference.base[name], there.exact)
                here = replace(here, residual=there.residual)
                if not here.same_bits(there):
                    raise DivergenceError("stored bits", f"{name} is not what the file was saved on")
                reference.store(name, here)

    def move(self, slot: int) -> Call:
        """Loads a saved adapter onto a new model with the base that it was saved on, and goes on with that."""
        found = self.saved[slot]
        self.close_all()
        self.reference.contexts.clear()
        model = fresh(self.blocks, found.base, found.plain, self.reference.requires_grad)
        model.train(self.reference.training)
        lora = self.kind.load_adapter(model, self.folder / str(slot), registry=registry())
        yield
        training = self.reference.training
        self.model, self.lora, self.snapshot, self.objects = model, lora, None, {}
        plain = fresh(self.blocks, found.base, found.plain, self.reference.requires_grad)
        self.reference = Reference(plain, self.blocks, found.plain)
        self.reference.training = training
        self._store_loaded(found)
        self._join(found.name, deepcopy(found.adapter).cast(self.dtype))

    def load_base(self, seed: int | None, assign: bool = False) -> Call:
        """Loads a state dict of the base model: its own, or that of another one."""
        reference = self.reference
        if seed is None:
            base = {name: tensor.clone() for name, tensor in reference.base.items()}
        else:
            shaped = {name: torch.zeros_like(tensor) for name, tensor in reference.base.items()}
            other = fresh(self.blocks, shaped, reference.plain, {})
            source = build(self.blocks, self.dtype, seed).state_dict()
            with torch.no_grad():
                for name, tensor in other.state_dict().items():
                    tensor.copy_(source[name] if name in source else torch.full_like(tensor, 0.1))
            base = {reference.first[name]: tensor.clone() for name, tensor in other.state_dict().items()}
        base |= {name: reference.base[name] for name in reference.stored}
        here = self.model.state_dict()
        stored = {key: here[key] for key in here if "_stored." in key}
        dense = {name: base[first] for name, first in reference.first.items() if first not in reference.stored}
        self._load(dense | stored, assign)
        yield
        for adapter in reference.adapters.values():
            for key, value in adapter.values.items():
                if torch.equal(value.to(reference.base[key].dtype), reference.base[key]):  # it has not been trained
                    adapter.values[key] = base[key].to(value.dtype)
        reference.base = base

    def _load(self, tensors: dict[str, Tensor], assign: bool) -> None:
        """Loads a state dict, or copies of its tensors in place of the model's own, which are others then."""
        given = {name: tensor.clone() for name, tensor in tensors.items()} if assign else tensors
        self.model.load_state_dict(given, assign=assign)
        self.objects = {} if assign else self.objects

    def snap(self) -> Call:
        """Keeps the model's own state dict."""
        yield
        if not self.reference.contexts and not self.reference.merged:
            tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            self.snapshot = tensors, self.reference.copy(), self._structure()

    def _structure(self) -> object:
        reference = self.reference
        adapters = [(name, id(adapter)) for name, adapter in reference.adapters.items()]
        return adapters, reference.active, reference.plain, sorted(reference.stored)

    def load_own(self, assign: bool = False) -> Call:
        """Loads the state dict that was kept, if the model has the same adapters, and the same active ones."""
        if self.snapshot is None or self.snapshot[2] != self._structure():
            self.snap()
            tensors, then = dict(self.model.state_dict()), None
        else:
            tensors, then, _ = self.snapshot
        self._load(tensors, assign)
        yield
        if then is None:
            return
        self.reference.stored = dict(then.stored)
        for name in self.reference.base:
            self.reference.set_value(name, then.value(name).clone())
        for name, adapter in self.reference.adapters.items():
            adapter.tensors = {key: tensor.clone() for key, tensor in then.adapters[name].tensors.items()}

    def copy(self, way: str, keep: str) -> Call:
        """Copies the model; refused inside of a context."""
        reference = self.reference
        if "computed" in self.blocks:
            way = "deepcopy"  # torch pickles neither parametrizations nor the hook that weight norm leaves behind
        model = deepcopy(self.model) if way == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        lora = self.kind(model, registry=registry()) if reference.adapters else None
        yield
        other = reference.copy()
        checks.check(model, lora, other, self.inputs)
        if keep == "original":
            with torch.no_grad():
                for tensor in model.state_dict().values():
                    tensor.zero_()  # nothing of it may be the original's
            return
        # The pending forward and the kept state dict are those of the model that was left.
        self.model, self.lora, self.reference, self.snapshot, self.objects = model, lora, other, None, {}


def _stop(module: nn.Module, inputs: Any, output: Any) -> None:
    raise KeyError("of a hook")


@contextmanager
def _converting(way: str) -> Iterator[None]:
    """Lets torch convert parameters in one of its ways: their `data`, by `swap_tensors`, or by new parameters."""
    flags = {"swap": "swap_module_params", "overwrite": "overwrite_module_params"}
    switch = getattr(torch.__future__, f"set_{flags[way]}_on_conversion") if way in flags else lambda _: None
    switch(True)
    try:
        yield
    finally:
        switch(False)


@contextmanager
def opened(
    blocks: tuple[str, ...], dtype: torch.dtype, seed: int, kind: type[LoraModel] = LoraModel
) -> Iterator[Machine]:
    """A machine with a folder of its own, for a `with` block, at whose end all contexts are left."""
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(blocks, dtype, seed, Path(folder), kind)
        try:
            yield machine
        finally:
            machine.close_all()
