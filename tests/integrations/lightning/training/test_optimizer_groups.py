"""Every trainable tensor sits in a parameter group, or the run stops before the first batch."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy

from lora_plugins import LoraConfig, LoraModel, StateError
from lora_plugins.integrations.lightning import LoraCallback, LoraCLI
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, loader, lora, trainer, values
from tests.integrations.lightning.training.training_cases import cli, fit, learned, lora_b


def held(run: Trainer):
    return [p for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"]]


def test_module_without_any_thought_of_lora_trains_its_adapters_only(tmp_path):
    module = Classifier()
    before = values(module)
    run = fit(tmp_path, module)
    after = values(module)
    assert not differing(before, after) & before.keys()
    assert learned(module)
    assert {id(p) for p in held(run)} == {id(p) for p in module.parameters() if p.requires_grad}


class AllParameters(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnOptimizer(AllParameters):
    """Makes an optimizer of its own when fit starts."""

    def on_fit_start(self):
        self.own = torch.optim.SGD([self.net[0].weight, self.net[0].bias], lr=0.1)


def test_optimizer_over_the_weight_of_an_adapted_layer_is_explained(tmp_path):
    with pytest.raises(ValueError, match="non-leaf") as caught:
        fit(tmp_path, OwnOptimizer())
    assert "parameters()" in caught.value.__notes__[0]


def test_optimizer_over_all_parameters_leaves_the_frozen_ones(tmp_path):
    module = AllParameters()
    before = values(module)
    fit(tmp_path, module)
    assert not differing(before, values(module)) & before.keys()


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
    with pytest.warns(UserWarning, match="has nothing of the adapters"):
        run = fit(tmp_path, module)
    assert learned(module)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)


class Wrapper:
    """What Lightning takes for an optimizer, and is none of torch."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.state_dict, self.load_state_dict = optimizer.state_dict, optimizer.load_state_dict

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self):
        self.optimizer.zero_grad()


class Wrapped(Classifier):
    def __init__(self, wrapped, early):
        super().__init__()
        self.early = list(self.parameters()) if early else None

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.early or self.parameters(), lr=0.1)
        return Wrapper(optimizer) if self.hparams.wrapped else optimizer


@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.filterwarnings("ignore:The optimizer has nothing of the adapters:UserWarning")
def test_wrapper_that_is_no_optimizer_of_torch_trains_as_what_it_wraps(tmp_path, early):
    wrapped, bare = Wrapped(True, early), Wrapped(False, early)
    for module in (wrapped, bare):
        seed_everything(0)
        fit(tmp_path, module)
    assert learned(wrapped)
    assert differing(values(wrapped), values(bare)) == set()


class Unmade(torch.optim.Optimizer):
    """Wraps an optimizer, as copies of Lookahead that do not call Optimizer.__init__."""

    def __init__(self, optimizer):
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


class WithoutDefaults:
    """Wraps an optimizer, as ScheduleFreeWrapper of schedulefree."""

    def __init__(self, optimizer):
        self.param_groups, self.state = optimizer.param_groups, optimizer.state


@pytest.mark.parametrize("wrapper", [Unmade, WithoutDefaults])
def test_optimizer_that_lightning_refuses_is_left_to_it(tmp_path, wrapper):
    class Module(Classifier):
        def configure_optimizers(self):
            return wrapper(torch.optim.SGD(self.parameters(), lr=0.1))

    with pytest.raises(MisconfigurationException, match="Unknown configuration for model optimizers"):
        fit(tmp_path, Module())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        pytest.param(None, "None", id="nothing"),
        pytest.param([], r"\[\]", id="empty list"),
        pytest.param(torch.optim.SGD, r"<class .*SGD'>", id="class"),
        pytest.param({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "functools.* of the class partial", id="partial"),
    ],
)
def test_what_is_returned_in_place_of_an_optimizer_is_named(tmp_path, given, named):
    class Module(Classifier):
        def configure_optimizers(self):
            return given

    with pytest.raises(StateError, match=rf"^configure_optimizers returned no optimizer, but {named}, and 'net\.0"):
        fit(tmp_path, Module())


class Named(Classifier):
    """Gives its optimizer the names of its parameters, which torch keeps in the group."""

    def __init__(self, early):
        super().__init__()
        self.early = list(self.named_parameters()) if early else None

    def configure_optimizers(self):
        return torch.optim.SGD(self.early or [(n, p) for n, p in self.named_parameters() if p.requires_grad], lr=0.1)


