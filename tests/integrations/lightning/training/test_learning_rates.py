"""Separate learning rates for A, B and heads: of the module's own optimizer, of the callback, and in YAML files."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch.optim import lr_scheduler as schedulers

from lora_plugins import ConfigError, LoraConfig, StateError
from lora_plugins.integrations.lightning import LoraCallback, LoraCLI, parameter_groups
from tests.integrations.lightning.toys import CONFIG, Classifier, loader, lora, trainer
from tests.integrations.lightning.training.training_cases import cli, fit, learned


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


@pytest.mark.parametrize("cls", [Rates, Classifier], ids=["parameter_groups", "callback"])
def test_magnitudes_of_dora_learn_as_a_does(tmp_path, cls):
    module = cls(lr=0.01)
    ratio = {} if cls is Rates else {"loraplus_lr_ratio": 16.0}
    run = trainer(tmp_path, [lora(LoraConfig(r=2, target_modules=["net.0"], variant="dora"), **ratio)])
    run.fit(module, loader())
    names = {id(p): name for name, p in module.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in run.optimizers[0].param_groups]
    assert groups == [{"net.0.lora_A.default", "net.0.lora_magnitude.default"}, {"net.0.lora_B.default"}]
    first, second = (group["lr"] for group in run.optimizers[0].param_groups)
    assert second == pytest.approx(16 * first)


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


@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")  # SequentialLR of torch 2.8
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


def test_parts_of_a_named_group_have_names_of_their_own(tmp_path):
    module = plain(SCHEDULERS["lambda"], lambda m: [{"params": list(m.parameters()), "lr": 0.001, "name": "all"}])
    logger, monitor = CSVLogger(tmp_path), LearningRateMonitor()
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    callbacks = [lora(config, loraplus_lr_ratio=4.0, print_plan=False), monitor]
    trainer(tmp_path, callbacks, logger=logger, log_every_n_steps=1).fit(module, loader())
    assert monitor.lrs.keys() == {"lr-SGD/all", "lr-SGD/all_B"}
    assert monitor.lrs["lr-SGD/all_B"] == pytest.approx([4 * rate for rate in monitor.lrs["lr-SGD/all"]])


@pytest.mark.parametrize(
    ("ratios", "members"),
    [((4.0, 1.0), [[0, 1, 2], [3]]), ((1.0, 4.0), [[0, 1], [2, 3]]), ((4.0, 2.0), [[0], [1], [2, 3]])],
    ids=["B", "heads", "both"],
)
def test_what_has_a_ratio_of_its_own_has_a_group_of_its_own(tmp_path, ratios, members):
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    run = trainer(tmp_path, [lora(config, loraplus_lr_ratio=ratios[0], heads_lr_ratio=ratios[1])])
    run.fit(plain(SCHEDULERS["cosine"]), loader())
    groups = run.optimizers[0].state_dict()["param_groups"]
    assert [group["params"] for group in groups] == members
    own = [ratio for ratio in ratios if ratio != 1]
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx([1.0, *own])


class RatesSeen(Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


class BySteps(Plain):
    """Groups of its own for body and head, whose rates somebody sets; notes those that each step has had."""

    make = staticmethod(lambda optimizer, _: schedulers.ConstantLR(optimizer, 1.0))
    set_rates, place, built = None, None, None

    def configure_optimizers(self):
        self.groups, self.seen = lambda _: [{"params": part.parameters()} for part in (self.net[:3], self.net[3:])], []
        self.built = self.built or super().configure_optimizers()
        self.built[0][0].register_step_post_hook(self.note)
        return self.built

    def note(self, optimizer, *_):
        self.seen.append({self.kind(g["params"][0]): g["lr"] for g in optimizer.param_groups if g["params"]})

    def kind(self, parameter):
        return next(name for name, p in self.named_parameters() if p is parameter)

    def training_step(self, batch, batch_idx):
        self.set("training_step")
        return super().training_step(batch, batch_idx)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        self.set("optimizer_step")
        optimizer.step(closure=optimizer_closure)

    def on_before_optimizer_step(self, optimizer):
        self.set("on_before_optimizer_step")

    def set(self, place):
        if self.set_rates and place == self.place:
            self.set_rates(self.trainer.optimizers[0].param_groups, 0.001 * (self.global_step + 1))


class Late(Callback):
    """Sets rates in the last hook that a callback has ahead of a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.set("a callback")


def set_first(groups, rate):  # as callbacks do that unfreeze a backbone
    groups[0]["lr"] = rate


def set_all(groups, rate):  # as warm-ups do
    for group in groups:
        group["lr"] = rate


def cosine(optimizer, _):
    return schedulers.CosineAnnealingLR(optimizer, 3, eta_min=0.0005)


