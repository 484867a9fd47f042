"""The plain side of a run: A and B as parameters of torch's own parametrizations, and nothing of lora_plugins."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import register_parametrization

from tests.fits.draw import Fit
from tests.fits.module import FitModule, Rules
from tests.fits.networks import NETWORKS, heads
from tests.fits.optimizers import Group
from tests.fits.trainers import best_file
from tests.fits.weights import effective


@dataclass(frozen=True)
class Start:
    """What a layer is trained from.

    Args:
        weight: Its base, which some inits change.
        A: The right factor of the update.
        B: The left one.
        scaling: Their factor.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    scaling: float


class Update(nn.Module):
    """A weight W as W + s B A, or with DoRA's magnitudes.

    Args:
        start: What is trained.
        groups: Of a convolution.
        columns: Whether the weight has its inputs first.
        magnitudes: Whether DoRA's magnitudes are trained, from the norms of the start.
    """

    def __init__(self, start: Start, groups: int, columns: bool, magnitudes: bool) -> None:
        super().__init__()
        self.A, self.B, self.scaling = nn.Parameter(start.A.clone()), nn.Parameter(start.B.clone()), start.scaling
        self.groups, self.columns, self.m = groups, columns, None
        if magnitudes:
            self.m = nn.Parameter(self.norms(self.added(start.weight).detach()))

    def forward(self, weight: Tensor) -> Tensor:
        weight = self.added(weight)
        if self.m is None:
            return weight
        factors = self.m / self.norms(weight).detach()
        return weight * factors.reshape(-1, *[1] * (weight.ndim - 1))

    def added(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        update = self.product()
        return weight + self.scaling * (update.T if self.columns else update).reshape(weight.shape)

    def product(self) -> Tensor:
        """B A, where each group of a convolution may have a rank of its own."""
        if len(self.A) == self.B.shape[1]:
            return self.B @ self.A
        pairs = zip(self.B.chunk(self.groups), self.A.chunk(self.groups), strict=True)
        return torch.cat([B @ A for B, A in pairs])

    @staticmethod
    def norms(weight: Tensor) -> Tensor:
        """The norm of each output's weights."""
        return weight.flatten(1).norm(dim=1)


class PlainRules(Rules):
    """Freezes a module, and gives its layers updates.

    Args:
        fit: The settings.
        starts: Of the layers, by their full name.
    """

    def __init__(self, fit: Fit, starts: Mapping[str, list[Start]]) -> None:
        self.fit, self.starts = fit, starts

    def adapt(self, module: FitModule) -> None:
        for name, tower in module.towers.items():
            trained = tuple(f"{head}." for head in heads(self.fit.network, self.fit.heads))
            for key, parameter in tower.named_parameters():
                biases = self.fit.bias == "all" and key.endswith("bias")
                parameter.requires_grad_(key.startswith(trained) or biases)
            for layer, starts in self.starts.items():
                if layer.startswith(f"{name}."):
                    self.update(tower, layer.removeprefix(f"{name}."), starts)

    def update(self, tower: nn.Module, name: str, starts: list[Start]) -> None:
        """Gives one layer its updates."""
        layer = tower.get_submodule(name)
        with torch.no_grad():
            layer.weight.copy_(starts[0].weight)
        columns = name in NETWORKS[self.fit.network].columns
        for start in starts:
            update = Update(start, getattr(layer, "groups", 1), columns, self.fit.variant == "dora")
            register_parametrization(layer, "weight", update)

    def thaw(self, module: FitModule) -> None:
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in module.trained)

    def split(self, module: FitModule, group: Group) -> list[Group]:
        if self.fit.b_ratio == 1 and self.fit.head_ratio == 1:
            return [group]
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(self.ratio(names[id(parameter)]), []).append(parameter)
        return [{**group, "params": part, "lr": group["lr"] * r, "ratio": r} for r, part in parts.items()]

    def ratio(self, name: str) -> float:
        """The rate of a parameter, as a multiple of that of A."""
        if ".parametrizations." not in name:
            return self.fit.head_ratio
        return self.fit.b_ratio if name.endswith(".B") else 1.0


class Modes(Callback):
    """What a plain module has to be told of modes: its mode, and that running statistics are frozen.

    Args:
        fit: The settings.
    """

    def __init__(self, fit: Fit) -> None:
        self.fit = fit

    def on_fit_start(self, trainer: Trainer, module: FitModule) -> None:
        for tower in module.towers.values():
            tower.train(not self.fit.resting)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: object) -> None:
        for part in module.modules():
            if isinstance(part, _BatchNorm) and self.fit.norm == "freeze":
                part.eval()


class Plain:
    """The plain side of a run.

    Args:
        fit: The settings.
        starts: Of the layers, as the other side has had them.
    """

    def __init__(self, fit: Fit, starts: Mapping[str, list[Start]]) -> None:
        self.fit, self.rules = fit, PlainRules(fit, starts)

    def module(self) -> FitModule:
        """Makes a module."""
        return FitModule(asdict(self.fit), self.rules)

    def callbacks(self, folder: Path) -> list[Callback]:
        """What a trainer gets."""
        return [Modes(self.fit)]

    def read(self, path: Path) -> FitModule:
        """Makes a module from a checkpoint, without a trainer."""
        module = self.module()
        module.make()
        module.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        return module

    def finish(self, trainer: Trainer, module: FitModule) -> None:
        """Takes the best weights, where the callback does."""
        path = best_file(trainer) if self.fit.best else ""
        if path:
            module.load_state_dict(torch.load(path, weights_only=False)["state_dict"])

    def exported(self, module: FitModule) -> dict[str, Tensor]:
        """What the files with the update merged have to hold: all of what is adapted."""
        targets = "" if self.fit.target == "module" else tuple(f"{name}." for name in module.towers)
        return {name: value for name, value in effective(module).items() if name.startswith(targets)}

    def saved(self, module: FitModule) -> FitModule:
        """Gives what the adapter folders have to be worth."""
        return module
