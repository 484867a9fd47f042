"""What a Lightning checkpoint of an adapted module holds, and how it goes back onto the base.

The file is Lightning's own, with two differences: its state dicts leave out the frozen base, and the entry
`lora_plugins` says what was left out and how to rebuild the adapters, in plain types and tensors:

    {"format": 1, "left_out": [keys], "adapters": [{"target", "active", "manifest", "tensors"}, ...]}

`tensors` holds what the manifest lists and the state dict does not have: heads of inactive adapters, for example.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_plugins import AdapterFileError, LoraError, LoraModel
from lora_plugins.adapter.attach import adapter_tensors
from lora_plugins.adapter.state import ModelState, model_state
from lora_plugins.errors import listing
from lora_plugins.files.fingerprint import same
from lora_plugins.files.folder import PackedAdapter
from lora_plugins.inplace.modules import model_modules, own_tensors
from lora_plugins.integrations.lightning.module.compiled_names import names_in, plain_name, renamed

KEY = "lora_plugins"
"""Key of our entry in a checkpoint."""

FORMAT = 1
"""Version of that entry which this release writes, and the newest that it reads."""

StateDict = dict[str, Any]


def adapted_targets(module: nn.Module) -> dict[str, nn.Module]:
    """Returns the modules below (and including) `module` that carry adapters, by path."""
    return {name: child for name, child in module.named_modules() if model_state(child) is not None}


def shrink(checkpoint: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Returns a checkpoint without the frozen base, and with what is needed to rebuild the adapters.

    Args:
        checkpoint: What Lightning would write; it is not changed.
        module: The module it was made from. Without adapters, merged ones for example, everything stays.

    Raises:
        StateError: If an adapter was merged by hand and not unmerged.
    """
    targets = adapted_targets(module)
    if not targets:
        return dict(checkpoint)
    frozen = frozen_keys(module)
    named = {plain_name(key) for key in frozen}
    left_out = [key for key in map(plain_name, checkpoint.get("state_dict", {})) if key in named]
    small = _map_state_dicts(
        checkpoint, lambda state: {name: v for k, v in state.items() if (name := plain_name(k)) not in named}
    )
    saved = small.get("state_dict", {})
    adapters = [adapter for path, target in targets.items() for adapter in _described(path, target, saved)]
    return {**small, KEY: {"format": FORMAT, "left_out": left_out, "adapters": adapters}}