@pytest.mark.parametrize("place", ["optimizer_step", "training_step", "on_before_optimizer_step", "a callback"])
@pytest.mark.parametrize(
    ("set_rates", "make"), [(set_first, None), (set_all, None), (None, cosine)], ids=["first", "all", "eta_min"]
)
def test_parts_follow_whoever_sets_the_rate_of_their_group(tmp_path, set_rates, make, place):
    module = BySteps()
    module.set_rates, module.make, module.place = set_rates, make or module.make, place
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    trainer(tmp_path, [lora(config, loraplus_lr_ratio=16.0, heads_lr_ratio=4.0), Late()]).fit(module, loader())
    rates = [(each["net.0.lora_A.default"], each["net.0.lora_B.default"]) for each in module.seen]
    assert len({a for a, _ in rates}) > 1
    assert [b for _, b in rates] == [16 * a for a, _ in rates]
    heads = [each["net.3.weight"] for each in module.seen]
    assert heads == ([0.004] * len(heads) if set_rates is set_first else [4 * a for a, _ in rates])


@pytest.mark.parametrize("name", ["loraplus_lr_ratio", "heads_lr_ratio"])
def test_several_callbacks_have_one_ratio(tmp_path, name):
    """The first of them splits the optimizers, for the adapters of all."""
    layers = {"net.0": 4.0, "net.3": 16.0}
    callbacks = [
        lora(LoraConfig(r=2, target_modules=[layer]), adapter_name=layer[-1], **{name: ratio})
        for layer, ratio in layers.items()
    ]
    with pytest.raises(ConfigError, match=rf"share its optimizers, and {name} differs: 4\.0 of '0', 16\.0 of '3'"):
        trainer(tmp_path, callbacks).fit(Classifier(), loader())


def test_optimizer_of_an_earlier_fit_keeps_its_ratio(tmp_path):
    module, callback = BySteps(), lora(CONFIG, loraplus_lr_ratio=16.0)
    for _ in range(2):
        trainer(tmp_path, [callback]).fit(module, loader())
        assert {each["net.0.lora_B.default"] for each in module.seen} == {0.016}


class StrangeScheduler:
    def step(self):
        pass


def test_scheduler_that_is_none_of_torch_is_refused(tmp_path):
    lora = LoraCallback(CONFIG, loraplus_lr_ratio=16.0)
    with pytest.raises(StateError, match=r"StrangeScheduler is no Optimizer or LRScheduler.*parameter_groups"):
        trainer(tmp_path, [lora]).fit(plain(lambda *_: StrangeScheduler()), loader())


class Made(Classifier):
    """Makes its optimizer by a function of itself."""

    def configure_optimizers(self):
        return self.make(self)


def made(make):
    module = Made()
    module.make = make
    return module


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


class Inner(torch.optim.Optimizer):
    """Leaves the steps to another optimizer, with groups of its own."""

    def __init__(self, params, parts=lambda inner: inner):
        super().__init__(params, {"lr": 0.01})
        self.inner = parts(torch.optim.SGD([{**group} for group in self.param_groups], lr=0.01))


KEEPING = {
    "lbfgs": (torch.optim.LBFGS, "_params"),
    "inner": (Inner, "inner"),
    "inners": (lambda params: Inner(params, lambda inner: [inner]), "inner"),
}


@pytest.mark.parametrize(("make", "kept"), KEEPING.values(), ids=KEEPING.keys())
def test_optimizer_that_keeps_parameters_beside_its_groups_is_refused(tmp_path, make, kept):
    module = made(lambda module: make(trained(module)))
    with pytest.raises(StateError, match=rf"keeps parameters beside its groups \({kept}\).*parameter_groups\(...\)"):
        trainer(tmp_path, [lora(loraplus_lr_ratio=2.0)]).fit(module, loader())


