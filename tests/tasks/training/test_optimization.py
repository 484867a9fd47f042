"""Optimizers, schedules, and the moving average."""

import math
from functools import partial, wraps

import pytest
import torch
from lightning.pytorch import Callback
from transformers import get_cosine_schedule_with_warmup

from lora_plugins import ConfigError
from lora_plugins.tasks import ImageClassificationTask, warmup_cosine

from ..conftest import digits, tiny_vit


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(trainer, steps=8, **options):
    """The learning rates of a training of so many steps."""
    seen = Rates()
    trainer(max_steps=steps, max_epochs=-1, callbacks=[seen]).fit(
        ImageClassificationTask(tiny_vit(), **options), datamodule=digits()
    )
    return seen.seen


class TestOptimizer:
    def test_it_holds_what_requires_gradients(self, trainer):
        task = ImageClassificationTask(tiny_vit())
        for parameter in task.parameters():
            parameter.requires_grad_(False)
        task.network.head.requires_grad_(True)
        before = {name: p.clone() for name, p in task.named_parameters()}
        run = trainer(max_steps=2)
        run.fit(task, datamodule=digits())
        (optimizer,) = run.optimizers
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in task.network.head.parameters()}
        moved = {name for name, p in task.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {"network.head.weight", "network.head.bias"}

    def test_by_default_it_is_adamw(self, trainer):
        run = trainer(max_steps=1)
        run.fit(ImageClassificationTask(tiny_vit(), lr=0.02, weight_decay=0.3), datamodule=digits())
        (optimizer,) = run.optimizers
        assert type(optimizer) is torch.optim.AdamW
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.02, 0.3)

    @pytest.mark.parametrize(
        ("options", "unused"),
        [({"lr": 0.01, "lr_scheduler": warmup_cosine}, ["'lr', 'lr_scheduler'"]), ({}, [])],
        ids=["with arguments", "without"],
    )
    def test_arguments_that_another_configuration_replaces_are_told(self, trainer, recwarn, options, unused):
        task = ImageClassificationTask(tiny_vit(), **options)
        task.configure_optimizers = lambda: torch.optim.SGD(task.parameters(), lr=0.1)  # as LightningCLI does
        trainer(max_steps=1).fit(task, datamodule=digits())
        said = [str(each.message) for each in recwarn if "`optimizer:`" in str(each.message)]
        assert [message.partition("init_args: ")[2].partition(".")[0] for message in said] == unused

    def test_a_class_with_an_optimizer_of_its_own_is_told_nothing(self, trainer):
        class Own(ImageClassificationTask):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=self.lr)

        trainer(max_steps=1).fit(Own(tiny_vit(), lr=0.01), datamodule=digits())

    def test_another_takes_its_place(self, trainer):
        run = trainer(max_steps=1)
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        run.fit(ImageClassificationTask(tiny_vit(), optimizer=sgd), datamodule=digits())
        (optimizer,) = run.optimizers
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.param_groups[0]["momentum"] == 0.9

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"optimizer": "adamw"}, "optimizer is 'adamw'. It is called with the parameters"),
            ({"optimizer": torch.optim.AdamW, "lr": 0.1}, "are of the default optimizer"),
        ],
        ids=["a name", "lr beside it"],
    )
    def test_wrong_arguments(self, options, message):
        with pytest.raises(ConfigError, match=message):
            ImageClassificationTask(tiny_vit(), **options)

    def test_an_unknown_argument(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'schedul'"):
            ImageClassificationTask(tiny_vit(), schedul="cosine")


class Halves(torch.optim.lr_scheduler.StepLR):
    """Computes its step size from the number of all steps."""

    def __init__(self, optimizer, steps):
        super().__init__(optimizer, steps // 2, gamma=0.5)


class TestScheduler:
    def test_by_default_the_rate_is_constant(self, trainer):
        assert rates(trainer, lr=0.5) == [0.5] * 8

    def test_one_of_torch_is_given_all_steps_and_takes_each(self, trainer):
        linear = torch.optim.lr_scheduler.PolynomialLR
        assert rates(trainer, lr=1.0, lr_scheduler=linear) == pytest.approx([1 - i / 8 for i in range(8)])

    @pytest.mark.parametrize("annotation", [int | None, "Optional[int]", "typing.Union[int, float]", "int | float"])
    def test_a_number_of_steps_is_known_however_it_is_annotated(self, annotation):
        class Scheduler(torch.optim.lr_scheduler.LRScheduler):
            def __init__(self, optimizer, steps: annotation):
                pass

        assert ImageClassificationTask(tiny_vit(), lr_scheduler=Scheduler).lr_scheduler is Scheduler

    def test_a_class_of_ones_own_is_given_all_steps(self, trainer):
        assert rates(trainer, lr=1.0, lr_scheduler=Halves) == [1.0] * 4 + [0.5] * 4

    @pytest.mark.parametrize("warmup", [0.25, 0.1, 0.0])
    def test_warmup_and_cosine(self, trainer, warmup):
        """Against the formulas: a straight rise, and half a cosine (SGDR without restarts, arXiv 1608.03983)."""
        seen = rates(trainer, lr=1.0, lr_scheduler=partial(warmup_cosine, warmup=warmup))
        rise = round(8 * warmup)
        decay = [0.5 * (1 + math.cos(math.pi * i / (8 - rise))) for i in range(8 - rise)]
        assert seen == pytest.approx([(i + 1) / (rise + 1) for i in range(rise)] + decay)

    def test_a_warmup_is_a_share(self, trainer):
        with pytest.raises(ConfigError, match="share of all steps"):
            rates(trainer, lr_scheduler=partial(warmup_cosine, warmup=1.5))

    @pytest.mark.parametrize("name", ["ExponentialLR", "OneCycleLR", "LinearLR", "MultiStepLR", "LambdaLR", "StepLR"])
    def test_a_class_whose_second_argument_is_no_number_of_steps_is_refused(self, name):
        with pytest.raises(ConfigError, match=f"lr_scheduler is {name}, which takes .* where it is given the number"):
            ImageClassificationTask(tiny_vit(), lr_scheduler=getattr(torch.optim.lr_scheduler, name))

    @pytest.mark.parametrize(
        ("name", "given"), [("OneCycleLR", "max_lr"), ("StepLR", "step_size"), ("CosineAnnealingLR", "T_max")]
    )
    def test_a_partial_that_leaves_no_place_for_the_steps_is_refused(self, name, given):
        scheduler = partial(getattr(torch.optim.lr_scheduler, name), **{given: 1})
        with pytest.raises(ConfigError, match=f"{name}, which takes '{given}'"):
            ImageClassificationTask(tiny_vit(), lr_scheduler=scheduler)

    @pytest.mark.parametrize(
        ("scheduler", "message"),
        [
            (partial(get_cosine_schedule_with_warmup, num_warmup_steps=2), "too many positional arguments"),
            (get_cosine_schedule_with_warmup, "missing a required argument: 'num_training_steps'"),
            (lambda optimizer: None, "too many positional arguments"),
        ],
        ids=["a partial", "too few", "too many"],
    )
    def test_a_function_that_cannot_be_called_so_is_refused(self, scheduler, message):
        with pytest.raises(ConfigError, match=f"the number of all its steps, and .* cannot be: {message}"):
            ImageClassificationTask(tiny_vit(), lr_scheduler=scheduler)

    def test_a_decorated_function_is_called_as_it_is_decorated(self):
        @wraps(get_cosine_schedule_with_warmup)
        def made(optimizer, steps):
            return get_cosine_schedule_with_warmup(optimizer, 2, steps)

        assert ImageClassificationTask(tiny_vit(), lr_scheduler=made).lr_scheduler is made

    def test_a_function_says_which_argument_the_steps_are(self, trainer):
        seen = rates(
            trainer,
            lr=1.0,
            lr_scheduler=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps),
        )
        assert seen == pytest.approx([1 - i / 8 for i in range(8)])

    def test_a_training_without_end_has_none(self, trainer):
        task = ImageClassificationTask(tiny_vit(), lr_scheduler=warmup_cosine)
        with pytest.raises(ConfigError, match="Set max_epochs or max_steps"):
            trainer(max_epochs=-1).fit(task, datamodule=digits())


def test_as_many_names_as_classes():
    with pytest.raises(ConfigError, match="2 different class_names"):
        ImageClassificationTask(tiny_vit(), class_names=["a", "b"])


def test_the_average_is_what_is_validated_and_kept(trainer):
    """An average over many steps lags behind: it has moved less than the last weights of the same run."""
    moved = {}
    for ema in (0.0, 0.99):
        torch.manual_seed(0)
        task = ImageClassificationTask(tiny_vit(), lr=0.01, ema=ema)
        before = task.network.head.weight.detach().clone()
        trainer(max_epochs=2).fit(task, datamodule=digits())
        moved[ema] = float((task.network.head.weight - before).norm().detach())
    assert 0 < moved[0.99] < 0.9 * moved[0.0]


def test_an_average_is_a_share():
    with pytest.raises(ConfigError, match="ema is a finite number of at least 0, below 1, not 1"):
        ImageClassificationTask(tiny_vit(), ema=1.0)