@pytest.mark.filterwarnings("ignore:The optimizer has nothing of the adapters:UserWarning")
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_names_stay_with_their_parameters(tmp_path, early, ratio):
    module = Named(early)
    run = trainer(tmp_path, [lora(loraplus_lr_ratio=ratio)])
    run.fit(module, loader())
    names = {id(p): name for name, p in module.named_parameters()}
    groups = run.optimizers[0].param_groups
    assert [group["param_names"] for group in groups] == [[names[id(p)] for p in group["params"]] for group in groups]


class EarlyTwice(Early):
    """Two optimizers of all parameters, made before there are adapters."""

    def configure_optimizers(self):
        return [torch.optim.SGD(self.early[0], lr=rate) for rate in (0.1, 0.01)]


class EarlyElsewhere(Early):
    """Two groups of the tensors of layers that are not adapted."""

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [p]} for p in self.net[1].parameters()], lr=0.1)


class Grouped(Classifier):
    """Weights decay, biases do not, and the last layer has a rate of its own; A and B are with the weights."""

    def __init__(self):
        super().__init__()
        self.early = dict(self.named_parameters())

    def groups(self, named):
        def of(layer, *, decays):
            return [p for name, p in named if name.startswith(layer) and (not name.endswith("bias")) is decays]

        return [
            {"params": of("net.0", decays=True), "weight_decay": 0.3},
            {"params": of("net.3", decays=True), "weight_decay": 0.3, "lr": 0.05},
            {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
        ]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.groups([(n, p) for n, p in self.named_parameters() if p.requires_grad]), lr=0.1)


