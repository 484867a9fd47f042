"""`LoraPipeline`, the handle to the adapters of a pipeline."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from lora_plugins import (
    Calibration,
    ConfigError,
    InitData,
    LoraConfig,
    LoraModel,
    PackedAdapter,
    Plan,
    Registry,
    TargetError,
)
from lora_plugins.arguments import with_checked_arguments
from lora_plugins.errors import listing
from lora_plugins.integrations.diffusers.families import default_targets, denoising_family
from lora_plugins.integrations.diffusers.parts import parts_beside, parts_of
from lora_plugins.names import DEFAULT_ADAPTER
from lora_plugins.plan import matches
from lora_plugins.plugins import OWN_FORMAT


@with_checked_arguments
class LoraPipeline(LoraModel):
    """A handle to a pipeline of diffusers and its adapters, each over the denoiser and the text encoders.

    It is a `LoraModel` of the pipeline's parts: `set_adapter(names, weights=...)`, `merge_adapter`, `unmerge_adapter`,
    `save_adapter(path, format="diffusers")` and all others are there. Names of layers begin with the name of a part, as
    in `unet.conv_in`. The pipeline stays the user's own, and is called as before. Where `unload` and `merge_and_unload`
    return a module, it is that of the parts.

    Args:
        pipe: The pipeline.
        config: The first adapter, or None for a handle to a pipeline that is adapted already. If it names no
            `target_modules`, they are the attention projections of the denoiser.
        adapter_name: Name of that adapter.
        registry: As in `LoraModel`.
        init_data: As in `LoraModel`.

    Raises:
        ConfigError: If it is no pipeline, or its denoiser is of a class whose usual layers are not known while the
            config names none.
        TargetError: As in `LoraModel`.
        StateError: As in `LoraModel`.
    """

    _called: ClassVar[str] = "the pipeline itself: pipe(...)"

    def __init__(
        self,
        pipe: Any,
        config: LoraConfig | None = None,
        adapter_name: str = DEFAULT_ADAPTER,
        *,
        registry: Registry | None = None,
        init_data: InitData | Calibration | None = None,
    ) -> None:
        self._pipe = pipe
        super().__init__(parts_of(pipe), config, adapter_name, registry=registry, init_data=init_data)

    @staticmethod
    def plan(pipe: Any, config: LoraConfig, *, registry: Registry | None = None) -> Plan:
        """Returns what would be adapted in a pipeline; touches nothing. See `LoraModel.plan`."""
        parts = parts_of(pipe)
        with _naming_other_parts(pipe, parts, config):
            return LoraModel.plan(parts, _completed(pipe, parts, config), registry=registry)

    def add_adapter(
        self, adapter_name: str, config: LoraConfig, *, init_data: InitData | Calibration | None = None
    ) -> None:
        """Adds an adapter, by default to the layers that a first one would have. See `LoraModel.add_adapter`."""
        parts = cast(nn.ModuleDict, self.model)
        completed = _completed(self._pipe, parts, config)
        with _naming_other_parts(self._pipe, parts, config):
            super().add_adapter(adapter_name, completed, init_data=init_data)

    def save_adapter(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        format: str = OWN_FORMAT,
        format_options: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes an adapter; a warning names parts that diffusers would leave out. See `LoraModel.save_adapter`."""
        names = self.active_adapters if adapter_name is None else (adapter_name,)
        if format == "diffusers" and not (format_options or {}).get("component"):
            layers = [layer.name for name, plan in self.plans.items() if name in names for layer in plan.layers]
            _warn_of_left_out(self._pipe, dict.fromkeys(layer.partition(".")[0] for layer in layers))
        return super().save_adapter(path, adapter_name, format=format, format_options=format_options)

    @classmethod
    def load_adapter(
        cls,
        pipe: Any,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        format: str | None = None,
        format_options: Mapping[str, Any] | None = None,
        registry: Registry | None = None,
    ) -> "LoraPipeline":
        """Puts a saved adapter on a pipeline, adapted or not. See `LoraModel.load_adapter`."""
        LoraModel.load_adapter(
            parts_of(pipe), path, adapter_name, format=format, format_options=format_options, registry=registry
        )
        return cls(pipe, registry=registry)

    @classmethod
    def load_packed(
        cls,
        pipe: Any,
        packed: PackedAdapter,
        adapter_name: str | None = None,
        *,
        registry: Registry | None = None,
        changed: Mapping[str, Tensor] | None = None,
    ) -> "LoraPipeline":
        """Puts an adapter on a pipeline from its manifest and tensors. See `LoraModel.load_packed`."""
        LoraModel.load_packed(parts_of(pipe), packed, adapter_name, registry=registry, changed=changed)
        return cls(pipe, registry=registry)


