"""The checks, the same for every library."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from benchmarks.exactness.cases import Case, fresh, loss, outputs
from benchmarks.exactness.compare import Snapshot, difference, relative_error, residue, snapshot
from benchmarks.exactness.reference import (
    Update,
    expected_layers,
    factor_gradients,
    overwrite,
    weights_of,
)

TOLERANCE = 1e-9
"""Relative difference allowed between two ways to the same output in float64."""

GRADIENT_TOLERANCE = 1e-6
"""Relative difference allowed in a gradient: sums over a deep network cancel, so some digits more are lost."""

NEGLIGIBLE = 1e-15
"""A weight whose gradient is below this share of the largest one of its model is taken as unused."""

CHECKS: Mapping[str, str] = {
    "forward": "the adapted model runs, its output is not the base's, and every layer has an adapter",
    "law": "its output is that of a fresh model whose weights were overwritten by W + scaling * B * A",
    "gradients": "every A and B gets the gradient that the chain rule gives from that model, and not zero",
    "merged": "merging keeps the output",
    "unmerged": "merging, unmerging and unloading give the base back, bit for bit",
    "loaded": "saving and loading on a fresh base give the same output",
    "unloaded": "unloading gives the base back: every bit of its state dict, every class, and its output",
    "residue": "it leaves nothing else behind: order of the state dict, modes, hooks, which parameters are trained",
    "folded": "merging for good keeps the output",
}
"""The checks in order, and what each of them says."""


class Adapted(Protocol):
    """A model that a library has adapted."""

    @property
    def model(self) -> nn.Module:
        """The user's own model, to be run."""

    def updates(self) -> Sequence[Update]:
        """Returns all updates, with A and B the very parameters that are trained."""

    def merge(self) -> None:
        """Merges, to be undone."""

    def unmerge(self) -> None:
        """Undoes `merge`."""

    def unload(self) -> nn.Module:
        """Removes the adapter and returns the model."""

    def fold(self) -> nn.Module:
        """Merges for good and returns the model."""

    def save(self, folder: Path) -> None:
        """Writes the adapter."""


class Library(Protocol):
    """A LoRA library."""

    name: ClassVar[str]
    skipped: ClassVar[Mapping[str, str]]
    """Checks that the library is not held to, with the reason."""

    def prepare(self, model: nn.Module) -> None:
        """Gives a fresh model the values that the base of an adapted one has, where the library rounds them."""

    def adapts(self, layer: nn.Module) -> bool:
        """Whether the library says that it adapts layers of this class."""

    def adapt(self, model: nn.Module) -> Adapted:
        """Puts random adapters of rank 2 on all such layers."""

    def load(self, model: nn.Module, folder: Path) -> Adapted:
        """Puts a saved adapter on a model."""