class GroupedEarly(Grouped):
    """Takes its parameters when it is made."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.groups(self.early.items()), lr=0.1)


STORED = replace(CONFIG, quantize="int8", quantize_options={"min_size": 0})
"""The weights of whose layers are no parameters any more: only biases are left in a group."""


@pytest.mark.parametrize(("module", "config"), [(EarlyTwice, CONFIG), (EarlyElsewhere, CONFIG), (GroupedEarly, STORED)])
def test_where_missing_tensors_belong_is_not_guessed(module, config, tmp_path):
    made = module()
    with pytest.raises(StateError, match=r"in no optimizer.*net\.0\.lora_A.*it is not clear where"):
        fit(tmp_path, made, config)
    assert not any(p.grad is not None for p in made.parameters())


class GroupedByClass(Grouped):
    """As minGPT: sorts by the class of the layer and the end of the name, and asserts that none is left."""

    def configure_optimizers(self):
        named = dict(self.named_parameters())
        known = {
            f"{path}.{name}"
            for path, layer in self.named_modules()
            for name, _ in layer.named_parameters(recurse=False)
            if isinstance(layer, nn.Linear | nn.BatchNorm1d)
        }
        assert known == named.keys(), f"parameters {named.keys() - known} were not separated"
        return torch.optim.AdamW(self.groups(named.items()), lr=0.1)


class GroupedByClassIfTrained(GroupedByClass):
    """As it, and takes what requires a gradient only."""

    def groups(self, named):
        return super().groups([(name, p) for name, p in named if p.requires_grad])


class GroupedEarlyTwice(GroupedEarly):
    """Has a weight twice in its group, as all parameters of two networks that share one."""

    def groups(self, named):
        groups = super().groups(named)
        groups[0]["params"] *= 2
        return groups


class GroupedByLayer(Grouped):
    """Names the weights of its layers."""

    def configure_optimizers(self):
        named = {name: getattr(self.get_submodule(name[:5]), name[6:]) for name in self.early}
        return torch.optim.AdamW(self.groups(named.items()), lr=0.1)


class GroupedByTable(Grouped):
    """Looks each name up in a table that was made with the network."""

    def configure_optimizers(self):
        named = {name: self.early[name] for name, _ in self.named_parameters()}
        return torch.optim.AdamW(self.groups(named.items()), lr=0.1)


class GroupedByLeaf(Grouped):
    """Takes the parameters of modules without children, and asserts that none is left."""

    def configure_optimizers(self):
        leaves = [module for module in self.modules() if not list(module.children())]
        taken = {id(p) for module in leaves for p in module.parameters()}
        named = dict(self.named_parameters())
        assert taken == {id(p) for p in named.values()}
        return torch.optim.AdamW(self.groups(named.items()), lr=0.1)


class GroupedByType(Grouped):
    """Sorts by the exact class of the layer, and takes nothing of others."""

    def configure_optimizers(self):
        named = [
            (f"{path}.{name}", p)
            for path, layer in self.named_modules()
            for name, p in layer.named_parameters(recurse=False)
            if type(layer) in (nn.Linear, nn.BatchNorm1d)
        ]
        return torch.optim.AdamW(self.groups(named), lr=0.1)


class GroupedByAttribute(Grouped):
    """As YOLO: takes the attributes of layers that are parameters."""

    def configure_optimizers(self):
        named = [
            (f"{path}.{name}", getattr(layer, name))
            for path, layer in self.named_modules()
            for name in ("weight", "bias")
            if isinstance(getattr(layer, name, None), nn.Parameter)
        ]
        return torch.optim.AdamW(self.groups(named), lr=0.1)


@pytest.mark.parametrize(
    ("module", "failed"),
    [
        (GroupedEarly, ""),
        (GroupedEarlyTwice, ""),
        (GroupedByClass, "AssertionError: parameters .* were not separated"),
        (GroupedByClassIfTrained, "AssertionError"),
        (GroupedByLayer, "ValueError: can't optimize a non-leaf Tensor"),
        (GroupedByTable, "KeyError: 'net.0.lora_A.default'"),
        (GroupedByLeaf, "AssertionError"),
        (GroupedByType, "adapted layers"),
        (GroupedByAttribute, "adapted layers"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters:UserWarning")
@pytest.mark.parametrize("options", [{}, {"loraplus_lr_ratio": 4.0}], ids=["plain", "loraplus"])
def test_factors_join_the_group_of_their_weight(module, failed, options, tmp_path):
    callback = lora(replace(CONFIG, bias="lora_only", variant="dora"), **options)
    by_hand, made = Grouped(), module()
    seed_everything(0)
    trainer(tmp_path, [callback]).fit(by_hand, loader())
    seed_everything(0)
    fails = pytest.warns(UserWarning, match=f"configure_optimizers .*{failed}") if failed else nullcontext()
    with pytest.warns(UserWarning, match="to the group of the weight"), fails:
        trainer(tmp_path, [callback]).fit(made, loader())
    assert differing(values(by_hand), values(made)) == set()


class OfAttention(Classifier):
    """Attention ahead of the network, with the output projection and the biases in groups of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        weights = [self.attention.out_proj.weight, *(p for p in self.net.parameters() if p.dim() > 1)]
        self.early = [weights, [p for p in self.parameters() if p.dim() == 1]]

    def forward(self, x):
        return self.net(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": group} for group in self.early], lr=0.1)


def test_a_weight_beside_the_adapted_one_does_not_tell_the_group(tmp_path):
    config = LoraConfig(r=2, target_modules=["attention", "net.0", "net.3"])
    with pytest.raises(StateError, match=r"in no optimizer.*it is not clear where"):
        fit(tmp_path, OfAttention(), config)


class Fails(Classifier):
    """Fails for a reason of its own."""

    calls = 0

    def configure_optimizers(self):
        self.calls += 1
        raise KeyError("its own")


def test_what_fails_without_factors_too_is_tried_twice_whatever_the_number_of_callbacks(tmp_path):
    module = Fails()
    before = dict(module.named_parameters()).keys()
    callbacks = [lora(replace(CONFIG, r=r), adapter_name=f"r{r}") for r in (1, 2, 3)]
    with pytest.raises(KeyError, match="its own"):
        trainer(tmp_path, callbacks).fit(module, loader())
    assert module.calls == 2
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 12, "both factors of both layers of each adapter are there again, and the base is frozen"
    assert not trained & before


class Subset(Classifier):
    """Its author trains a part of it: the first layer, by a list made when optimizers are made, or in `__init__`."""

    def __init__(self, early, groups=1):
        super().__init__()
        self.groups = groups
        self.early = list(self.net[0].parameters()) if early else None

    def configure_optimizers(self):
        chosen = self.early or [p for p in self.net[0].parameters() if p.requires_grad]
        step = -(-len(chosen) // self.groups)
        parts = [chosen[at : at + step] for at in range(0, len(chosen), step)]
        return torch.optim.SGD([{"params": part} for part in parts], lr=0.1)


@pytest.mark.parametrize(
    ("early", "groups"), [(False, 1), (False, 2), (True, 1)], ids=["late", "late_two_groups", "early"]
)
@pytest.mark.filterwarnings("ignore:The optimizer has nothing of the adapters:UserWarning")
def test_subset_is_respected_and_said(tmp_path, early, groups):
    module = Subset(early, groups)
    with pytest.warns(UserWarning, match=r"2 trainable tensors.*in no optimizer.*net\.3\.lora_A.*exclude_modules"):
        run = fit(tmp_path, module)
    names = {id(p): name for name, p in module.named_parameters()}
    assert {names[id(p)] for p in held(run) if p.requires_grad} == {f"net.0.lora_{x}.default" for x in "AB"}
    moved = {name: bool(p.abs().sum()) for name, p in lora_b(module).items()}
    assert moved == {"net.0.lora_B.default": True, "net.3.lora_B.default": False}


def test_head_that_the_optimizer_leaves_out_is_said(tmp_path):
    module = Subset(early=False)
    start = values(module)
    with pytest.warns(UserWarning, match=r"in no optimizer.*net\.3\.weight"):
        fit(tmp_path, module, LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"]))
    assert torch.equal(start["net.3.weight"], module.net[3].weight)


class Shared(Classifier):
    """Two optimizers of the same tensors, as Adam and then L-BFGS in a physics-informed network."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        def closure():
            loss = cross_entropy(self(batch[0]), batch[1])
            self.zero_grad()
            self.manual_backward(loss)
            return loss

        self.optimizers()[min(self.current_epoch, 1)].step(closure)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.Adam(trained, lr=0.01), torch.optim.LBFGS(trained, lr=0.1, max_iter=3)]


@pytest.mark.filterwarnings("ignore:Found 1 module:UserWarning")  # the frozen norm of the one that is adapted by hand
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # LBFGS of torch 2.8, once
def test_optimizers_that_share_tensors_each_train_them(tmp_path):
    by_hand, module = Shared(), Shared()
    LoraModel(by_hand, CONFIG)
    trainer(tmp_path, []).fit(by_hand, loader())
    trainer(tmp_path, [lora()]).fit(module, loader())
    assert differing(values(by_hand), values(module)) == set()
    assert learned(module)


class OneRests(Shared):
    """The second optimizer of the same tensors has a rate of 0, ahead of its turn."""

    def configure_optimizers(self):
        first, second = super().configure_optimizers()
        second.param_groups[0]["lr"] = 0.0
        return [first, second]


def test_an_optimizer_that_rests_beside_one_that_trains_is_no_reason_to_warn(tmp_path):
    """No warning passes in these tests."""
    module = OneRests()
    fit(tmp_path, module, max_epochs=1)
    assert learned(module)


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
    assert learned(module)


class Beside(Classifier):
    """Has an optimizer of its own for what is beside the network, as metric losses and discriminators have."""

    def __init__(self, author_freezes: bool):
        super().__init__()
        self.automatic_optimization = False
        self.beside = nn.Linear(3, 3).requires_grad_(not author_freezes)

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.beside(self(batch[0])), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.beside)]


IDLE = r"An optimizer \(SGD\) has 2 frozen tensors and no other.*'beside\.weight', 'beside\.bias'.*modules_to_save"


def test_optimizer_of_what_is_frozen_with_the_adapter_is_named(tmp_path):
    with pytest.warns(UserWarning, match=IDLE) as told:
        fit(tmp_path, Beside(author_freezes=False))
    assert sum("An optimizer" in str(warning.message) for warning in told) == 1


@pytest.mark.parametrize(
    ("author_freezes", "options"),
    [
        pytest.param(True, {"config": CONFIG}, id="frozen by its author"),
        pytest.param(False, {"config": replace(CONFIG, modules_to_save=["beside"])}, id="trained in full"),
        pytest.param(False, {"config": replace(CONFIG, target_modules="all"), "target": "net"}, id="beside the target"),
    ],
)
def test_optimizer_of_what_is_trained_or_the_authors_is_not_named(tmp_path, author_freezes, options):
    """No warning passes in these tests."""
    module = Beside(author_freezes)
    start = module.beside.weight.detach().clone()
    trainer(tmp_path, [lora(**options)]).fit(module, loader())
    assert torch.equal(start, module.beside.weight) is author_freezes


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter:UserWarning")  # pytest has arguments of its own
@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning")  # which is the point
class TestYaml:
    def test_optimizer_of_our_cli_trains_the_adapters_without_a_warning(self, tmp_path):
        made = cli(LoraCLI, tmp_path, {"lora": CONFIG.to_dict(), "lora_callback": {"merge_on_fit_end": False}})
        before = values(made.model)
        made.trainer.fit(made.model, loader())
        assert learned(made.model)
        assert {id(p) for p in held(made.trainer)} == {id(p) for p in made.model.parameters() if p.requires_grad}
        assert not differing(before, values(made.model)) & before.keys()
        assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)

    def test_optimizer_of_the_stock_cli_is_completed(self, tmp_path):
        made = cli(LightningCLI, tmp_path)
        made.trainer.callbacks.append(LoraCallback(CONFIG, merge_on_fit_end=False))
        with pytest.warns(UserWarning, match="has nothing of the adapters"):
            made.trainer.fit(made.model, loader())
        assert learned(made.model)
        assert made.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 4)

    def test_our_cli_without_lora_is_lightning_cli(self, tmp_path):
        made = cli(LoraCLI, tmp_path)
        made.trainer.fit(made.model, loader())
        assert not lora_b(made.model)
