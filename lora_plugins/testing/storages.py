"""The conformance kit for storages of weights."""

import copy
import pickle
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins.config import LoraConfig
from lora_plugins.devices import usable_device
from lora_plugins.model import LoraModel
from lora_plugins.plugins import STORAGES, StoragePlugin, storage_options
from lora_plugins.testing.check import Check, as_check, by_name, chosen, elsewhere, one_of, run
from lora_plugins.testing.registry_under_test import registry_with
from lora_plugins.testing.required import (
    CPU,
    MODES,
    Named,
    double_by_default,
    random_states,
    require,
    require_close,
    require_same_state,
    require_unmoved,
)
from lora_plugins.utils import own_randomness

SHAPES = ((64, 96), (48, 48), (5, 3), (7, 5, 3, 3), (1, 1), (300,), (300, 301))
"""Shapes of weights: those of linear layers, square ones too, and kernels, with sizes that no block divides.

The last one has more than 256 blocks of the usual sizes, and so many values that torch adds them up in threads.
"""

_ROUNDED = 1e-2
"""By how much what two devices make of the same codes may differ, computed in half precision too."""


@dataclass(frozen=True)
class StorageCase:
    """What is checked: a storage with options.

    Args:
        plugin: The storage that stores.
        elsewhere: The storage that makes dense, as another process has it: it has not seen what was stored.
        given: The options that it is given.
        device: Where it is checked.
    """

    plugin: StoragePlugin
    elsewhere: StoragePlugin
    given: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = CPU

    @property
    def options(self) -> Mapping[str, Any]:
        """All its options."""
        return storage_options(self.plugin, self.given)

    def weights(self) -> Iterator[Tensor]:
        """Yields weights of several shapes, around zero and far from it, the same each time."""
        for seed, (shape, (mean, deviation)) in enumerate(product(SHAPES, ((0, 1), (3, 0.1)))):
            with own_randomness(seed):
                yield (mean + deviation * torch.randn(shape, dtype=torch.float32)).to(self.device)

    def scaled(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the first weight small, large, and with rows that grow, by what it is."""
        weight = next(self.weights())
        yield "of small values", weight * 1e-5
        yield "of large values", weight * 1e4
        yield (
            "whose rows grow",
            weight * torch.logspace(-3, 0, len(weight), dtype=weight.dtype, device=self.device)[:, None],
        )

    def store(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns what is stored of a weight."""
        return Named("store() gives", self.plugin.store(weight, self.options))

    def restore(self, stored: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
        """Returns the dense weight of that shape."""
        return self.elsewhere.restore(stored, shape, self.options)

    def rows(self, stored: Mapping[str, Tensor], index: Tensor, shape: torch.Size) -> Tensor:
        """Returns rows of the dense weight of that shape."""
        return self.elsewhere.rows(stored, index, shape, self.options)

    def model(self) -> nn.Sequential:
        """Builds a model of one adapted layer, whose weight is stored; the same each time."""
        with own_randomness(0):
            model = nn.Sequential(nn.Linear(48, 64, dtype=torch.float32)).to(self.device)
        options = {**self.given, "min_size": 0}
        config = LoraConfig(r=2, quantize=self.plugin.name, quantize_options=options, init="none")
        LoraModel(model, config, registry=registry_with(STORAGES, self.plugin))
        return model

    def batch(self) -> Tensor:
        """Returns what the model is called with, the same each time."""
        with own_randomness(1):
            return torch.randn(3, 48, dtype=torch.float32).to(self.device)


@as_check(
    "registration",
    "the registrar takes the plugin, and the plugin its options",
    "name is missing, or options has min_size, which all storages have.",
)
def _registration(case: StorageCase) -> None:
    registry_with(STORAGES, case.plugin)
    _ = case.options


@as_check(
    "names",
    "what is stored has names that a module's attributes can have, and one of the tensors holds integers",
    "a tensor is called as something that every module has; or the codes are floating numbers.",
)
def _names(case: StorageCase) -> None:
    for weight in case.weights():
        stored = case.store(weight)
        wrong = [name for name in stored if not name.isidentifier() or hasattr(nn.Module(), name)]
        require(not wrong, f"tensors are called {wrong}, which modules have in another meaning")
        whole = [name for name, tensor in stored.items() if not tensor.dtype.is_floating_point]
        require(bool(whole), f"all of {list(stored)} are of floating types")


@as_check(
    "dense",
    "restore gives float32 in the shape of the weight, off by less than half of its norm, of what is stored alone",
    "sizes that the blocks do not divide are cut or filled at the wrong end; values have no scale of their own, or "
    "that of other rows; store writes into the weight; or the plugin object keeps something.",
)
def _dense(case: StorageCase) -> None:
    shapes = ((f"of shape {tuple(weight.shape)}", weight) for weight in case.weights())
    for what, weight in (*shapes, *case.scaled()):
        dense = case.restore(case.store(weight), weight.shape)
        require_close("the type and shape of the dense weight", torch.zeros_like(dense), torch.zeros_like(weight))
        error = float(torch.linalg.vector_norm(dense - weight) / torch.linalg.vector_norm(weight))
        require(error < 0.5, f"the dense weight {what} is off by {error:.0%}")


@as_check("zeros", "zeros stay zeros", "a block is divided by its largest value, which is zero.")
def _zeros(case: StorageCase) -> None:
    weight = torch.zeros(8, 96, dtype=torch.float32, device=case.device)
    require_close("the dense weight of zeros", case.restore(case.store(weight), weight.shape), weight, 0)


@as_check(
    "outliers",
    "a weight with one large value stays finite",
    "a scale is stored in half precision, which ends at 65504.",
)
def _outliers(case: StorageCase) -> None:
    for weight in case.weights():
        weight.view(-1)[0] = 1e5
        dense = case.restore(case.store(weight), weight.shape)
        require(bool(dense.isfinite().all()), "a weight with a large value becomes one that is not finite")


@as_check(
    "bits",
    "the same weight gives the same bits each time, after whatever weights were stored before, with any number of "
    "threads, any default type of torch and no random numbers",
    "a mean over many values, whose order of summation depends on the machine; a table that the plugin object "
    "learns from the weights that it sees; or a tensor that is made without its dtype.",
)
def _bits(case: StorageCase) -> None:
    others = [case.elsewhere.store(weight, case.options) for weight in reversed([*case.weights()])]
    threads = torch.get_num_threads()
    for weight, other in zip(case.weights(), reversed(others), strict=True):
        stored = case.store(weight)
        require_same_state("what is stored elsewhere, after other weights,", other, stored)
        try:
            torch.set_num_threads(threads % 2 + 1)
            require_same_state("what is stored with another number of threads", case.store(weight), stored)
        finally:
            torch.set_num_threads(threads)
        dense = case.restore(stored, weight.shape)
        with double_by_default():
            require_same_state("what is stored where float64 is the default", case.store(weight), stored)
        for name, context in {**MODES, " where float64 is the default": double_by_default}.items():
            with context():
                require_close(f"the dense weight, made again{name},", case.restore(stored, weight.shape), dense, 0)
    before = random_states()
    case.store(torch.ones(64, 64, dtype=torch.float32, device=case.device))
    require_unmoved(before)


@as_check(
    "untouched",
    "neither the weight nor what is stored nor the options are changed, and the first two share no memory",
    "a view of the weight is stored, restore scales what is stored in place, or store writes into its options.",
)
def _untouched(case: StorageCase) -> None:
    options = case.options  # once, as a model has them: the case makes them anew each time
    given = copy.deepcopy(dict(options))
    for weight in case.weights():
        before = weight.clone()
        stored = case.plugin.store(weight, options)
        copies = {name: tensor.clone() for name, tensor in stored.items()}
        case.elsewhere.restore(stored, weight.shape, options).zero_()
        require_close("the weight after it was stored", weight, before, 0)
        require_same_state("what is stored, after the dense weight was written to", stored, copies)
        weight.zero_()
        require_same_state("what is stored, after the weight was written to", stored, copies)
    require(dict(options) == given, f"the options were {given} and are {dict(options)}")


@as_check(
    "stateless",
    "restore and rows compute from what is stored as it is now, whatever lay in its memory before and whatever other "
    "weights were stored since",
    "a dense weight is kept between calls; or store keeps a scale or a shape in the plugin's class or module.",
)
def _stateless(case: StorageCase) -> None:
    kept = []
    for weight in case.weights():
        stored = case.store(weight)
        kept.append((weight.shape, stored, case.restore(stored, weight.shape)))
    for shape, stored, dense in kept:
        again = case.restore(stored, shape)
        require_close(f"a weight of shape {tuple(shape)}, made dense after others were stored,", again, dense, 0)
    for weight in case.weights():
        stored, other = case.store(weight), case.store(weight.flip(0) - weight)
        if any(stored[name].shape != tensor.shape for name, tensor in other.items()):
            continue  # how much is stored depends on the values
        index = torch.arange(len(weight), device=case.device)
        expected = case.restore(other, weight.shape)
        _made_dense(case, stored, index, weight.shape)
        for name, tensor in other.items():
            stored[name].data.copy_(tensor)  # as another weight's that lies in the same memory, of the same version
        for what, dense in _made_dense(case, stored, index, weight.shape).items():
            require_close(
                f"{what} of a weight of shape {tuple(weight.shape)}, after its codes changed,", dense, expected, 0
            )


def _made_dense(case: StorageCase, stored: Mapping[str, Tensor], index: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    """Returns the dense weight as it is made by each method."""
    return {"restore": case.restore(stored, shape), "rows": case.rows(stored, index, shape)}


@as_check(
    "rows",
    "rows gives the rows of what restore gives, bit for bit, for any shape of indices",
    "the columns of a row are counted in the first dimension only, where a kernel has several.",
)
def _rows(case: StorageCase) -> None:
    for weight in case.weights():
        stored = case.store(weight)
        dense = case.restore(stored, weight.shape)
        for each in (torch.tensor([0]), torch.arange(len(weight)).flip(0)[:, None], torch.zeros(2, 3).int()):
            index = each.to(case.device)
            rows = case.rows(stored, index, weight.shape)
            require_close(f"rows of the dense weight of shape {tuple(weight.shape)}", rows, dense[index], 0)


@as_check(
    "device",
    "what is made is where the weight is, or what is stored of it",
    "torch.arange(16) where torch.arange(16, device=codes.device) is meant; or the plugin object keeps a table "
    "that it made for another device, as in TABLE[codes] where TABLE.to(codes.device)[codes] is meant.",
)
def _device(case: StorageCase) -> None:
    for weight in case.weights():
        index = torch.arange(len(weight), device=case.device)
        stored = case.store(weight)
        expected = _made_dense(case, stored, index, weight.shape)
        # A tensor that is made without saying where lands on the default device, which is none here.
        with torch.device("meta"):
            again, got = case.store(weight), _made_dense(case, stored, index, weight.shape)
        require_same_state("what is stored with another default device", again, stored)
        for what, dense in got.items():
            require_close(f"{what} with another default device", dense, expected[what], 0)
        for place in {CPU, case.device}:  # what is stored goes with a model that is moved
            moved = {name: tensor.to(place) for name, tensor in stored.items()}
            for what, dense in _made_dense(case, moved, index.to(place), weight.shape).items():
                require_close(f"{what} after a move to {place}", dense, expected[what].to(place), _ROUNDED)
        for what, dense in _made_nowhere(case, stored, index, weight.shape).items():
            require(dense.is_meta, f"{what} gives a tensor on {dense.device} of stored ones on another device")


def _made_nowhere(
    case: StorageCase, stored: Mapping[str, Tensor], index: Tensor, shape: torch.Size
) -> dict[str, Tensor]:
    """Returns what is made without values, where no table of the CPU goes; nothing if that takes one, as by item()."""
    try:
        return _made_dense(case, {name: tensor.to("meta") for name, tensor in stored.items()}, index.to("meta"), shape)
    except RuntimeError as error:
        if "meta tensor" in str(error):
            return {}
        raise


@as_check(
    "size", "a weight takes at most half of its bytes in float32", "codes of 4 bits lie in a byte each, or in int64."
)
def _size(case: StorageCase) -> None:
    weight = torch.randn(256, 256, dtype=torch.float32).to(case.device)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in case.store(weight).values())
    require(stored <= 2 * weight.numel(), f"{weight.numel()} values take {stored} bytes")


@as_check(
    "copies",
    "a deep copy and a pickled copy of a model with stored weights compute the same",
    "the plugin's class is defined inside a function, or the plugin object holds a lambda, a lock or a file.",
)
def _copies(case: StorageCase) -> None:
    model, x = case.model(), case.batch()
    for what, twin in (("deep copy", copy.deepcopy(model)), ("pickled copy", pickle.loads(pickle.dumps(model)))):
        require_close(f"the output of a {what} of a model", twin(x), model(x), 0)


@as_check(
    "compile",
    "torch.compile(fullgraph=True) compiles a layer whose weight is stored",
    "restore decides by the value of a tensor (.item(), if scales.max() > 0).",
)
def _compile(case: StorageCase) -> None:
    model, x = case.model(), case.batch()
    try:
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        require_close("the output of a compiled model", compiled(x), model(x), _ROUNDED)
    finally:
        torch.compiler.reset()


_CHECKS: tuple[Check[StorageCase], ...] = (
    _registration,
    _names,
    _dense,
    _zeros,
    _outliers,
    _bits,
    _untouched,
    _stateless,
    _rows,
    _device,
    _size,
    _copies,
    _compile,
)

STORAGE_CHECKS: dict[str, Check[StorageCase]] = by_name(_CHECKS)
"""All checks of a storage by name, in the order they are run."""


def check_storage_plugin(
    plugin: StoragePlugin,
    *,
    options: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
    device: str | torch.device = "cpu",
) -> None:
    """Checks a storage on weights of several shapes; it need not be registered or installed.

    Args:
        plugin: The storage.
        options: The options that it is given.
        only: Names of the checks to run; all of `STORAGE_CHECKS` by default.
        skip: Names of checks not to run.
        device: Where it is checked, such as "cuda".

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check of a name, the options are no mapping, or torch cannot use the device here.
    """
    case = StorageCase(plugin, elsewhere(plugin), one_of(options), usable_device(device))
    for check in chosen(STORAGE_CHECKS, only, skip):
        run(check, case, f"{type(plugin).__name__} with {dict(case.given)}")
