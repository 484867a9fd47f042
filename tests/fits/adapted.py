"""Our side of a run: a plain module, and a LoraCallback."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_plugins import LoraConfig, LoraModel, Plan
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.fits.draw import Fit
from tests.fits.module import TOWERS, FitModule
from tests.fits.networks import adapted, heads
from tests.fits.reference import Start


class Starts(Callback):
    """Takes down what the adapters start from, at the first fit.

    Args:
        fit: The settings.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit
        self.taken: dict[str, list[Start]] = {}

    def on_fit_start(self, trainer: Trainer, module: FitModule) -> None:
        if not self.taken:
            self.taken = dict(self.of(module))

    def of(self, module: FitModule) -> Iterator[tuple[str, list[Start]]]:
        """The starts of all layers of the towers, by full name."""
        whole = self.fit.target == "module"
        for prefix, target in {"": module}.items() if whole else module.towers.items():
            plans = LoraModel(target).plans
            for plan in plans["default"].layers:
                name = f"{prefix}.{plan.name}".removeprefix(".")
                yield name, [self.start(target, module.get_submodule(name), plans[key], key) for key in plans]

    def start(self, target: nn.Module, layer: nn.Module, plan: Plan, adapter: str) -> Start:
        """The start of one adapter of a layer."""
        factors = (getattr(layer, key)[adapter].detach().clone() for key in ("lora_A", "lora_B"))
        return Start(self.base(target, layer), *factors, plan.layers[0].settings.scaling)

    def base(self, target: nn.Module, layer: nn.Module) -> Tensor:
        """The weight that the update is added to: without the part that some inits take away."""
        if self.fit.storage == "none":
            return layer.state_dict()["weight"].clone()
        with LoraModel(target).disable_adapter():
            return layer.weight.detach().clone()


class Adapted:
    """Our side of a run.

    Args:
        fit: The settings.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit, self.starts = fit, Starts(fit)

    def module(self) -> FitModule:
        """Makes a module."""
        return FitModule(asdict(self.fit))

    def callbacks(self, folder: Path) -> list[Callback]:
        """What a trainer gets: one callback or two for the module, or for each tower."""
        self.folder, towers = folder, TOWERS[: self.fit.towers]
        if self.fit.target == "tower":
            return [*(each for name in towers for each in self.loras(folder / name, name, ("",))), self.starts]
        copies = ("average.",) if self.fit.copies == "average" else ()
        return [*self.loras(folder / "module", None, tuple(f"{name}." for name in towers), copies), self.starts]

    def loras(
        self, folder: Path, target: str | None, towers: tuple[str, ...], copies: tuple[str, ...] = ()
    ) -> list[Callback]:
        """Makes the callbacks of a target."""
        first = self.lora(folder, target, towers, copies)
        if self.fit.second == "none":
            return [first]
        config = LoraConfig(r=4, alpha=3, init=self.fit.second, target_modules=first.config.target_modules)
        shared = ("target", "merge_on_fit_end", "dequantize", "merge_source", "train_mode")
        options = {key: getattr(first, key) for key in shared}
        rates = {"loraplus_lr_ratio": self.fit.b_ratio, "heads_lr_ratio": self.fit.head_ratio}
        files = {"adapter_name": "second", "save_adapter_to": folder / "second", "print_plan": False}
        return [first, LoraCallback(config, **options, **rates, **files)]

    def lora(
        self, folder: Path, target: str | None, towers: tuple[str, ...], copies: tuple[str, ...] = ()
    ) -> LoraCallback:
        """Makes the first callback of a target; the names of its layers begin as said."""
        network, which = self.fit.network, self.fit.heads
        config = LoraConfig(
            r=2,
            init=self.fit.init,
            variant=self.fit.variant,
            quantize=None if self.fit.storage == "none" else self.fit.storage,
            quantize_options={} if self.fit.storage == "none" else {"min_size": 0},
            bias=self.fit.bias,
            memory=self.fit.memory,
            norm=self.fit.norm,
            target_modules=[prefix + layer for prefix in towers + copies for layer in adapted(network, which)],
            modules_to_save=[prefix + head for prefix in towers for head in heads(network, which)],
        )
        return LoraCallback(
            config,
            target=target,
            merge_on_fit_end=self.fit.merge,
            dequantize=self.fit.storage != "none",
            merge_source="best" if self.fit.best else "last",
            train_mode=not self.fit.resting,
            save_adapter_to=folder / "adapter",
            export_to=folder / "merged.safetensors",
            print_plan=False,
            loraplus_lr_ratio=self.fit.b_ratio,
            heads_lr_ratio=self.fit.head_ratio,
        )

    def read(self, path: Path) -> FitModule:
        """Makes a module from a checkpoint, without a trainer."""
        return load_from_checkpoint(FitModule, path)

    def finish(self, trainer: Trainer, module: FitModule) -> None:
        """The callback has done what is to be done."""

    def exported(self, module: FitModule) -> dict[str, Tensor]:
        """Reads the files with the update merged."""
        found = {}
        for target in self.targets():
            prefix = f"{target}." if target else ""
            values = load_file(self.folder / (target or "module") / "merged.safetensors")
            found |= {prefix + name: value for name, value in values.items()}
        return found

    def saved(self, module: FitModule) -> FitModule:
        """Makes a module from the adapter folders."""
        module = self.module()
        module.make()
        for target in self.targets():
            adapted = getattr(module, target) if target else module
            folder = self.folder / (target or "module")
            lora = LoraModel.load_adapter(adapted, folder / "adapter")
            if self.fit.second != "none":
                LoraModel.load_adapter(adapted, folder / "second")
                lora.set_adapter(["default", "second"])
        return module

    def targets(self) -> tuple[str | None, ...]:
        """What callbacks are given as `target`."""
        return TOWERS[: self.fit.towers] if self.fit.target == "tower" else (None,)
