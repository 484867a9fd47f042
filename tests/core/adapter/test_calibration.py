"""One pass over data: what is observed, what is left alone, and what is refused by name."""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lora_plugins import (
    Calibration,
    ConfigError,
    InitData,
    InitPlugin,
    LoraConfig,
    LoraModel,
    PluginError,
    RowMajorPlugin,
    StateError,
    TargetError,
    calibrate,
)
from lora_plugins.plugins import INITS, default_registry
from tests.core.libraries import Conv1D
from tests.core.registries import registry_of


class Net(nn.Module):
    """All that a pass could disturb: statistics, dropout, modes, a spectral norm's power iteration, rows of a table."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)
        self.table = nn.Embedding(1, 8, max_norm=0.1)
        self.norm.eval()

    def forward(self, x):
        x = self.spectral(self.drop(self.norm(self.conv(x)).relu()))
        return self.head(x.mean((2, 3)) + self.table(x.new_zeros(len(x), dtype=torch.long)))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 5, 5, generator=generator), torch.randint(0, 4, (size,), generator=generator))
        for _ in range(count)
    ]


CONFIGS = {
    "inputs": LoraConfig(r=2, target_modules=["conv", "head"], init="eva"),
    "gradients": LoraConfig(r=1, target_modules=["conv", "head"], init="lora_ga"),
    "gradients-tracked": LoraConfig(r=1, target_modules=["conv", "head"], init="lora_ga", norm="track"),
}
needs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def clip(layer):
    with torch.no_grad():
        layer.weight.clamp_(-0.1, 0.1)


def renorm(layer):
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 0.1)


def follow(layer):
    with torch.no_grad():
        layer.average.mul_(0.9)


def turn(layer):
    with torch.no_grad():
        layer.phase.mul_(1j)


WRITES = {
    "its weight in place": clip,
    "its weight anew": renorm,
    "an average of its own": follow,
    "a complex one": turn,
}


class Writing(nn.Linear):
    """Writes to its own parameters in each forward."""

    def __init__(self, write):
        super().__init__(8, 4)
        self.average = nn.Parameter(torch.ones(4), requires_grad=False)
        self.phase = nn.Parameter(torch.ones(4, dtype=torch.cfloat), requires_grad=False)
        self.write = write

    def forward(self, x):
        self.write(self)
        return super().forward(x) * self.average


def net() -> Net:
    torch.manual_seed(0)
    return Net()


class TestUndisturbed:
    @needs
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_model_gradients_and_random_numbers(self, config, training, untouched):
        model = net()
        model.drop.train(training)
        model.head.weight.grad = torch.ones_like(model.head.weight)
        model.conv.bias.requires_grad_(False)
        generator = torch.Generator().manual_seed(5)
        data = TensorDataset(torch.randn(24, 3, 5, 5), torch.randint(0, 4, (24,)))
        loader = DataLoader(data, 8, sampler=RandomSampler(data, generator=generator), generator=generator)
        state, python, numpy = generator.get_state(), random.getstate(), np.random.get_state()
        plan = LoraModel.plan(model, config)

        def step(model, batch):
            random.random()
            np.random.rand()
            return loss(model, batch)

        with untouched(model):
            calibrate(model, plan, InitData(loader, step))
        assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
        assert model.conv.weight.grad is None
        assert torch.equal(generator.get_state(), state)
        assert random.getstate() == python
        assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy, strict=True))

    @pytest.mark.parametrize("config", [CONFIGS["inputs"], CONFIGS["gradients"]], ids=["inputs", "gradients"])
    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
    def test_parameters_that_a_forward_writes(self, config, write, untouched):
        model = net()
        model.head = Writing(write)
        plan = LoraModel.plan(model, replace(config, target_modules=["conv"]))
        places = [parameter.data_ptr() for parameter in model.parameters()]
        with untouched(model):
            calibrate(model, plan, InitData(batches(), loss))
        assert [parameter.data_ptr() for parameter in model.parameters()] == places

    @needs
    def test_a_buffer_without_a_value_that_the_first_forward_sets(self, config, untouched):
        model = net()
        model.head.register_buffer("start", None)
        model.head.register_forward_pre_hook(lambda layer, args: setattr(layer, "start", args[0].detach().mean(0)))
        plan = LoraModel.plan(model, config)
        with untouched(model):
            calibrate(model, plan, InitData(batches(), loss))
        assert model.head.start is None

    @needs
    def test_a_step_that_fails(self, config, untouched):
        model = net()
        plan = LoraModel.plan(model, config)

        def step(model, batch):
            loss(model, batch)
            raise RuntimeError("no more data")

        with untouched(model), pytest.raises(RuntimeError, match="no more data"):
            calibrate(model, plan, InitData(batches(), step))

    @needs
    def test_the_adapters_of_a_model_do_not_act_and_stay(self, config):
        model = net()
        expected = calibrate(model, LoraModel.plan(model, config), InitData(batches(), loss)).by_slot
        lora = LoraModel(model, LoraConfig(r=2, init="none", modules_to_save=["head"], target_modules=["conv"]))
        with torch.no_grad():
            model.head.weight.add_(1)
        before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
        plan = LoraModel.plan(model, config)
        found = calibrate(model, plan, InitData(batches(), loss)).by_slot
        assert_same(found, expected)
        assert lora.active_adapters == ("default",)
        for name, parameter in model.named_parameters():
            value, requires_grad = before[name]
            assert torch.equal(parameter, value)
            assert parameter.requires_grad == requires_grad

    @needs
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    def test_modes_of_norms_that_another_adapter_freezes(self, config, training):
        model = net().train(training)
        lora = LoraModel(model, LoraConfig(r=2, target_modules=["conv"]))
        calibrate(model, LoraModel.plan(model, config), InitData(batches(), loss))
        assert not model.norm.training
        lora.unload()
        assert {module.training for module in model.modules()} == {training}

    @needs
    def test_what_was_called_before_it_is_compiled(self, config):
        """Compilers do not look for hooks that come after a call."""
        model = net().eval()
        plan = LoraModel.plan(model, config)
        expected = calibrate(model, plan, InitData(batches(), loss)).by_slot
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            loss(compiled, batches()[0])
        assert_same(calibrate(compiled, plan, InitData(batches(), loss)).by_slot, expected)

    @needs
    def test_in_inference_mode(self, config):
        model, data = net(), InitData(batches(), loss)
        plan = LoraModel.plan(model, config)
        expected = calibrate(model, plan, data).by_slot
        with torch.inference_mode():
            assert_same(calibrate(model, plan, data).by_slot, expected)
        loss(model, batches()[0]).backward()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, observed in found.items():
        if observed.gradient is not None:
            assert torch.equal(observed.gradient, expected[key].gradient)
        else:
            assert torch.equal(observed.inputs.gram, expected[key].inputs.gram)


LAYERS = {  # each with few positions, so that the span of its inputs is a statement
    "linear": (lambda: nn.Linear(12, 5), lambda: (torch.randn(2, 2, 12),)),
    "linear-one_vector": (lambda: nn.Linear(12, 5), lambda: (torch.randn(12),)),
    "conv1d_transformers": (lambda: Conv1D(5, 12), lambda: (torch.randn(3, 12),)),
    "conv1d-stride-dilation": (lambda: nn.Conv1d(6, 5, 3, stride=2, dilation=2), lambda: (torch.randn(2, 6, 8),)),
    "conv2d-groups": (lambda: nn.Conv2d(8, 6, 3, groups=2, stride=2), lambda: (torch.randn(1, 8, 5, 5),)),
    "conv2d-reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=3),
        lambda: (torch.randn(2, 4, 5, 5),),
    ),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same"), lambda: (torch.randn(1, 4, 2, 3),)),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), lambda: (torch.randn(4, 4, 4),)),
    "conv3d-padding": (lambda: nn.Conv3d(3, 4, 3, padding=1), lambda: (torch.randn(1, 3, 2, 2, 2),)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(12, 3, 3, stride=2), lambda: (torch.randn(1, 12, 2, 2),)),
}


class TestWhatIsSeen:
    @pytest.mark.parametrize(("make", "data"), LAYERS.values(), ids=LAYERS.keys())
    def test_gradients_lie_in_the_span_of_the_inputs(self, make, data):
        """The gradient of a matrix is a sum of outer products with what it was multiplied by."""
        torch.manual_seed(0)
        layer, args = make().double(), [x.double() for x in data()]
        plugin = default_registry().layer_for(type(layer))
        (slot,) = plugin.slots(layer)
        x = plugin.inputs(layer, slot, *args)
        out = layer(*args)
        (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), layer.weight)
        matrix = plugin.to_matrix(gradient)
        assert x.shape[1] == matrix.shape[1]
        assert torch.linalg.matrix_rank(x) < x.shape[1]
        rest = matrix - matrix @ torch.linalg.pinv(x) @ x
        assert rest.norm() <= 1e-10 * matrix.norm()

    def test_attention_sees_query_key_and_value(self):
        layer = nn.MultiheadAttention(8, 2, kdim=8, vdim=6)
        plugin = default_registry().layer_for(type(layer))
        query, key, value = torch.randn(3, 1, 8), torch.randn(4, 1, 8), torch.randn(4, 1, 6)
        slots = {slot.part: slot for slot in plugin.slots(layer)}
        found = {part: plugin.inputs(layer, slot, query, key, value=value) for part, slot in slots.items()}
        for part, given in (("q", query), ("k", key), ("v", value)):
            assert torch.equal(found[part], given[:, 0])
        fused = nn.MultiheadAttention(8, 2)
        (slot,) = plugin.slots(fused)
        assert len(plugin.inputs(fused, slot, query, key, key)) == 7

    def test_inputs_are_those_of_eval_mode(self):
        model = net()
        seen = []
        hook = model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        copy_of = copy.deepcopy(model).eval()
        for x, _ in batches():
            copy_of(x)
        hook.remove()
        x = torch.cat(seen)
        plan = LoraModel.plan(model, CONFIGS["inputs"])
        inputs = calibrate(model, plan, InitData(batches())).by_slot["head", ""].inputs
        assert inputs.count == 24
        torch.testing.assert_close(inputs.total, x.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inputs.scatter(), torch.cov(x.T, correction=0) * 24, rtol=1e-9, atol=1e-12)

    def test_gradients_are_the_average_over_batches(self):
        model = net().double()
        model.drop.p = 0.0
        data = [(x.double(), y) for x, y in batches()]
        twin = net().double().eval()
        twin.drop.p = 0.0
        nn.utils.parametrize.remove_parametrizations(twin.spectral, "weight")
        sum(loss(twin, batch) for batch in data).backward()
        plan = LoraModel.plan(model, CONFIGS["gradients"])
        seen = calibrate(model, plan, InitData(data, loss)).by_slot
        # The power iteration of a frozen spectral norm stands still, as it will in training.
        torch.testing.assert_close(seen["head", ""].gradient, twin.head.weight.grad / 3, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            seen["conv", ""].gradient, twin.conv.weight.grad.flatten(1) / 3, rtol=1e-9, atol=1e-12
        )

    def test_limit_stops_reading(self):
        read = []

        def endless():
            for batch in batches(100):
                read.append(batch)
                yield batch

        model = net()
        seen = calibrate(model, LoraModel.plan(model, CONFIGS["inputs"]), InitData(endless(), limit=2))
        assert len(read) == 2
        assert seen.by_slot["head", ""].inputs.count == 16

    @pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
    def test_a_batch_is_passed_to_the_model_by_its_form(self, form):
        make = {"tensor": lambda x: x, "tuple": lambda x: (x, "label"), "mapping": lambda x: {"x": x}}[form]
        model = net()
        data = InitData([make(x) for x, _ in batches()])
        assert calibrate(model, LoraModel.plan(model, CONFIGS["inputs"]), data).by_slot["conv", ""].inputs.count == 600

    @needs
    def test_is_reproducible_whatever_was_drawn_before(self, config):
        model, found = net(), []
        model.drop.train()
        data = TensorDataset(torch.randn(24, 3, 5, 5), torch.randint(0, 4, (24,)))
        for _ in range(2):
            torch.randn(3)
            loader = DataLoader(data, 8, shuffle=True)
            found.append(calibrate(model, LoraModel.plan(model, config), InitData(loader, loss, limit=2)).by_slot)
        assert_same(*found)


class TestUse:
    def test_once_for_several_adapters(self):
        model = net()
        seen = calibrate(model, LoraModel.plan(model, CONFIGS["inputs"]), InitData(batches()))
        fields = {"target_modules": ["conv"], "init": "eva", "init_options": {"niter": None}}
        lora = LoraModel(model, LoraConfig(r=2, **fields), "small", init_data=seen)
        lora.add_adapter("large", LoraConfig(r=4, **fields), init_data=seen)
        small, large = model.conv.lora_A["small"], model.conv.lora_A["large"]
        torch.testing.assert_close(small, large[:2], rtol=1e-4, atol=1e-5)

    def test_an_init_without_needs_reads_nothing(self):
        def never():
            raise AssertionError("the data were read")
            yield

        LoraModel(net(), LoraConfig(target_modules=["conv"]), init_data=InitData(never()))

    def test_a_third_party_can_ask_for_both_kinds(self):
        seen = {}

        class Asks(InitPlugin):
            def __init__(self, name, needs):
                self.name, self.needs = name, needs

            def fill(self, context):
                seen[self.name] = context.calibration
                context.A.fill_(1)
                context.B.zero_()
                return {}

        registry = registry_of(Asks("asks_inputs", "inputs"), Asks("asks_gradients", "gradients"))
        for name in ("asks_inputs", "asks_gradients"):
            config = LoraConfig(r=2, target_modules=["head"], init=name)
            LoraModel(net(), config, registry=registry, init_data=InitData(batches(), loss))
        assert seen["asks_inputs"].inputs.count == 24
        assert seen["asks_inputs"].gradient is None
        assert seen["asks_gradients"].gradient.shape == (4, 8)
        assert seen["asks_gradients"].inputs is None

    @pytest.mark.parametrize(
        ("ranks", "match"),
        [
            ({"gone": 2}, "not whole numbers up to 65536, or to unknown layers"),
            ({"head": 1.5}, "not whole numbers"),
            ({"head": -1}, "not whole numbers"),
            ({"head": 0}, "every layer the rank 0"),
        ],
        ids=["unknown layer", "fraction", "negative", "none left"],
    )
    def test_ranks_that_are_none_are_refused(self, ranks, match, untouched):
        class Ranks(InitPlugin):
            name = "ranks"
            needs = "inputs"

            def allocate(self, requests, options):
                return ranks

            def fill(self, context):
                raise AssertionError("an init whose ranks are refused was asked for values")

        model, data = net(), InitData(batches(), loss)
        config, registry = LoraConfig(r=2, target_modules=["head"], init="ranks"), registry_of(Ranks())
        with untouched(model), pytest.raises(PluginError, match=match):
            LoraModel(model, config, registry=registry, init_data=data)

    def test_an_unknown_need_is_refused_at_registration(self):
        class Odd(InitPlugin):
            name = "odd"
            needs = "activations"

            def fill(self, context):
                return {}

        with pytest.raises(PluginError, match="'needs'"):
            registry_of(Odd()).get(INITS, "odd")


class TestRefusals:
    def refused(self, config, data, error, match, untouched, model=None):
        model = net() if model is None else model
        with untouched(model), pytest.raises(error, match=match):
            LoraModel(model, config, init_data=data)

    @needs
    def test_no_data(self, config, untouched):
        match = rf"'{config.init}' learns .* from data.*init_data=InitData"
        self.refused(config, None, ConfigError, match, untouched)

    @needs
    def test_no_batches(self, config, untouched):
        self.refused(config, InitData([], loss), ConfigError, "no batches", untouched)

    @needs
    def test_batches_of_another_process_will_do(self, config, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(1))
        model = net()
        LoraModel(model, config, init_data=InitData([], loss))
        assert all(parameter.isfinite().all() for parameter in model.parameters())

    def test_observations_of_something_else(self, untouched):
        model = net()
        seen = calibrate(model, LoraModel.plan(model, CONFIGS["inputs"]), InitData(batches()))
        self.refused(CONFIGS["gradients"], seen, ConfigError, "needs the gradients of 'conv'", untouched)
        self.refused(CONFIGS["inputs"], Calibration(), ConfigError, "needs the inputs of 'conv'", untouched)

    @pytest.mark.parametrize(
        ("step", "match"),
        [
            (lambda model, batch: model(batch[0]), r"a tensor of \[8, 4\] instead of the loss"),
            (lambda model, batch: {"logits": 1}, "a NoneType instead of the loss"),
            (lambda model, batch: loss(model, batch).detach(), "detached"),
        ],
        ids=["logits", "no loss", "detached"],
    )
    def test_no_loss(self, step, match, untouched):
        self.refused(CONFIGS["gradients"], InitData(batches(), step), ConfigError, match, untouched)

    def test_a_layer_that_the_data_do_not_reach(self, untouched):
        model = net()
        model.spare = nn.Linear(4, 4)
        fields = {"target_modules": ["conv", "spare"], "r": 1}
        data = InitData(batches(), loss)
        match = r"'spare' saw no input \(1 of 2\)"
        self.refused(LoraConfig(init="eva", **fields), data, TargetError, match, untouched, model)
        match = r"'spare' got no gradient \(1 of 2\)"
        self.refused(LoraConfig(init="lora_ga", **fields), data, TargetError, match, untouched, model)

    def test_a_weight_that_is_read_without_calling_its_layer(self, untouched):
        class Reader(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv = nn.Linear(4, 4)

            def forward(self, x):
                return F.linear(x, self.qkv.weight)

        data = InitData([torch.randn(9, 4)], step=lambda model, x: model(x).square().mean())
        self.refused(LoraConfig(r=2, init="eva"), data, TargetError, "'qkv' saw no input", untouched, Reader())
        LoraModel(Reader(), LoraConfig(r=2, init="lora_ga"), init_data=data)  # its gradient is there all the same

    @pytest.mark.parametrize(
        "given", [lambda x: x[:, :3], lambda x: x[None], lambda x: None], ids=["narrow", "three dimensions", "none"]
    )
    def test_inputs_that_do_not_fit_the_weight(self, given, untouched):
        model, registry = self.odd(given)
        data = InitData([torch.ones(9, 4)])
        match = r"'0': its inputs came as .*, where its weight needs \(n, 4\)"
        with untouched(model), pytest.raises(TargetError, match=match):
            LoraModel(model, LoraConfig(r=2, init="eva"), registry=registry, init_data=data)

    def test_an_error_of_inputs_is_told_with_its_place(self, untouched):
        def fail(x):
            raise ValueError("no license server")

        model, registry = self.odd(fail)
        with untouched(model), pytest.raises(ValueError, match="license") as caught:
            LoraModel(model, LoraConfig(r=2, init="eva"), registry=registry, init_data=InitData([torch.ones(9, 4)]))
        assert caught.value.__notes__ == ["It was raised in inputs() of the layer type 'odd', for '0'."]

    @staticmethod
    def odd(given):
        """A model of one layer, and a plugin for it whose `inputs` is this function of `x`."""

        class Odd(nn.Linear):
            pass

        class OddPlugin(RowMajorPlugin):
            name = "odd"
            module_type = Odd

            def inputs(self, layer, slot, x):
                return given(x)

        return nn.Sequential(Odd(4, 4)), registry_of(OddPlugin())

    def test_lookups_have_no_inputs(self, untouched):
        model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 5))
        data = InitData([torch.tensor([0, 3, 6])])
        self.refused(
            LoraConfig(r=2, init="eva"), data, TargetError, "'0': .*'embedding' does not say", untouched, model
        )

    def test_a_computed_weight_has_no_gradient(self, untouched):
        config = LoraConfig(r=2, target_modules=["spectral"], init="lora_ga")
        said = "'spectral': 'weight' is a buffer, or computed"
        self.refused(config, InitData(batches(), loss), TargetError, said, untouched)

    @pytest.mark.parametrize("config", [CONFIGS["inputs"], CONFIGS["gradients"]], ids=["inputs", "gradients"])
    def test_what_is_not_finite(self, config, untouched):
        data = InitData([(torch.full((2, 3, 5, 5), float("nan")), torch.tensor([0, 1]))], loss)
        self.refused(config, data, TargetError, "'conv'.* not finite", untouched)

    def test_while_merged(self):
        model = net()
        lora = LoraModel(model, LoraConfig(target_modules=["conv"], init="none"))
        lora.merge_adapter()
        plan = LoraModel.plan(model, LoraConfig(r=2, target_modules=["head"], init="eva"))
        with pytest.raises(StateError, match="Calibrating"):
            calibrate(model, plan, InitData(batches()))


def test_layers_that_are_called_with_keywords_are_observed():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            return self.layer(input=x)

    data = InitData([torch.randn(12, 6)])
    LoraModel(Named(), LoraConfig(r=2, target_modules=["layer"], init="eva"), init_data=data)


class Doubling(nn.Linear):
    def forward(self, x, twice=False):
        return super().forward(2 * x if twice else x)


class OwnHooks(nn.Linear):
    def register_forward_pre_hook(self, stage):
        raise AssertionError


def test_a_layer_with_a_method_of_torchs_name_is_observed():
    """As the models of otx have hooks of their own."""
    model = nn.Sequential(OwnHooks(4, 4))
    config = LoraConfig(r=2, target_modules="all", init="eva")
    LoraModel(model, config, init_data=InitData([torch.randn(8, 4) for _ in range(2)]))
    assert model[0].lora_A["default"].any()


class Asked(nn.Module):
    """Calls a layer with more than its base class takes, if asked for."""

    def __init__(self):
        super().__init__()
        self.layer = Doubling(6, 4)

    def forward(self, x, twice):
        return self.layer(x, twice=True) if twice else self.layer(x)


def test_what_is_no_tensor_is_passed_on():
    model, data = Asked(), [{"x": torch.ones(12, 6), "twice": False}]
    plan = LoraModel.plan(model, LoraConfig(r=2, target_modules=["layer"], init="eva"))
    assert calibrate(model, plan, InitData(data)).by_slot["layer", ""].inputs.count == 12


def test_arguments_that_the_plugin_does_not_know_are_named():
    model, data = Asked(), [{"x": torch.ones(12, 6), "twice": True}]
    before = copy.deepcopy(model.state_dict())
    config = LoraConfig(r=2, target_modules=["layer"], init="eva")
    with pytest.raises(TargetError, match="'layer': the plugin 'linear' does not understand what this Doubling is"):
        LoraModel(model, config, init_data=InitData(data))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class SaysNothing(RowMajorPlugin):
    name = "says_nothing"
    module_type = Doubling

    def inputs(self, layer, slot, *args, **kwargs):
        raise NotImplementedError


def test_a_layer_whose_plugin_does_not_say_its_inputs_is_named():
    model, registry = nn.Sequential(Doubling(6, 4)), registry_of(SaysNothing())
    with pytest.raises(TargetError, match="'0': the plugin 'says_nothing' does not say what 'weight' of this Doubling"):
        LoraModel(model, LoraConfig(r=2, init="eva"), registry=registry, init_data=InitData([torch.ones(12, 6)]))
    assert type(model[0]) is Doubling


@pytest.mark.parametrize("others", [[], [nn.Linear(4, 2)]], ids=["a model of buffers", "beside parameters"])
def test_a_weight_that_is_a_buffer_is_observed(others):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    x = torch.randn(9, 4)
    model = nn.Sequential(layer, *others)
    calibration = calibrate(
        model, LoraModel.plan(model, LoraConfig(r=2, target_modules=["0"], init="eva")), InitData([x])
    )
    x = x.double()  # the moments are sums in float64
    torch.testing.assert_close(calibration.by_slot["0", ""].inputs.gram, x.T @ x, rtol=1e-12, atol=1e-12)
