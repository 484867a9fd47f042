"""The LightningModule that is fitted, written without any thought of LoRA."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from tests.fits.draw import Fit
from tests.fits.networks import CLASSES, NETWORKS, build
from tests.fits.optimizers import OPTIMIZERS, SCHEDULERS, Group

RATE = 0.01
TOWERS = ("net", "side")
DTYPES = {"64-true": torch.float64, "32-true": torch.float32}


CALLS: Mapping[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda tower, x: tower(x),
    "checkpointed": lambda tower, x: checkpoint(tower, x, use_reentrant=False),
    "functional": lambda tower, x: functional_call(tower, dict(tower.named_parameters()), (x,)),
    "halves": lambda tower, x: torch.cat([tower(half) for half in x.chunk(2)]),
}
"""How a tower is called."""


class Rules:
    """What a module is made into before it is trained, and the rates of its parameters: nothing of its own here."""

    def adapt(self, module: "FitModule") -> None:
        """Changes the towers of a module."""

    def split(self, module: "FitModule", group: Group) -> list[Group]:
        """Gives parameters of one group rates of their own."""
        return [group]

    def thaw(self, module: "FitModule") -> None:
        """Makes all of a module trainable again."""
        module.requires_grad_(True)


class FitModule(LightningModule):
    """A classifier of one or two towers, with losses of all steps taken down.

    Args:
        settings: The fields of the `Fit`.
        rules: What it is made into.
    """

    def __init__(self, settings: dict[str, Any], rules: Rules | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("settings")
        self.setting, self.rules = Fit(**settings), rules or Rules()
        self.automatic_optimization = not self.setting.steps_itself
        self.lr = RATE
        self.losses: list[float] = []
        self.validations: list[float] = []
        if self.setting.build == "init":
            self.make()

    @property
    def towers(self) -> dict[str, nn.Module]:
        """The towers by name."""
        return {name: getattr(self, name) for name in TOWERS[: self.setting.towers]}

    def make(self) -> None:
        """Makes the towers and their copies, once."""
        if hasattr(self, "net"):
            return
        for seed, name in enumerate(TOWERS[: self.setting.towers]):
            tower = build(self.setting.network, seed, DTYPES[self.setting.precision])
            setattr(self, name, tower.train(not self.setting.resting))
        if "center" in self.setting.copies:
            place = self.net if self.setting.copies == "inner center" else self
            center = torch.zeros(CLASSES, dtype=DTYPES[self.setting.precision])
            place.center = nn.Parameter(center, requires_grad=False)
        if self.setting.copies == "teacher":
            self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.rules.adapt(self)
        if self.setting.copies == "average":
            self.average = copy.deepcopy(self.net).requires_grad_(False)

    def setup(self, stage: str) -> None:
        if self.setting.build == "setup":
            self.make()

    def configure_model(self) -> None:
        if self.setting.build == "configure_model":
            self.make()

    def forward(self, x: Tensor) -> Tensor:
        return sum(CALLS[self.setting.calls](tower, x) for tower in self.towers.values())

    @property
    def mean(self) -> Tensor:
        """The center of the outputs, where there is one."""
        return self.net.center if self.setting.copies == "inner center" else self.center

    def loss(self, batch: list[Tensor]) -> Tensor:
        """The loss that is trained on."""
        x, y = batch
        punished = self.setting.penalty == "gradients" and torch.is_grad_enabled()
        outputs = self(x.requires_grad_() if punished else x)
        loss = cross_entropy(outputs, y)
        if punished:
            loss = loss + torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()
        if self.setting.penalty == "weights":
            loss = loss + 0.01 * sum(layer.weight.square().sum() for layer in self.layers())
        if "center" in self.setting.copies:
            loss = loss + 0.3 * (outputs.mean(0) - self.mean).square().sum()
            self.latest = outputs.detach().mean(0)
        if self.setting.copies == "teacher":
            with torch.no_grad():
                wanted = self.teacher(x)
            loss = loss + 0.3 * mse_loss(self(x), wanted)
        return loss

    def layers(self) -> list[nn.Module]:
        """The layers that can be adapted."""
        names = NETWORKS[self.setting.network].layers
        return [tower.get_submodule(name) for tower in self.towers.values() for name in names]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("train", loss, on_step=True, on_epoch=True)
        if self.automatic_optimization:
            return loss
        if self.setting.loop == "manual":
            self.step_every_second(loss, batch_idx)
        elif self.setting.loop == "sam":
            self.step_twice(batch, loss)
        else:
            self.step_in_turn(batch)
        for scheduler in as_list(self.lr_schedulers()):
            if not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                scheduler.step()
        return None

    def step_every_second(self, loss: Tensor, batch_idx: int) -> None:
        """Accumulates the gradients of two batches."""
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        if batch_idx % 2 == 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.7, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()

    def step_twice(self, batch: list[Tensor], loss: Tensor) -> None:
        """Steps by the gradients at weights that were moved along those of the loss, as SAM does."""
        optimizer = self.optimizers()
        self.manual_backward(loss)
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        before = [p.detach().clone() for p in held]
        with torch.no_grad():
            for parameter in held:
                parameter.add_(parameter.grad, alpha=0.1)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            for parameter, value in zip(held, before, strict=True):
                parameter.copy_(value)
        optimizer.step()
        optimizer.zero_grad()

    def step_in_turn(self, batch: list[Tensor]) -> None:
        """Steps each optimizer on a loss of its own, as GANs do."""
        for optimizer in as_list(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        loss = cross_entropy(self.average(x), y) if self.setting.copies == "average" else self.loss(batch)
        self.validations.append(loss.item())
        self.log("val", loss)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def on_validation_start(self) -> None:
        if self.setting.toggles:
            self.trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
            self.requires_grad_(False)

    def on_validation_end(self) -> None:
        if self.setting.toggles:
            self.rules.thaw(self)

    def on_train_batch_end(self, *_: Any) -> None:
        self.move("on_train_batch_end")

    def on_before_zero_grad(self, *_: Any) -> None:
        self.move("on_before_zero_grad")

    @torch.no_grad()
    def move(self, hook: str) -> None:
        """Moves the center or the average by hand, in one of the hooks."""
        if self.setting.moved_in != hook:
            return
        if "center" in self.setting.copies:
            self.mean.lerp_(self.latest, 0.3)
        if self.setting.copies == "average":
            self.move_average()

    def move_average(self) -> None:
        """Moves the average of the tower."""
        for mean, value in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.mul_(0.7).add_(value, alpha=0.3)
        for mean, value in zip(self.average.buffers(), self.net.buffers(), strict=True):
            mean.copy_(value)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Optimizer, closure: Any) -> None:
        if self.setting.loop == "warmup":
            for group in optimizer.param_groups:
                group["lr"] = min(1, (self.trainer.global_step + 1) / 5) * self.lr * group.get("ratio", 1)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def configure_optimizers(self) -> Any:
        named = [(name, value) for name, value in self.named_parameters() if value.requires_grad]
        parts = [named]
        if self.setting.loop == "two optimizers":
            parts = [[item for item in named if (".head." in item[0]) is head] for head in (False, True)]
        optimizers = [self.optimizer_of(value for _, value in part) for part in parts]
        made = [SCHEDULERS[self.setting.scheduler](optimizer) for optimizer in optimizers]
        return optimizers, [scheduler for scheduler in made if scheduler is not None]

    def optimizer_of(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Makes an optimizer of some parameters, in one group or in two."""
        parameters = list(parameters)
        groups: list[Group] = [{"params": parameters, "lr": self.lr}]
        if self.setting.groups == 2:
            matrices, vectors = ([p for p in parameters if (p.ndim > 1) is many] for many in (True, False))
            groups = [
                {"params": matrices, "lr": self.lr, "weight_decay": 0.1},
                {"params": vectors, "lr": self.lr / 2, "weight_decay": 0.0},
            ]
        split = [part for group in groups if group["params"] for part in self.rules.split(self, group)]
        return OPTIMIZERS[self.setting.optimizer](split, lr=self.lr)


def as_list(given: Any) -> list[Any]:
    """What Lightning gives as one, as several or not at all."""
    return [] if given is None else given if isinstance(given, list) else [given]