def _completed(pipe: Any, parts: nn.ModuleDict, config: LoraConfig) -> LoraConfig:
    """Returns a config that names its layers."""
    if config.target_modules is not None or parts is pipe:
        return config
    family = denoising_family(parts)
    if family is None:
        _check_denoiser(pipe, parts)
        raise ConfigError(
            f"It is not known which layers of a {type(pipe).__name__} are worth adapting. Name them: target_modules="
            "['to_q', 'to_k', 'to_v', 'to_out.0'] are the attention of most denoisers."
        )
    return replace(config, target_modules=default_targets(family, parts))


def _check_denoiser(pipe: Any, parts: nn.ModuleDict) -> None:
    """Checks that some part is a denoiser: that of a few pipelines, such as a prior, is adapted by itself."""
    beside = [*parts_beside(pipe)]
    if beside and all(name.startswith("text_") for name in parts):
        raise ConfigError(
            f"A {type(pipe).__name__} has no part that is known as a denoiser. LoraPipeline adapts its "
            f"{listing(parts)}, where target_modules names layers of that. {_by_itself(beside)}"
        )


@contextmanager
def _naming_other_parts(pipe: Any, parts: nn.ModuleDict, config: LoraConfig) -> Iterator[None]:
    """Adds to an error about layers that are not found the parts that have them, if these are adapted by themselves."""
    try:
        yield
    except TargetError as error:
        patterns = config.target_modules
        lost = _unmatched(patterns, _layers(parts))
        beside = parts_beside(pipe).items()
        having = [name for name, part in beside if lost - _unmatched(patterns, _layers({name: part}))]
        if not having:
            raise
        raise TargetError(f"{error} {_by_itself(having)}") from error


def _unmatched(patterns: Any, layers: Sequence[str]) -> set[str]:
    """Returns the patterns that match none of the layers; `all` and none at all mean other ones."""
    found = {} if patterns in (None, "all") else matches("target_modules", patterns, layers)
    return {pattern for pattern, names in found.items() if not names}


def _layers(parts: Mapping[str, nn.Module] | nn.ModuleDict) -> list[str]:
    return [f"{part}.{name}" for part, module in parts.items() for name, _ in module.named_modules() if name]


def _by_itself(parts: Collection[str]) -> str:
    """Returns what to do about parts that a LoraPipeline does not adapt."""
    return f"Other parts ({listing(parts)}) are adapted by themselves: LoraModel(pipe.{next(iter(parts))}, config)."


def _warn_of_left_out(pipe: Any, parts: Collection[str]) -> None:
    """Warns of the parts of which `load_lora_weights` reads no layers, which it does not say."""
    read = getattr(pipe, "_lora_loadable_modules", ())
    left_out = [part for part in parts if part not in read]
    if read and left_out:
        warnings.warn(
            f"load_lora_weights of a {type(pipe).__name__} reads layers of {listing(read)} alone, and silently leaves "
            f"out those of {listing(left_out)}. lora_plugins reads all of them.",
            stacklevel=2,
        )
