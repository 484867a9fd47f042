"""`LoraModel`, the handle to an adapted model."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar, cast

from torch import Tensor, nn

from lora_plugins.adapter import (
    Calibration,
    InitData,
    ModelState,
    NewAdapter,
    add,
    allocated,
    base_in_place,
    calibration_for,
    check_here,
    check_new,
    check_not_fused,
    check_not_nested,
    check_not_sharded,
    combine,
    delete,
    initialize,
    mixed_batch,
    model_state,
    present_state,
    set_active,
    swap,
    unload,
    warn_of_unsaved,
    whole,
    without_adapters,
)
from lora_plugins.arguments import chosen_names, with_checked_arguments
from lora_plugins.config import LoraConfig
from lora_plugins.errors import ConfigError, StateError, noted
from lora_plugins.files import (
    TENSOR_FILES,
    PackedAdapter,
    format_of,
    options_of,
    pack,
    rebuilt_bases,
    saved_name,
    unpack,
    warn_of_not_finite,
)
from lora_plugins.hub import CardContent, located, push
from lora_plugins.merge import DEFAULT_MAX_ERROR, MergeReport, merge, merge_and_unload, unmerge
from lora_plugins.names import DEFAULT_ADAPTER
from lora_plugins.plan import Plan, make_plan, parameter_counts
from lora_plugins.plugins import FORMATS, OWN_FORMAT, Registry, default_registry
from lora_plugins.utils import outside_inference
from lora_plugins.words import MEMBERS, Told, said_of_member
from lora_plugins.writable import check_writable_place

Method = TypeVar("Method", bound=Callable[..., Any])


def _whole(method: Method) -> Method:
    """Makes a method all or nothing: stopped in the middle, it leaves no change. It runs outside of inference mode."""

    @functools.wraps(method)
    @outside_inference
    def changed(self: "LoraModel", *args: Any, **kwargs: Any) -> Any:
        return whole(self.model, functools.partial(method, self, *args, **kwargs))

    return cast(Method, changed)


def _changing(method: Method) -> Method:
    """As `_whole`, for what changes the adapters; it is refused where fused copies compute in their place."""

    @functools.wraps(method)
    def changed(self: "LoraModel", *args: Any, **kwargs: Any) -> Any:
        check_not_fused(self.model)
        return method(self, *args, **kwargs)

    return _whole(cast(Method, changed))


@with_checked_arguments
class LoraModel(metaclass=Told):
    """A handle to a model and its LoRA adapters.

    The model stays the user's own object: its layers are adapted in place, and training, saving and calling it go on
    as before. The adapters travel with the model; a second handle to the same model sees the same adapters.

    Args:
        model: Any module.
        config: The first adapter, or None for a handle to a model that is adapted already.
        adapter_name: Name of that adapter.
        registry: The plugins to use; by default those that are installed and that the config lets load.
        init_data: Data for an init that learns from them, such as `eva` or `lora_ga`: they are read once. Or the result
            of `calibrate`.

    Raises:
        TargetError: If a pattern matches nothing or a targeted layer cannot be adapted. The model is untouched.
        ConfigError: If the init learns from data and there are none, or a name or data are given and no config.
        StateError: If there is no config and the model is not adapted.

    Example:
        >>> from torch import Tensor, nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
        >>> lora.print_trainable_parameters()
        trainable params: 24 || all params: 82 || trainable%: 29.2683
        >>> type(lora.merge_and_unload()[0])
        <class 'torch.nn.modules.linear.Linear'>
    """

    _called: ClassVar[str] = "the model itself: lora.model(...)"
    """What is called in place of the handle."""

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | None = None,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        registry: Registry | None = None,
        init_data: InitData | Calibration | None = None,
    ) -> None:
        self.model = model
        self._registry = registry
        if config is not None:
            self.add_adapter(adapter_name, config, init_data=init_data)
        elif model_state(model) is None:
            check_not_nested(model)
            handle = type(self).__name__
            raise StateError(f"The model has no adapter. Give {handle} a LoraConfig, or use {handle}.load_adapter.")
        elif adapter_name != DEFAULT_ADAPTER or init_data is not None:
            given = f"adapter_name {adapter_name!r}" if init_data is None else "init_data"
            raise ConfigError(
                f"{type(self).__name__} was given {given} and no config, without which it adds no adapter. Give it a "
                "LoraConfig; among adapters that are there, set_adapter chooses."
            )

    def __repr__(self) -> str:
        state = model_state(self.model)
        shown = "no adapter" if state is None else state.summary()
        return f"<LoraModel of {type(self.model).__name__}: {shown}>"

    @staticmethod
    def plan(model: nn.Module, config: LoraConfig, *, registry: Registry | None = None) -> Plan:
        """Returns what would be adapted, by which plugin, with which rank, alpha and parameters; touches nothing.

        Raises:
            TargetError: If a pattern matches nothing or a targeted layer cannot be adapted.
        """
        return make_plan(model, config, registry)

    @property
    def adapters(self) -> dict[str, LoraConfig]:
        """The configurations of all adapters by name."""
        return {name: adapter.plan.config for name, adapter in self._state.adapters.items()}

    @property
    def plans(self) -> dict[str, Plan]:
        """What each adapter adapts, by adapter name."""
        return {name: adapter.plan for name, adapter in self._state.adapters.items()}

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The names of the adapters that act, merged ones included."""
        return self._state.active

    @property
    def active_weights(self) -> dict[str, float]:
        """What the updates of the active adapters are multiplied by, by name."""
        return {name: self._state.weights.get(name, 1.0) for name in self._state.active}

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """The names of the adapters whose update is in the weights."""
        return self._state.merged

    @_changing
    def add_adapter(
        self, adapter_name: str, config: LoraConfig, *, init_data: InitData | Calibration | None = None
    ) -> None:
        """Adds an adapter. The first one becomes active and trainable; a later one waits for `set_adapter`.

        Args:
            adapter_name: Its name.
            config: What it adapts, and how.
            init_data: What the init learns from; as in `LoraModel`.

        Raises:
            ConfigError: If the name is taken or not valid, or the init learns from data and there are none.
            TargetError: If the config does not fit the model. The model is untouched.
            StateError: If something is merged.
        """
        with self._adding(adapter_name):
            plan = make_plan(self.model, config, self._registry)
        calibration = calibration_for(self.model, plan, init_data)
        plan = allocated(plan, calibration)
        with self._adding(adapter_name):
            add(self.model, adapter_name, NewAdapter(plan, initialize(self.model, plan, calibration)))

    @_changing
    def set_adapter(
        self,
        adapter_names: str | Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        trainable: bool = True,
    ) -> None:
        """Makes one or several adapters active, and no other; the updates of several add up.

        Args:
            adapter_names: A name, or several.
            weights: What the update of each is multiplied by, in training, inference and merging; 1 by default. An
                adapter is saved without its weight.
            trainable: Whether they are trained from now on.

        Raises:
            ConfigError: If a name is repeated, the weights are not one finite number for each adapter, or are given
                for a set of adapters, which has no order.
            StateError: If a name is unknown, something is merged, two adapters trained the same head or bias, or an
                adapter that trained one is to be weighted.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 2))
            >>> lora = LoraModel(model, LoraConfig(r=2), "a")
            >>> lora.add_adapter("b", LoraConfig(r=1))
            >>> lora.set_adapter(["a", "b"], weights=[0.7, 0.3])
            >>> lora.active_weights
            {'a': 0.7, 'b': 0.3}
        """
        ordered = "" if weights is None else "LoraModel.set_adapter with weights: adapter_names"
        set_active(self.model, self._state, chosen_names(adapter_names, ordered), weights, trainable=trainable)

    def disable_adapter(self) -> AbstractContextManager[nn.Module]:
        """Restores the base model inside a `with` block, bit for bit, trained heads and biases included.

        Raises:
            StateError: If something is merged.
        """
        check_not_fused(self.model)
        return without_adapters(self.model)

    def mixed_batch(self, adapter_names: Sequence[str | None]) -> AbstractContextManager[nn.Module]:
        """Gives each row of a batch its own adapter inside a `with` block; for inference.

        All rows go through the model at once. The batch has to be the first dimension of what adapted layers get. Each
        adapter has the weight 1, whatever `set_adapter` gave it.

        Args:
            adapter_names: The adapter of each row of the batch; None for the base model.

        Raises:
            StateError: If the model is in training mode, something is merged, an adapter is unknown, or a layer cannot
                mix. Also if an adapter has its own values, such as a trained head, of a module that has adapted layers
                inside or that is called with more than one batched tensor.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 2)).eval()
            >>> lora = LoraModel(model, LoraConfig(r=2), "a")
            >>> lora.add_adapter("b", LoraConfig(r=1))
            >>> with lora.mixed_batch(["a", None, "b"]):
            ...     model(torch.ones(3, 4)).shape
            torch.Size([3, 2])
        """
        check_not_fused(self.model)
        return mixed_batch(self.model, chosen_names(adapter_names, "LoraModel.mixed_batch: adapter_names"))

    @_changing
    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; the last one leaves the untouched model.

        Raises:
            StateError: If there is no such adapter, or something is merged.
        """
        delete(self.model, self._state, adapter_name)

    @_changing
    def merge_adapter(
        self, adapter_names: str | Sequence[str] | None = None, *, max_error: float = DEFAULT_MAX_ERROR
    ) -> MergeReport:
        """Writes the updates of active adapters into the weights; `unmerge_adapter` takes them back bit for bit.

        Computed in float32 or better and rounded once. Until then the model cannot be trained, and what is merged
        cannot be saved.

        Args:
            adapter_names: Which of the active adapters; by default all that are not merged yet.
            max_error: Share of an update that rounding may lose.

        Raises:
            MergeError: If more would be lost, or a weight is shared with a layer that is not adapted. Nothing is
                merged then.
            StateError: If an adapter is unknown, not active, or merged already.
        """
        names = chosen_names(adapter_names) if adapter_names is not None else self._state.unmerged
        return merge(self.model, self._state, names, max_error)

    @_changing
    def unmerge_adapter(self) -> None:
        """Takes all merged updates out of the weights again, bit for bit.

        Raises:
            StateError: If nothing is merged.
        """
        unmerge(self.model, self._state)

    @_changing
    def unload(self, *, dequantize: bool | None = None) -> nn.Module:
        """Removes all adapters and returns the model as it was before, bit for bit.

        Where the base is stored in fewer bytes (`LoraConfig.quantize`), its float values were not kept.

        Args:
            dequantize: Whether stored weights become parameters with their dense values, also where no adapter is left,
                or stay stored. Left out, they stay, and a warning says which.

        Raises:
            StateError: If a block is open, or `merge_and_unload` was stopped in the middle.
        """
        if (state := model_state(self.model)) is not None:
            state.check("unload")
            if state.merged:
                unmerge(self.model, state)
        unload(self.model, dequantize)
        return self.model

    @outside_inference
    def merge_and_unload(self, *, max_error: float = DEFAULT_MAX_ERROR, dequantize: bool = False) -> nn.Module:
        """Writes the updates of all active adapters into the weights permanently, and removes the adapters.

        Trained heads and biases stay. The model has its own classes and state-dict keys again, except for weights that
        a parametrization or a hook computed, such as weight norm: those are plain parameters from now on. Everything is
        checked before the first weight changes; then it goes layer by layer, so that the model is never in memory
        twice. If it is stopped in the middle, the model computes what it did, and another call merges the rest.

        Args:
            max_error: Share of an update that rounding may lose.
            dequantize: Whether stored weights (`LoraConfig.quantize`) become parameters. Else the merged values are
                stored again, which is refused where it would lose more than `max_error` of an update: nearly always.

        Raises:
            MergeError: As `merge_adapter` does, or if a weight is computed in an unknown way.
        """
        merge_and_unload(self.model, self._state, max_error, dequantize=dequantize)
        return self.model

    @_changing
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        **options: float,
    ) -> float:
        """Combines adapters into a new one, whose update is computed from theirs.

        Args:
            adapters: Names of the adapters to combine.
            weights: The weight of each.
            adapter_name: Name of the new adapter, which is added but not active.
            combination_type: How they are combined; `lora_plugins.adapter.combinations` describes each type.
            **options: Options of that type, such as `density`.

        Returns:
            The largest relative error of a layer's new update, as a share of the norm of the exact combination.

        Raises:
            ConfigError: If the type or an option is unknown, the numbers of adapters and weights differ, or the name is
                taken.
            StateError: If an adapter is unknown, has a variant, or has an init that changed the base; or if something
                is merged.
        """
        with self._adding(adapter_name):
            names = chosen_names(adapters, "LoraModel.add_weighted_adapter: adapters")
            new, error = combine(self.model, self._state, self._registry, names, weights, combination_type, options)
            add(self.model, adapter_name, new)
        return error

    @_whole
    def save_adapter(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        format: str = OWN_FORMAT,
        format_options: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes an adapter into a folder or file; a warning names what training changed beside it.

        Args:
            path: The folder, which is made if it does not exist, or the file where the format has files.
            adapter_name: Which adapter; by default the only active one.
            format: `lora_plugins`, our own folder (see `lora_plugins.files.folder`), `peft`, `diffusers`, `kohya`,
                `comfyui`, or the name of an installed format.
            format_options: Options of that format.

        Returns:
            The folder or file.

        Raises:
            StateError: If something is merged, no name is given and not exactly one adapter is active, or tensors are
                split over processes.
            AdapterFileError: If the format cannot express the adapter. Nothing is written.
            ConfigError: If nothing can be written there, or the path is a file where the format has folders.
            PluginError: If there is no such format.
        """
        state = self._state
        check_here(self.model, "save_adapter")
        check_writable_place(Path(path), "path")
        if adapter_name is None:
            if len(state.active) != 1:
                raise StateError(f"{len(state.active)} adapters are active. Say which one to save: adapter_name=...")
            (adapter_name,) = state.active
        state.adapter(adapter_name)
        chosen = (self._registry or default_registry()).get(FORMATS, format)
        options = options_of(chosen, format_options)
        packed = pack(self.model, state, adapter_name, self._registry, of_first_base=False)
        warn_of_unsaved(self.model, state, adapter_name)
        with base_in_place(self.model, state), noted(f"the format {chosen.name!r}, writing {path}"):
            return chosen.write(Path(path), packed, self.model, self._registry, options)

    def push_to_hub(
        self,
        repository: str,
        adapter_name: str | None = None,
        *,
        format: str = OWN_FORMAT,
        format_options: Mapping[str, Any] | None = None,
        base_model: str | None = None,
        license: str | None = None,
        metrics: Mapping[str, float] | None = None,
        description: str = "",
        revision: str | None = None,
        private: bool | None = None,
        message: str = "Upload a LoRA adapter",
    ) -> str:
        """Pushes an adapter to the Hugging Face Hub, with a model card, in one commit.

        It needs huggingface_hub (`.[hub]`).

        Args:
            repository: `owner/name`; it is made if it does not exist.
            adapter_name: As in `save_adapter`.
            format: Likewise; `peft` lets `PeftModel.from_pretrained` read it.
            format_options: Likewise.
            base_model: Name of the base model on the Hub, for the card.
            license: The license, as the Hub names it (`apache-2.0`), for the card.
            metrics: What was measured, by name, for the card.
            description: A text for the card.
            revision: The branch; by default the main one.
            private: Whether a new repository is private; by default as its owner has it.
            message: The message of the commit.

        Returns:
            The address of the commit.

        Raises:
            ConfigError: If huggingface_hub is missing.
            AdapterFileError: If the format cannot express the adapter, or the repository cannot be made or written.
        """
        chosen = (self._registry or default_registry()).get(FORMATS, format)

        def write(folder: Path) -> CardContent:
            path = folder if chosen.file_names else folder / "adapter.safetensors"
            self.save_adapter(path, adapter_name, format=format, format_options=format_options)
            summary = chosen.summary(path)
            return CardContent(repository, format, summary, base_model, license, metrics or {}, description)

        former = [TENSOR_FILES] if format == OWN_FORMAT else []  # whose names are those of their contents
        return push(write, repository, revision=revision, private=private, message=message, replaces=former)

    @classmethod
    @outside_inference
    def load_adapter(
        cls,
        model: nn.Module,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        format: str | None = None,
        format_options: Mapping[str, Any] | None = None,
        registry: Registry | None = None,
    ) -> "LoraModel":
        """Puts a saved adapter on a model, adapted or not.

        Args:
            model: The base model that the adapter was trained on, with untouched weights.
            path: The folder or file; or a repository of the Hub, `hf://owner/name@revision`, if need be with the path
                of a folder or file in it, `hf://owner/name/style.safetensors`. The Hub needs huggingface_hub
                (`.[hub]`).
            adapter_name: Name of the adapter on this model; by default the one it was saved under.
            format: Its format; by default the one that recognizes it.
            format_options: Options of that format.
            registry: The plugins to use; by default those that are installed and that the adapter's config lets load.

        Returns:
            A handle. The adapter is active if it is the model's first.

        Raises:
            AdapterFileError: If the file is damaged, or belongs to another model, or says what cannot be expressed
                here. The model is untouched.
            ConfigError: If the name is taken, or the format has no such option.
            StateError: If something is merged, or a block is open.
            PluginError: If there is no such format.
        """
        state = model_state(model)
        if state is not None:
            state.check("add_adapter")
        check_not_sharded(model)
        packed = whole(model, lambda: _read(model, path, registry, format, format_options))
        return cls.load_packed(model, packed, adapter_name, registry=registry)

    @classmethod
    def load_packed(
        cls,
        model: nn.Module,
        packed: PackedAdapter,
        adapter_name: str | None = None,
        *,
        registry: Registry | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> "LoraModel":
        """Puts an adapter on a model from its manifest and tensors; see `load_adapter`.

        Args:
            model: The model.
            packed: The adapter.
            adapter_name: Its name on the model; by default the one that it was saved with.
            registry: The plugins; by default those that its config lets load.
            changed: The weights that its init has changed, by full name, where they are still there. By default they
                are computed from the base, which needs the type that it had when the adapter was made.

        Raises:
            AdapterFileError: If it is damaged, or belongs to another model. The model is untouched.
            ConfigError: If the name is taken.
            StateError: If something is merged, or a block is open.
        """
        handle = cls.__new__(cls)
        handle.model, handle._registry = model, registry
        handle._add_packed(packed, saved_name(packed) if adapter_name is None else adapter_name, changed)
        return handle

    @_changing
    def swap_adapter(
        self,
        adapter_name: str,
        path: str | Path,
        *,
        format: str | None = None,
        format_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Gives an adapter the values of a saved one; what was compiled stays valid.

        The adapter keeps its name, its configuration and its ranks: a smaller rank is filled up with zeros, a layer
        that the saved one does not adapt has no update, and another scaling goes into B.

        Args:
            adapter_name: The adapter that is there.
            path: As in `load_adapter`.
            format: Its format; by default the one that recognizes it.
            format_options: Options of that format.

        Raises:
            AdapterFileError: If the file is damaged, belongs to another model, or does not fit into the adapter that is
                there: a higher rank, other layers, heads or biases, another variant or one that lacks layers, one of
                another rank or scaling that does more than rescale rows, or an init that changed the base.
            StateError: If there is no such adapter, something is merged, or a block is open.
        """
        state = self._state
        check_here(self.model, "swap_adapter")
        state.adapter(adapter_name)
        packed = _read(self.model, path, self._registry, format, format_options)
        with base_in_place(self.model, state):
            other = unpack(self.model, packed, self._registry)
        swap(self.model, state, adapter_name, other)

    @_changing
    def _add_packed(self, packed: PackedAdapter, adapter_name: str, changed: Mapping[str, Tensor] | None) -> None:
        with self._adding(adapter_name):
            new = unpack(self.model, packed, self._registry)
            if changed is None:
                changed = rebuilt_bases(self.model, new, packed, self._registry)
            add(self.model, adapter_name, replace(new, changed=changed))

    @_whole
    def pack(self, adapter_name: str) -> PackedAdapter:
        """Returns an adapter as its manifest and tensors, which `load_packed` takes; what `save_adapter` writes.

        The tensors are the model's own, as in a state dict: further training changes them. The adapter loads onto the
        base as it was before training moved weights of it by hand; checkpoints hold those beside the adapter.

        Raises:
            StateError: If there is no such adapter, or something is merged.
        """
        self._state.check("save_adapter")
        self._state.adapter(adapter_name)
        return pack(self.model, self._state, adapter_name, self._registry, of_first_base=True)

    def print_trainable_parameters(self) -> None:
        """Prints how many parameters are trained, of how many, in the format of PEFT.

        A weight that is stored in fewer bytes counts as the dense one.
        """
        trained, total = parameter_counts(self.model)
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    if not TYPE_CHECKING:  # so that type checkers still report what does not exist

        def __getattr__(self, name: str) -> NoReturn:
            model = None if name in MEMBERS or name.startswith("_") else vars(self).get("model")
            handle = f"It is a handle; the model itself has it: lora.model.{name}" if hasattr(model, name) else ""
            said = handle or said_of_member(name, self)
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}. {said}".rstrip())

        def __call__(self, *_: Any, **__: Any) -> NoReturn:
            """Refuses a call, which is usual with PEFT's models."""
            raise TypeError(f"{type(self).__name__} is a handle and computes nothing; call {self._called}")

    @property
    def _state(self) -> ModelState:
        return present_state(self.model)

    @contextmanager
    def _adding(self, adapter_name: str) -> Iterator[None]:
        """Checks that an adapter can be added and will act, and restores the base's own values inside the block."""
        state = model_state(self.model)
        check_new(state, adapter_name)
        check_not_sharded(self.model)
        with nullcontext() if state is None else base_in_place(self.model, state):
            yield
        check_not_fused(self.model)


def _read(
    model: nn.Module,
    path: str | Path,
    registry: Registry | None,
    format: str | None,
    format_options: Mapping[str, Any] | None,
) -> PackedAdapter:
    """Reads an adapter with the base's own values in place."""
    found = located(path, registry)
    chosen = (registry or default_registry()).get(FORMATS, format) if format else format_of(found, registry)
    options = options_of(chosen, format_options)
    state = model_state(model)
    place = f"the format {chosen.name!r}, reading {found}"
    with base_in_place(model, state) if state else nullcontext(), noted(place):
        packed = chosen.read(found, model, registry, options)
        warn_of_not_finite(found, packed.tensors, model)
        return packed