def restore(module: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the adapters of a checkpoint on a module and returns the checkpoint with complete state dicts.

    Adapters that the module has already keep their parameters, so that an optimizer goes on with them.

    Args:
        module: The module, with the base it had when the checkpoint was written.
        checkpoint: What `shrink` returned; it is not changed.

    Raises:
        AdapterFileError: If the entry is damaged or newer, or does not fit the module. Adapters that were not on the
            module before are taken off again.
    """
    entry = checked_entry(checkpoint)
    added: list[tuple[nn.Module, str]] = []
    try:
        with _undamaged():
            for adapter in entry["adapters"]:
                added += _put(module, adapter, checkpoint.get("state_dict", {}))
            _refuse_surplus(module, entry)
            return _filled(module, checkpoint, entry["left_out"])
    except BaseException:
        for target, name in reversed(added):
            LoraModel(target).delete_adapter(name)
        raise


def check(module: nn.Module, checkpoint: Mapping[str, Any], whole: Mapping[str, Any]) -> None:
    """Compares the adapters of a checkpoint with those of a module whose tensors are split over processes.

    Args:
        module: The module.
        checkpoint: The checkpoint.
        whole: The module's state dict as its strategy has it, which knows the whole shapes.

    Raises:
        AdapterFileError: If the entry is damaged or newer, or the adapters are not the same ones on the same base.
    """
    entry = checked_entry(checkpoint)
    with _undamaged():
        for adapter in entry["adapters"]:
            target, packed = _found(module, adapter, {})
            name, state = str(packed.manifest.get("adapter_name")), model_state(target)
            if state is None or name not in state.adapters:
                raise AdapterFileError(
                    f"The checkpoint has an adapter {name!r} on {adapter['target'] or 'the module'!r}, and the module "
                    "has none there. Use the adapter_name and target it was trained with."
                )
            own = LoraModel(target).pack(name)
            shapes = _whole_shapes({key: state_key(adapter["target"], name, key) for key in own.tensors}, whole)
            _compare(name, PackedAdapter(_with_shapes(own.manifest, shapes), own.tensors), packed)
        _refuse_surplus(module, entry)


@contextmanager
def _undamaged() -> Iterator[None]:
    """Says of an entry whose parts are not what they should be that it is damaged."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterFileError(
            f"The entry {KEY!r} of the checkpoint is damaged: {error!r}. Copy the file again."
        ) from error


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Says of a damaged file that it is one.

    Raises:
        AdapterFileError: If what is read inside the block is not a whole checkpoint.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except (EOFError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise AdapterFileError(
            f"{path} cannot be read as a checkpoint: {error}. It may be truncated: use another one."
        ) from error


def checked_entry(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns our entry of a checkpoint.

    Raises:
        AdapterFileError: If it is not one that this release can read.
    """
    entry: Any = checkpoint[KEY]
    version = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(version, int):
        raise AdapterFileError(f"The entry {KEY!r} of the checkpoint is damaged: it has no format version.")
    if version > FORMAT:
        raise AdapterFileError(
            f"The checkpoint has format {version} of lora_plugins, and this release reads up to {FORMAT}: upgrade "
            "lora-plugins to the release that wrote it."
        )
    if not all(isinstance(entry.get(key), list) for key in ("left_out", "adapters")):
        raise AdapterFileError(f"The entry {KEY!r} of the checkpoint is damaged. Copy the file again.")
    return dict(entry)


def frozen_keys(module: nn.Module) -> set[str]:
    """Returns the keys of a state dict that stand still: the frozen base of all adapted targets.

    Everything else is kept: adapters, heads and biases, what lies outside the targets, and every buffer but those of
    normalization layers that are held in eval mode.
    """
    frozen = {id(tensor) for target in adapted_targets(module).values() for tensor in _frozen_tensors(target)}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    return {name for name, tensor in named if id(tensor) in frozen}


def frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the tensors that no adapter of the module may move, by name; see `frozen_keys`."""
    keys = frozen_keys(module)
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in keys}


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that the module's adapters train, by name.

    What lies outside the targets is the user's own matter, and a metric's network is nobody's.
    """
    found: dict[str, nn.Parameter] = {}
    for path, target in adapted_targets(module).items():
        own = dict(target.named_parameters())
        plans = [adapter.plan for adapter in _state(target).adapters.values()]
        names = {*adapter_tensors(target), *(name for plan in plans for name in plan.trained)}
        prefix = f"{path}." if path else ""
        found.update({prefix + name: p for name, p in own.items() if name in names and p.requires_grad})
    return found


def _frozen_tensors(target: nn.Module) -> Iterator[Tensor]:
    state = model_state(target)
    assert state is not None
    plans = [adapter.plan for adapter in state.adapters.values()]
    moving = {name for plan in plans for name in (*plan.trained, *plan.saved_buffers)}
    norms = set.intersection(*(set(plan.frozen_norms) for plan in plans))
    modules = model_modules(target)
    for name, tensor in own_tensors(target, modules, "_parameters").items():
        if name not in moving:
            yield tensor
    for name, tensor in own_tensors(target, modules, "_buffers").items():
        if name.rpartition(".")[0] in norms and name not in moving:
            yield tensor


def _described(path: str, target: nn.Module, saved: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    lora, owner = LoraModel(target), _state(target).values.owner
    for name in lora.adapters:
        packed = lora.pack(name)
        away = {f"value/{plain_name(value)}" for value in owner if owner[value] != name}
        packed = renamed(packed, plain_name)
        keys = {key: state_key(path, name, key) for key in packed.tensors if key not in away}
        shapes = _whole_shapes(keys, saved)
        yield {
            "target": plain_name(path),
            "active": name in lora.active_adapters,
            "manifest": _with_shapes(packed.manifest, shapes),
            "tensors": {key: tensor for key, tensor in packed.tensors.items() if key not in shapes},
        }


def _whole_shapes(keys: Mapping[str, str], state: Mapping[str, Any]) -> dict[str, list[int]]:
    """Returns the shapes of tensors by their key in a packed adapter, as far as a state dict has them."""
    return {key: list(state[own].size()) for key, own in keys.items() if own in state}


def _with_shapes(manifest: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, Any]:
    """Returns a manifest with the shapes of whole tensors, where it was made of parts."""
    about = {key: {**entry, "shape": shapes.get(key, entry["shape"])} for key, entry in manifest["tensors"].items()}
    return {**manifest, "tensors": about}


def state_key(path: str, adapter: str, key: str) -> str:
    """Returns the key that a tensor of a packed adapter has in the module's state dict; "" if it is not there.

    Args:
        path: The adapter's target.
        adapter: The adapter's name.
        key: `lora/LAYER/lora_A`, `value/NAME`, or any other.
    """
    kind, _, rest = key.partition("/")
    parts = {"lora": [path, *rest.split("/"), adapter], "value": [path, rest]}.get(kind, [])
    return ".".join(plain_name(part) for part in parts if part)


def _map_state_dicts(checkpoint: Mapping[str, Any], change: Callable[[StateDict], StateDict]) -> dict[str, Any]:
    """Applies `change` to every state dict of the module that Lightning's own callbacks put into a checkpoint."""
    mapped = dict(checkpoint)
    for key in ("state_dict", "current_model_state"):  # WeightAveraging keeps the current weights under the second
        if key in mapped:
            mapped[key] = change(mapped[key])
    if "callbacks" in mapped:
        mapped["callbacks"] = {key: _mapped_callback(state, change) for key, state in mapped["callbacks"].items()}
    return mapped


def _mapped_callback(state: Any, change: Callable[[StateDict], StateDict]) -> Any:
    key = "average_model_state"  # of StochasticWeightAveraging
    if not isinstance(state, dict) or not state.get(key):
        return state
    return {**state, key: change(state[key])}


def _put(module: nn.Module, adapter: Mapping[str, Any], saved: Mapping[str, Any]) -> list[tuple[nn.Module, str]]:
    """Puts one adapter on its target, or its values into the adapter that is there; returns what was added."""
    target, packed = _found(module, adapter, saved)
    name = str(packed.manifest.get("adapter_name"))
    state = model_state(target)
    present = state is not None and name in state.adapters
    if present and not _same_changed_base(target, name, packed):
        assert state is not None
        LoraModel(target).delete_adapter(name)
        present = False
    if present:
        _refill(target, name, packed)
    else:
        LoraModel.load_packed(target, packed, name)
    _activate(target, name, adapter["active"])
    return [] if present else [(target, name)]


def _found(module: nn.Module, adapter: Mapping[str, Any], saved: Mapping[str, Any]) -> tuple[nn.Module, PackedAdapter]:
    """Returns the target of an adapter of the file, and the adapter with its tensors from all over the file."""
    path = names_in(module)(adapter["target"])
    try:
        target = module.get_submodule(path)
    except AttributeError as error:
        raise AdapterFileError(
            f"The checkpoint has an adapter for {path!r}, which {type(module).__name__} does not have."
        ) from error
    manifest = adapter["manifest"]
    keys = {key: state_key(path, str(manifest.get("adapter_name")), key) for key in manifest["tensors"]}
    tensors = {key: saved[own] for key, own in keys.items() if own in saved} | adapter["tensors"]
    return target, renamed(PackedAdapter(manifest, tensors), names_in(target))


def _same_changed_base(target: nn.Module, name: str, packed: PackedAdapter) -> bool:
    """Whether the adapter's init made of the base what it made of it in the checkpoint (LoftQ changes the base)."""
    return bool(LoraModel(target).pack(name).manifest["changed"] == packed.manifest["changed"])


def _refill(target: nn.Module, name: str, packed: PackedAdapter) -> None:
    own = LoraModel(target).pack(name)
    _compare(name, own, packed)
    with torch.no_grad():
        for key, tensor in own.tensors.items():
            tensor.copy_(packed.tensors[key])


def _compare(name: str, own: PackedAdapter, packed: PackedAdapter) -> None:
    mine, theirs = own.manifest["config"], packed.manifest["config"]
    different = [key for key in mine if mine[key] != theirs.get(key)]
    if different:
        details = "; ".join(f"{key} is {theirs.get(key)!r} in the file and {mine[key]!r} here" for key in different)
        raise AdapterFileError(
            f"The checkpoint's adapter {name!r} has another configuration: {details}. Use the configuration of the "
            "file, or start without ckpt_path."
        )
    here, there = own.manifest["tensors"], packed.manifest["tensors"]
    if set(here) != set(there):
        odd = sorted(set(here) ^ set(there))
        raise AdapterFileError(
            f"The checkpoint's adapter {name!r} belongs to another model: {listing(odd)} are only in one of them."
        )
    for key, about in here.items():
        if about["shape"] != there[key]["shape"]:
            raise AdapterFileError(
                f"The checkpoint's adapter {name!r} belongs to another model: {key!r} is "
                f"{there[key]['shape']} in the file and {about['shape']} here."
            )
    base, found = packed.manifest["base"], own.manifest["base"]
    wrong = [key for key in found if key not in base or not same(found[key], base[key])]
    if wrong:
        raise AdapterFileError(
            f"The checkpoint's adapter {name!r} was trained on another base: {listing(wrong)} differ from the weights "
            f"it was made for ({len(wrong)} of {len(found)}). Load the same pretrained weights first, unmerged."
        )


def _activate(target: nn.Module, name: str, active: bool) -> None:
    lora = LoraModel(target)
    now = lora.active_adapters
    if active and name not in now:
        lora.set_adapter((*now, name))
    elif not active and name in now:
        lora.set_adapter([other for other in now if other != name])


def _refuse_surplus(module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Refuses adapters on the module that the file does not know: they would act with their first values."""
    known = {(adapter["target"], adapter["manifest"]["adapter_name"]) for adapter in entry["adapters"]}
    surplus = [
        f"{name} on {path or 'the module'}"
        for path, target in adapted_targets(module).items()
        for name in _state(target).adapters
        if (path, name) not in known
    ]
    if surplus:
        there = [f"{name} on {path or 'the module'}" for path, name in sorted(known)]
        raise AdapterFileError(
            f"The module has adapters that the checkpoint does not have: {listing(surplus)}. The checkpoint has "
            f"{listing(there)}. Use the adapter_name and target it was trained with."
        )


def _filled(module: nn.Module, checkpoint: Mapping[str, Any], left_out: list[str]) -> dict[str, Any]:
    current, rename = module.state_dict(), names_in(module)
    left_out = [rename(key) for key in left_out]
    unknown = [key for key in left_out if key not in current]
    if unknown:
        raise AdapterFileError(
            f"The checkpoint was trained on another base: {type(module).__name__} has no {listing(unknown)} "
            f"({len(unknown)} of {len(left_out)} frozen tensors)."
        )
    base = {key: current[key] for key in left_out}
    return _map_state_dicts(checkpoint, lambda state: {**base, **{rename(k): v for k, v in state.items()}})


def _state(target: nn.Module) -> ModelState:
    state = model_state(target)
    if state is None:
        raise LoraError("The module lost its adapters while they were read.")
    return state
