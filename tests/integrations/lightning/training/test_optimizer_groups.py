"""Every trainable tensor sits in exactly one parameter group, or the run stops before the first batch."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler as schedulers

from lora_plugins import ConfigError, LoraConfig, StateError
from lora_plugins.integrations.lightning import LoraCallback, LoraCLI, parameter_groups
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, loader, trainer, values


def fit(tmp_path, module, config=CONFIG, **options):
    run = trainer(tmp_path, [LoraCallback(config, merge_on_fit_end=False)], **options)
    run.fit(module, loader())
    return run


def lora_b(module):
    return {name: p for name, p in module.named_parameters() if ".lora_B." in name}


def held(run: Trainer):
    return [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]


def test_module_without_any_thought_of_lora_trains_its_adapters_only(tmp_path):
    module = Classifier()
    before = values(module)
    run = fit(tmp_path, module)
    after = values(module)
    assert {key for key in differing(before, after) if key in before} == set()
    assert all(p.abs().sum() > 0 for p in lora_b(module).values())
    assert {id(p) for p in held(run)} == {id(p) for p in module.parameters() if p.requires_grad}


class AllParameters(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_optimizer_over_all_parameters_leaves_the_frozen_ones(tmp_path):
    module = AllParameters()
    before = values(module)
    fit(tmp_path, module)
    assert {key for key in differing(before, values(module)) if key in before} == set()


class Early(Classifier):
    """Takes its parameters when it is made, before there are adapters."""

    def __init__(self, groups=1):
        super().__init__()
        parameters = list(self.parameters())
        self.early = [parameters] if groups == 1 else [parameters[:2], parameters[2:]]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{"params": group} for group in self.early], lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_list_captured_in_init_is_completed_and_said_so(tmp_path):
    module = Early()
    with pytest.warns(UserWarning, match="built before the adapters existed"):
        run = fit(tmp_path, module)
    assert all(p.abs().sum() > 0 for p in lora_b(module).values())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)


def test_where_missing_tensors_belong_is_not_guessed(tmp_path):
    module = Early(groups=2)
    with pytest.raises(StateError, match=r"in no optimizer.*net\.0\.lora_A"):
        fit(tmp_path, module)
    assert not any(p.grad is not None for p in module.parameters())


class Twice(Classifier):
    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.SGD(trained, lr=0.1), torch.optim.SGD(trained[:1], lr=0.1)]


def test_tensor_in_two_groups_is_refused(tmp_path):
    module = Twice()
    module.automatic_optimization = False
    with pytest.raises(StateError, match="more than one parameter group"):
        fit(tmp_path, module)


class TwoOptimizers(Classifier):
    """Manual optimization, as for adversarial training: each optimizer has its own layer."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        halves = [[p for p in self.net[i].parameters() if p.requires_grad] for i in (0, 3)]
        return [torch.optim.SGD(half, lr=0.1) for half in halves]


def test_manual_optimization_with_two_toggled_optimizers(tmp_path):
    module = TwoOptimizers()
    fit(tmp_path, module)
    assert all(p.abs().sum() > 0 for p in lora_b(module).values())


def cli(cls, tmp_path, extra=()):
    arguments = {
        "seed_everything": 1,
        "model": {"class_path": "tests.integrations.lightning.toys.Classifier"},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}},
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(tmp_path),
        },
        **dict(extra),
    }
    options = {} if cls is LoraCLI else {"subclass_mode_model": True}
    return cls(run=False, args=arguments, save_config_callback=None, **options)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")  # pytest has arguments of its own
@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning")  # which is the point
class TestYaml:
    def test_optimizer_of_our_cli_trains_the_adapters_without_a_warning(self, tmp_path):
        made = cli(LoraCLI, tmp_path, {"lora": CONFIG.to_dict(), "lora_callback": {"merge_on_fit_end": False}})
        before = values(made.model)
        made.trainer.fit(made.model, loader())
        assert all(p.abs().sum() > 0 for p in lora_b(made.model).values())
        assert {id(p) for p in held(made.trainer)} == {id(p) for p in made.model.parameters() if p.requires_grad}
        assert {key for key in differing(before, values(made.model)) if key in before} == set()
        assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)

    def test_optimizer_of_the_stock_cli_is_completed(self, tmp_path):
        made = cli(LightningCLI, tmp_path)
        made.trainer.callbacks.append(LoraCallback(CONFIG, merge_on_fit_end=False))
        with pytest.warns(UserWarning, match="built before the adapters existed"):
            made.trainer.fit(made.model, loader())
        assert all(p.abs().sum() > 0 for p in lora_b(made.model).values())
        assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)

    def test_our_cli_without_lora_is_lightning_cli(self, tmp_path):
        made = cli(LoraCLI, tmp_path)
        made.trainer.fit(made.model, loader())
        assert not lora_b(made.model)