@dataclass
class Result:
    """What the sweep found for one model and one library.

    Args:
        suite: Suite of the case.
        name: Name of the case.
        library: Name of the library.
        layers: The number of adapted layers.
        failures: The reason by check; a check that is not here passed.
        unused: Weights that get no gradient in the untouched model either.
        left_out: Layers whose class the library does not adapt.
        bare: Parameters of two or more dimensions that belong to no layer, such as position embeddings.
        errors: The largest relative difference by check.
        seconds: Time of the whole case.
    """

    suite: str
    name: str
    library: str
    layers: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Returns plain types."""
        return asdict(self)


class CheckFailedError(Exception):
    """A check whose outcome is wrong; its text says how."""


def check(case: Case, library: Library) -> Result:
    """Runs all checks of one case.

    A model that does not run untouched raises its own error: the case is wrong then, not the library. What a library
    raises is a failure of the check it was raised in.
    """
    started = time.perf_counter()
    result = Result(case.suite, case.name, library.name)
    model = _base(case, library)
    base = _base_outputs(case, model)
    before = snapshot(model)
    result.bare = _bare(model)
    result.left_out = [name for name, layer in expected_layers(model) if not library.adapts(layer)]
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(case, library, result, before, base, Path(folder))
        run.all(model)
    result.seconds = round(time.perf_counter() - started, 2)
    return result


@dataclass
class _Run:
    """The checks of one case, in order; later ones use what earlier ones computed."""

    case: Case
    library: Library
    result: Result
    before: Snapshot
    base: list[Tensor]
    folder: Path

    def all(self, model: nn.Module) -> None:
        """Runs every check; those after a failed adaptation or forward have nothing to check."""
        self._adapt(model)
        if "forward" not in self.result.failures:
            self._load()

    def _adapt(self, model: nn.Module) -> None:
        """Runs the checks of an adapter on the model, and saves it."""
        with self._checking("forward"):
            covered = self._weights(model)
            adapted = self.library.adapt(model)
            self._saw(adapted)
            output = outputs(self.case, adapted.model)
            self._refuse_missing(adapted, covered)
            if relative_error(output, self.base) < TOLERANCE:
                raise CheckFailedError("the adapters have no effect on the output")
        if self.result.failures:
            return
        self.output = [tensor.detach() for tensor in output]
        self._gradients(adapted, output)
        del output
        with self._checking("merged"):
            adapted.model.requires_grad_(False)
            adapted.save(self.folder)
            adapted.merge()
            self._same("merged", adapted.model)
        with self._checking("unmerged"):
            adapted.unmerge()
            self._restored(self.before, adapted.unload())

    def _load(self) -> None:
        """Runs the checks of the saved adapter on fresh models."""
        again = _base(self.case, self.library)
        with torch.no_grad():
            outputs(self.case, again)  # some models add hooks to themselves at their first call
        before = snapshot(again)  # of its own: each parametrized layer has its own class
        with self._checking("loaded"):
            loaded = self.library.load(again, self.folder)
            self._same("loaded", loaded.model)
        if "loaded" in self.result.failures:
            return
        with self._checking("unloaded"):
            unloaded = loaded.unload()
            self._restored(before, unloaded)
        with self._checking("residue"):
            if text := residue(before, snapshot(unloaded)):
                raise CheckFailedError(text)
        with self._checking("folded"):
            self._same("folded", self.library.load(_base(self.case, self.library), self.folder).fold())

    @contextmanager
    def _checking(self, name: str) -> Iterator[None]:
        """Turns what goes wrong in the block into a failure of the check."""
        try:
            yield
        except Exception as error:
            if name not in self.library.skipped:
                text = str(error) if isinstance(error, CheckFailedError) else f"{type(error).__name__}: {error}"
                self.result.failures[name] = " ".join(text.split())[:400]

    def _saw(self, adapted: Adapted) -> None:
        self.result.layers = len({update.layer for update in adapted.updates()})

    def _weights(self, model: nn.Module) -> dict[str, tuple[int | None, str]]:
        """The weights that have to be adapted: full name, with the identity of the parameter."""
        return {
            f"{name}.{tensor}".removeprefix("."): (id(layer._parameters.get(tensor)), name)
            for name, layer in expected_layers(model)
            if self.library.adapts(layer)
            for tensor in weights_of(layer)
        }

    def _refuse_missing(self, adapted: Adapted, wanted: Mapping[str, tuple[int | None, str]]) -> None:
        """A weight counts as adapted under any of the names of its tensor."""
        found = {update.name for update in adapted.updates()}
        identities = {wanted[name][0] for name in found if name in wanted}
        missing = [name for name, (identity, _) in wanted.items() if name not in found and identity not in identities]
        if missing:
            raise CheckFailedError(f"{len(missing)} weights have no adapter: {_some(missing)}")

    def _gradients(self, adapted: Adapted, output: list[Tensor]) -> None:
        """Runs the checks of law and gradients, which share the reference model."""
        updates = list(adapted.updates())
        reference = _base(self.case, self.library)
        with self._checking("law"):
            weights = overwrite(reference, updates)
            expected = outputs(self.case, reference)
            self._close("law", output, expected)
        if "law" in self.result.failures and "law" not in self.result.errors:
            return
        with self._checking("gradients"):
            loss(expected).backward()
            loss(output).backward()
            self._compare_gradients(reference, updates, weights)

    def _compare_gradients(
        self, reference: nn.Module, updates: Sequence[Update], weights: Mapping[str, nn.Parameter]
    ) -> None:
        norms = {name: 0.0 if w.grad is None else float(w.grad.to_dense().norm()) for name, w in weights.items()}
        floor = NEGLIGIBLE * max(norms.values())
        self.result.unused = [name for name, norm in norms.items() if norm <= floor]
        zero: list[str] = []
        errors: dict[str, float] = {}
        for update in updates:
            gradient = weights[update.name].grad
            if norms[update.name] <= floor or gradient is None:
                continue
            expected = factor_gradients(reference.get_submodule(update.layer), update, gradient)
            for factor, parameter, value in zip("AB", (update.A, update.B), expected, strict=True):
                if parameter.grad is None or not parameter.grad.to_dense().any():
                    zero.append(f"{update.name} ({factor})")
                    continue
                error = (parameter.grad.to_dense().flatten(1) - value).norm() / value.norm()
                errors[f"{update.name} ({factor})"] = float(error.nan_to_num(nan=torch.inf))
        where = max(errors, key=errors.__getitem__, default="")
        worst = self.result.errors["gradients"] = errors.get(where, 0.0)
        if zero:
            raise CheckFailedError(f"{len(zero)} tensors get no gradient: {_some(zero)}")
        if worst > GRADIENT_TOLERANCE:
            raise CheckFailedError(f"the gradient of {where} is off by {worst:.1e}")

    def _same(self, name: str, model: nn.Module) -> None:
        with torch.no_grad():
            self._close(name, outputs(self.case, model), self.output)

    def _close(self, name: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        error = relative_error(found, expected)
        self.result.errors[name] = error
        if not error <= TOLERANCE:
            raise CheckFailedError(f"the output is off by {error:.1e}")

    def _restored(self, before: Snapshot, model: nn.Module) -> None:
        if text := difference(before, snapshot(model)):
            raise CheckFailedError(text)
        with torch.no_grad():
            error = relative_error(outputs(self.case, model), self.base)
        if not error <= TOLERANCE:
            raise CheckFailedError(f"the state is the same, but the output is off by {error:.1e}")


def _base(case: Case, library: Library) -> nn.Module:
    model = fresh(case)
    library.prepare(model)
    return model


def _base_outputs(case: Case, model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        base = outputs(case, model)
        again = outputs(case, model)
    if not base or not all(bool(torch.isfinite(tensor).any()) for tensor in base if tensor.numel()):
        raise ValueError(f"{case.name}: the untouched model returns nothing finite.")
    if relative_error(again, base):
        raise ValueError(f"{case.name}: the untouched model returns something else each time.")
    return base


def _bare(model: nn.Module) -> list[str]:
    # The weight of a parametrized layer belongs to a child.
    owned = {id(parameter) for _, layer in expected_layers(model) for parameter in layer.parameters()}
    return [name for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in owned]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