class WithACritic(Classifier):
    """Has a part of which nothing is adapted, in an optimizer of its own."""

    def __init__(self):
        super().__init__()
        self.critic, self.automatic_optimization = torch.nn.Linear(3, 1), False

    def configure_optimizers(self):
        return torch.optim.SGD(trained(self.net), lr=0.1), torch.optim.LBFGS(self.critic.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        of_net, of_critic = self.optimizers()
        of_net.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        of_net.step()

        def closure():
            of_critic.zero_grad()
            loss = self.critic(self(batch[0]).detach()).square().mean()
            self.manual_backward(loss)
            return loss

        of_critic.step(closure)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # by LBFGS of torch 2.8
def test_optimizer_of_nothing_that_is_split_may_keep_its_parameters(tmp_path):
    module, run = WithACritic(), trainer(tmp_path, [lora(LoraConfig(r=2), target="net", loraplus_lr_ratio=4.0)])
    run.fit(module, loader())
    of_net, of_critic = run.optimizers
    assert [group["lr"] for group in of_net.param_groups] == pytest.approx([0.1, 0.4])
    assert [group["lr"] for group in of_critic.param_groups] == [0.1]


class Bounded(torch.optim.SGD):
    """Lists the rates of its groups, as AdaBound of torch_optimizer and pytorch_optimizer."""

    def __init__(self, params):
        super().__init__(params, lr=0.01)
        self.base_lrs = [group["lr"] for group in self.param_groups]

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        for group, base in zip(self.param_groups, self.base_lrs, strict=True):
            for p in group["params"]:
                p.sub_(p.grad, alpha=base)
        return loss


class Wraps(torch.optim.Optimizer):
    """Has the groups of the optimizer that takes its steps, as Lookahead."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    def step(self, closure):
        return self.optimizer.step(closure)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Wraps], ids=["bare", "wrapped"])
def test_optimizer_that_lists_the_rates_of_its_groups_knows_all(tmp_path, wrap):
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    ratios = {"loraplus_lr_ratio": 4.0, "heads_lr_ratio": 0.5}
    by_callback = made(lambda module: wrap(Bounded(trained(module))))
    by_groups = made(lambda module: wrap(Bounded(parameter_groups(module, lr=0.01, **ratios))))
    trainer(tmp_path, [lora(config, **ratios)]).fit(by_callback, loader())
    trainer(tmp_path, [lora(config)]).fit(by_groups, loader())
    torch.testing.assert_close(dict(by_callback.named_parameters()), dict(by_groups.named_parameters()))


class Poses:
    """Is no Optimizer, and says that it is one, as the LARSWrapper of cassle."""

    __class__ = property(lambda _: torch.optim.Optimizer)

    def __init__(self, optimizer):
        self.optimizer, self.add_param_group = optimizer, optimizer.add_param_group
        self.param_groups, self.state, self.defaults = optimizer.param_groups, optimizer.state, optimizer.defaults
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def step(self, closure=None):
        return self.optimizer.step(closure)


class StepsInside(Classifier):
    """Sets the rate of all groups, and steps past the optimizer's own `step`, as the two steps of SAM do."""

    def __init__(self, wrap):
        super().__init__()
        self.automatic_optimization, self.wrap, self.seen = False, wrap, []

    def configure_optimizers(self):
        return self.wrap(torch.optim.SGD(trained(self), lr=0.01))

    def training_step(self, batch, batch_idx):
        wrapper = self.optimizers(use_pl_optimizer=False)
        set_all(wrapper.param_groups, 0.001 * (batch_idx + 1))
        self.manual_backward(super().training_step(batch, batch_idx))
        wrapper.optimizer.step()
        self.seen.append([group["lr"] for group in wrapper.param_groups])


@pytest.mark.parametrize("wrap", [Wraps, Poses])
def test_parts_follow_in_steps_of_the_optimizer_inside(tmp_path, wrap):
    module = StepsInside(wrap)
    trainer(tmp_path, [lora(CONFIG, loraplus_lr_ratio=4.0)]).fit(module, loader())
    rates = [seen[0] for seen in module.seen]
    assert len(set(rates)) > 1
    assert [seen[-1] for seen in module.seen] == [4 * rate for rate in rates]


class FindsItsRate(torch.optim.Optimizer):
    """Has no learning rate in its groups, as A2Grad and AliG of pytorch_optimizer."""

    def __init__(self, params):
        super().__init__(params, {"max_lr": None})

    @torch.no_grad()
    def step(self, closure):
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = sum(float(p.grad.square().sum()) for p in params)
        for p in params:
            p.sub_(p.grad, alpha=float(loss) / (norm + 1e-5))
        return loss


class WithoutRate(Classifier):
    def configure_optimizers(self):
        return FindsItsRate([p for p in self.parameters() if p.requires_grad])


def test_optimizer_without_a_learning_rate_trains_all_adapters(tmp_path):
    module = WithoutRate()
    fit(tmp_path, module)
    assert learned(module)


@pytest.mark.parametrize("option", ["loraplus_lr_ratio", "heads_lr_ratio"])
def test_multiple_of_no_learning_rate_is_refused(tmp_path, option):
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    with pytest.raises(StateError, match=r"FindsItsRate has no 'lr'.*loraplus_lr_ratio and heads_lr_ratio"):
        trainer(tmp_path, [lora(config, **{option: 2.0})]).fit(WithoutRate(), loader())


@pytest.mark.parametrize("option", ["loraplus_lr_ratio", "heads_lr_ratio"])
def test_ratio_has_to_be_above_zero(option):
    with pytest.raises(ConfigError, match=f"{option} is a positive, finite number, not 0"):
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


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"loraplus_lr_ratio": 4.0}, {"loraplus_lr_ratio": 16.0}),
        ({"heads_lr_ratio": 4.0}, {}),
        ({}, {"loraplus_lr_ratio": 4.0}),
    ],
    ids=["another", "none", "a first"],
)
def test_resuming_with_another_ratio_is_refused_by_name(tmp_path, before, now):
    run = trainer(tmp_path, [lora(**before)], max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    name = next(iter({**before, **now}))
    values = [given.get(name, 1.0) for given in (before, now)]
    again = trainer(tmp_path, [lora(**now)])
    with pytest.raises(StateError, match=f"trained with {name}={values[0]}, here {values[1]}. The state of its"):
        again.fit(Classifier(), loader(), ckpt_path=tmp_path / "it.ckpt")
    again.validate(Classifier(), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