class Checkpointed(Classifier):
    """The first layer runs inside reentrant gradient checkpointing, whose input needs no gradient."""

    def __init__(self, whole: bool):
        super().__init__()
        self.whole = whole

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        if self.whole:
            return checkpoint(self.net, x, use_reentrant=True)
        return self.net[1:](checkpoint(self.net[0], x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # torch says it too
class TestDeadAdapters:
    def test_part_without_gradient_is_named(self, tmp_path):
        with pytest.warns(UserWarning, match=r"got no gradient.*net\.0\.lora_A.*use_reentrant=False"):
            fit(tmp_path, Checkpointed(whole=False))

    def test_nothing_with_a_gradient_stops(self, tmp_path):
        with pytest.raises((StateError, RuntimeError), match=r"gradient|does not require grad"):
            fit(tmp_path, Checkpointed(whole=True))

    def test_layer_off_the_way_to_the_loss_is_named(self, tmp_path):
        module = Classifier()
        module.unused = nn.Linear(4, 4)
        with pytest.warns(UserWarning, match=r"got no gradient.*unused\.lora_A.*exclude_modules"):
            fit(tmp_path, module, LoraConfig(r=2))

    def test_learning_rate_that_moves_nothing_is_said(self, tmp_path):
        with pytest.warns(UserWarning, match="did not move"):
            fit(tmp_path, Classifier(lr=1e-30))


class Rates(Classifier):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(parameter_groups(self, lr=0.01, loraplus_lr_ratio=16, heads_lr_ratio=0.2))
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_learning_rates_of_a_b_and_heads(tmp_path):
    module = Rates()
    run = fit(tmp_path, module, LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"]))
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    names = {id(p): name for name, p in module.named_parameters()}
    assert {key: [names[id(p)] for p in group["params"]] for key, group in groups.items()} == {
        "A": ["net.0.lora_A.default"],
        "B": ["net.0.lora_B.default"],
        "heads": ["net.3.weight", "net.3.bias"],
    }
    rates = {key: group["lr"] for key, group in groups.items()}
    assert rates == pytest.approx({"A": 0.01 / 4, "B": 0.16 / 4, "heads": 0.002 / 4})


class Plain(Classifier):
    """As written without any thought of LoRA, with a scheduler of the test's choice."""

    groups = None

    def configure_optimizers(self):
        groups = self.groups(self) if self.groups else [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)
        scheduler = self.make(optimizer, [group["lr"] for group in optimizer.param_groups])
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


SCHEDULERS = {
    "lambda": lambda o, _: schedulers.LambdaLR(o, lambda step: step / 20),  # starts at zero
    "cosine": lambda o, _: schedulers.CosineAnnealingLR(o, 7),
    "one_cycle": lambda o, rates: schedulers.OneCycleLR(o, rates, total_steps=20),
    "cyclic": lambda o, rates: schedulers.CyclicLR(o, [r / 10 for r in rates], rates, step_size_up=2),
    "sequential": lambda o, _: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o, _: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_rates_of_the_callback_are_those_of_parameter_groups(tmp_path, make):
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    ratios = {"loraplus_lr_ratio": 16.0, "heads_lr_ratio": 0.2}
    modules = plain(make), plain(make, lambda module: parameter_groups(module, lr=0.001, **ratios))
    seen = []
    for module, options in zip(modules, (ratios, {}), strict=True):
        monitor = RatesSeen()
        lora = LoraCallback(config, merge_on_fit_end=False, print_plan=False, **options)
        trainer(tmp_path, [lora, monitor], max_epochs=5).fit(module, loader())
        seen.append(monitor.seen)
    assert seen[0] == [pytest.approx(rates) for rates in seen[1]]
    assert seen[0][2][1] == pytest.approx(16 * seen[0][2][0])
    torch.testing.assert_close(dict(modules[0].named_parameters()), dict(modules[1].named_parameters()))


def plain(make, groups=None):
    module = Plain()
    module.make, module.groups = make, groups
    return module


class RatesSeen(Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class StrangeScheduler:
    def step(self):
        pass


def test_scheduler_that_is_none_of_torch_is_refused(tmp_path):
    lora = LoraCallback(CONFIG, loraplus_lr_ratio=16.0)
    with pytest.raises(StateError, match=r"StrangeScheduler is no LRScheduler.*parameter_groups"):
        trainer(tmp_path, [lora]).fit(plain(lambda *_: StrangeScheduler()), loader())


@pytest.mark.parametrize("option", ["loraplus_lr_ratio", "heads_lr_ratio"])
def test_ratio_has_to_be_above_zero(option):
    with pytest.raises(ConfigError, match=f"{option} is 0"):
        LoraCallback(CONFIG, **{option: 0.0})


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")
@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning")
def test_rates_from_yaml_survive_a_resume(tmp_path):
    callback = {"merge_on_fit_end": False, "loraplus_lr_ratio": 4.0}
    made = cli(LoraCLI, tmp_path, {"lora": CONFIG.to_dict(), "lora_callback": callback})
    made.trainer.fit(made.model, loader())
    made.trainer.save_checkpoint(tmp_path / "it.ckpt")
    assert [g["lr"] for g in made.trainer.optimizers[0].param_groups] == pytest.approx([0.1 / 4, 0.4 / 4])
    again = cli(LoraCLI, tmp_path, {"lora": CONFIG.to_dict(), "lora_callback": callback})
    again.trainer.fit_loop.max_epochs = 3
    again.trainer.fit(again.model, loader(), ckpt_path=tmp_path / "it.ckpt")
    assert [g["lr"] for g in again.trainer.optimizers[0].param_groups] == pytest.approx([0.1 / 8, 0.4 / 8])
