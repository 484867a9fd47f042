"""The handle: every word of the guide, several adapters, trained heads and biases, norms, and what is trained."""

import copy
import time

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from lora_plugins import ConfigError, LoraConfig, LoraModel, StateError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x)).mean((2, 3))))


X = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(3))


def config(**fields) -> LoraConfig:
    return LoraConfig(**{"r": 2, "init": "none", "target_modules": ["stem", "body"], **fields})


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    model.eval()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def same_bits(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


FACTORS = {f"{layer}.lora_{factor}.default" for layer in ("stem", "body") for factor in "AB"}


def test_what_a_handle_is_shown_as():
    lora = LoraModel(Net(), config())
    lora.add_adapter("other", config(target_modules=["body"]))
    assert repr(lora) == "<LoraModel of Net: 'default' on 2 layers (active), 'other' on 1 layer (inactive)>"
    lora.merge_adapter()
    assert "'default' on 2 layers (merged)" in repr(lora)
    lora.unload()
    assert repr(lora) == "<LoraModel of Net: no adapter>"


@pytest.mark.parametrize(
    ("fields", "own"),
    [
        ({}, set()),
        ({"bias": "lora_only"}, {"stem.bias", "body.bias"}),
        ({"bias": "all"}, {"stem.bias", "body.bias", "norm.bias", "head.0.bias", "head.1.bias"}),
        ({"modules_to_save": ["head"]}, {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}),
        ({"modules_to_save": ["norm.weight"]}, {"norm.weight"}),
    ],
    ids=["none", "lora_only", "all", "head", "parameter"],
)
def test_exactly_this_is_trained_and_the_base_comes_back(fields, own):
    model = Net()
    original = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    lora = LoraModel(model, config(**fields))
    assert trainable(model) == FACTORS | own
    train(model)
    state = model.state_dict()
    moved = {name for name in original if not torch.equal(state[name], original[name])}
    in_head = {name for name in original if name.startswith("head.0") and "modules_to_save" in fields}
    assert own <= moved <= own | (in_head if "head" in fields.get("modules_to_save", []) else set())
    trained_output = model(X)
    with lora.disable_adapter():
        assert same_bits({k: v for k, v in model.state_dict().items() if "lora_" not in k}, original)
    assert torch.equal(model(X), trained_output)
    assert trainable(model) == FACTORS | own
    lora.unload()
    assert same_bits(model.state_dict(), original)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_disabled_model_can_be_used_between_forward_and_backward():
    model = Net().eval()
    lora = LoraModel(model, config(modules_to_save=["head"]))
    loss = model(X).square().mean()
    with lora.disable_adapter(), torch.no_grad():
        model(X)
    loss.backward()
    assert model.head[1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("fields", [{}, {"bias": "all", "modules_to_save": ["head"]}], ids=["plain", "heads"])
def test_adapters_keep_what_is_theirs(fields, tmp_path):
    model = Net().eval()
    base_output = model(X)
    lora = LoraModel(model, config(**fields), "a")
    lora.add_adapter("b", config(**fields))
    outputs = {}
    for name in ("a", "b"):
        lora.set_adapter(name)
        assert all(parameter.endswith(f".{name}") for parameter in trainable(model) if "lora_" in parameter)
        train(model)
        outputs[name] = model(X)
        lora.save_adapter(tmp_path / name)
    for name in ("a", "b", "a"):
        lora.set_adapter(name)
        assert torch.equal(model(X), outputs[name])
    with lora.disable_adapter():
        assert torch.equal(model(X), base_output)
    lora.delete_adapter("a")
    lora.set_adapter("b")
    assert torch.equal(model(X), outputs["b"])
    assert not any(".a" in key for key in model.state_dict())
    lora.delete_adapter("b")
    assert torch.equal(model(X), base_output)
    for name in ("a", "b"):
        LoraModel.load_adapter(model, tmp_path / name, name)
    assert torch.equal(model(X), outputs["a"])
    LoraModel(model).set_adapter("b")
    assert torch.equal(model(X), outputs["b"])


def test_updates_of_active_adapters_add_up():
    model = Net().double().eval()
    lora = LoraModel(model, config(), "a")
    lora.add_adapter("b", config(r=3, target_modules=["body"]))
    weights = {}
    for names in (("a",), ("b",), ("a", "b")):
        lora.set_adapter(names)
        weights[names] = model.body.weight.detach()
    with lora.disable_adapter():
        base = model.body.weight.detach()
    torch.testing.assert_close(weights["a", "b"], weights["a",] + weights["b",] - base, rtol=1e-12, atol=1e-12)


def test_updates_of_active_adapters_are_rounded_together():
    """Each alone is less than half of what bfloat16 tells apart near one."""
    model = nn.Sequential(nn.ConvTranspose1d(2, 2, 1)).bfloat16()
    lora = LoraModel(model, LoraConfig(r=1, alpha=1), "a")
    lora.add_adapter("b", LoraConfig(r=1, alpha=1))
    with torch.no_grad():
        model[0]._parameters["weight"].fill_(1)
        for name in ("a", "b"):
            model[0].lora_A[name].fill_(0.003)
            model[0].lora_B[name].fill_(1)
    lora.set_adapter(["a", "b"])
    found = model[0].weight.detach()
    lora.merge_adapter(max_error=1)
    assert torch.equal(found, model[0].weight)
    assert (found > 1).all()


def test_one_name_is_no_list_of_its_letters():
    model, x = nn.Sequential(nn.Linear(4, 2)).eval(), torch.randn(1, 4)
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "rain")
    expected = model(x)
    lora.add_weighted_adapter("rain", [1.0], "same")
    for name in ("rain", "same"):
        with torch.no_grad(), lora.mixed_batch(name):
            torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda lora: lora.set_adapter([None]), id="set"),
        pytest.param(lambda lora: lora.merge_adapter([None]), id="merge"),
        pytest.param(lambda lora: lora.add_weighted_adapter([None], [1.0], "c"), id="combine"),
    ],
)
def test_none_names_no_adapter(call):
    with pytest.raises(StateError, match=r"no adapter None\. There is 'rain'"):
        call(LoraModel(nn.Sequential(nn.Linear(4, 2)), LoraConfig(r=2), "rain"))


@pytest.mark.parametrize("call", ["set_adapter", "merge_adapter"])
def test_a_repeated_name_is_refused(call, untouched):
    lora = LoraModel(Net().eval(), config(), "a")
    with untouched(lora.model), pytest.raises(ConfigError, match="'a' is named more than once"):
        getattr(lora, call)(["a", "a"])


def test_two_values_of_one_head_cannot_be_active_together():
    model = Net()
    lora = LoraModel(model, config(modules_to_save=["head"]), "a")
    lora.add_adapter("b", config(modules_to_save=["head"]))
    with pytest.raises(StateError, match=r"'a' and 'b' cannot be active together.*'head\.0\.weight'"):
        lora.set_adapter(["a", "b"])
    assert lora.active_adapters == ("a",)


def test_an_adapter_can_be_active_without_being_trained():
    model = Net()
    lora = LoraModel(model, config(bias="all"))
    lora.set_adapter("default", trainable=False)
    assert trainable(model) == set()
    lora.set_adapter("default")
    assert trainable(model) >= FACTORS


class TestNorm:
    @pytest.mark.parametrize("norm", ["freeze", "track"])
    def test_statistics(self, norm, tmp_path):
        base = Net()
        model = copy.deepcopy(base)
        lora = LoraModel(model, config(norm=norm))
        train(model)
        moved = not torch.equal(model.norm.running_mean, base.norm.running_mean)
        assert moved == (norm == "track")
        model.train()
        assert model.norm.training == (norm == "track")
        output = model.eval()(X)
        lora.save_adapter(tmp_path)
        fresh = copy.deepcopy(base).eval()
        LoraModel.load_adapter(fresh, tmp_path)
        assert torch.equal(fresh(X), output)
        with lora.disable_adapter():
            assert torch.equal(model(X), base.eval()(X))
        lora.unload()
        assert same_bits(model.state_dict(), base.state_dict())
        assert type(model.norm) is nn.BatchNorm2d
        assert model.train().norm.training

    @pytest.mark.parametrize("training", [True, False])
    def test_unloaded_layers_are_in_the_mode_that_was_asked_for_last(self, training):
        model = Net().train(not training)
        lora = LoraModel(model, config())
        model.train(training)
        assert not model.norm.training
        assert lora.unload().norm.training == training

    @pytest.mark.parametrize("end", ["unload", "merge_and_unload"])
    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Linear(4, 3), torch.ones(2, 4)),
            (nn.Conv2d(4, 3, 1), torch.ones(1, 4, 2, 2)),
            (nn.Embedding(4, 3), torch.tensor([1, 3])),
        ],
        ids=["linear", "convolution", "embedding"],
    )
    def test_a_method_that_hooks_of_others_have_kept_is_that_of_the_layer(self, layer, x, end):
        """As those of accelerate and diffusers that move weights for the duration of a call."""
        model = nn.Sequential(copy.deepcopy(layer))
        lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], init="none"))
        model[0].forward = model[0].forward
        adapted = model(x)
        assert not torch.equal(adapted, layer(x))
        getattr(lora, end)()
        assert torch.allclose(model(x), layer(x) if end == "unload" else adapted)

    def test_a_head_keeps_its_own_statistics(self):
        model = Net()
        LoraModel(model, config(modules_to_save=["head"]))
        model.train()
        assert model.head[0].training
        assert not model.norm.training

    @pytest.mark.parametrize("averaged", [False, True], ids=["model", "average"])
    def test_statistics_that_stand_still_are_not_counted_again(self, averaged):
        """As torch's stochastic weight averaging does at its end."""
        model = Net()
        model.norm.running_mean.uniform_()
        LoraModel(model, config(modules_to_save=["head"]))
        model = AveragedModel(model) if averaged else model
        inner = model.module if averaged else model
        before = copy.deepcopy(inner.norm.state_dict())
        update_bn([X, X], model.train())
        assert same_bits(inner.norm.state_dict(), before)
        with torch.no_grad():
            features = inner.eval().body(inner.norm(inner.stem(X)).mean((2, 3)))
        assert torch.allclose(inner.head[0].running_mean, features.mean(0), atol=1e-6)

    def test_copies_stay_frozen(self):
        model = Net()
        LoraModel(model, config())
        assert not copy.deepcopy(model).train().norm.training


class TestTypes:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
    def test_factors_are_float32_at_least_and_what_is_the_models_own_keeps_its_type(self, dtype):
        model = Net().to(dtype).eval()
        lora = LoraModel(model, config(), "plain")  # whose float32 tensors do not count for the next one
        lora.add_adapter("headed", config(modules_to_save=["head"], bias="all"))
        lora.set_adapter("headed")
        trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        wide = torch.promote_types(dtype, torch.float32)
        assert trained == {name: wide if "lora_" in name else dtype for name in trained}
        model(X.to(dtype)).sum().backward()
        lora.merge_and_unload(max_error=1.0)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(X.to(dtype)).dtype == dtype

    def test_a_bfloat16_run_stays_runnable(self):
        model = Net().bfloat16().eval()
        LoraModel(model, config(modules_to_save=["head"], bias="all"))
        output = model(X.bfloat16())
        assert output.dtype == torch.bfloat16
        output.sum().backward()

    def test_autocast_follows_float32(self):
        model = Net().eval()
        LoraModel(model, config())
        expected = model(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.stem.weight.dtype == torch.float32
            got = model(X)
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)  # bfloat16 has three digits

    def test_moves_with_the_model(self):
        model = Net()
        lora = LoraModel(model, config(modules_to_save=["head"]))
        model.double()
        assert model.body.lora_A["default"].dtype == torch.float64
        with lora.disable_adapter():
            model(X.double())


class TestBaseCheckpoints:
    def test_load_strictly_before_and_after(self):
        base, model = Net(), Net()
        LoraModel(model, config())
        A = model.body.lora_A["default"].detach().clone()
        model.load_state_dict(base.state_dict())
        assert torch.equal(model.body.lora_A["default"], A)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in base.state_dict().items())

    def test_a_checkpoint_with_some_of_the_adapter_is_still_checked(self):
        model = Net()
        LoraModel(model, config())
        state = model.state_dict()
        del state["body.lora_A.default"]
        with pytest.raises(RuntimeError, match=r'Missing key.*"body\.lora_A\.default"'):
            model.load_state_dict(state)

    def test_base_keys_do_not_change(self):
        model = Net()
        keys = list(model.state_dict())
        LoraModel(model, config())
        assert [key for key in model.state_dict() if "lora_" not in key] == keys


@pytest.mark.parametrize("name", ["a.b", "", "a/b", "-a", "a b"], ids=repr)
def test_bad_adapter_names(name):
    model = Net()
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        LoraModel(model, config(), name)
    assert type(model.body) is nn.Linear


@pytest.mark.parametrize("name", ["keys", "half", "weight", "lora", "default", "0"], ids=repr)
def test_any_other_name_works(name, tmp_path):
    base = Net().eval()
    model = copy.deepcopy(base)
    LoraModel(model, config(), name).save_adapter(tmp_path)
    LoraModel.load_adapter(base, tmp_path)
    assert torch.equal(base(X), model(X))


def test_a_handle_needs_an_adapter():
    with pytest.raises(StateError, match="The model has no adapter"):
        LoraModel(Net())
    lora = LoraModel(Net(), config())
    lora.unload()
    with pytest.raises(StateError, match="unloaded"):
        lora.set_adapter("default")


class TestGuides:
    """The counts of PEFT's published guides, from random-weight models.

    What the guides call `query` and `value` is `q_proj` and `v_proj` in the models of transformers 5.
    """

    def test_vit_base_on_food101(self, capsys):
        transformers = pytest.importorskip("transformers")
        model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=101))
        fields = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        LoraModel(model, LoraConfig(r=16, alpha=16, dropout=0.1, **fields)).print_trainable_parameters()
        assert capsys.readouterr().out.startswith("trainable params: 667,493 ||")

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks the old way
    def test_segformer_b0_on_scene_parse_150(self, capsys):
        transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
        model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=150))
        fields = {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only", "modules_to_save": ["decode_head"]}
        reference = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=32, lora_alpha=32, **fields))
        expected, _ = reference.get_nb_trainable_parameters()
        LoraModel(model, LoraConfig(r=32, alpha=32, **fields)).print_trainable_parameters()
        assert capsys.readouterr().out.startswith(f"trainable params: {expected:,} ||")


def test_a_thousand_layers(record_property):
    """Measured, not asserted: see the benchmarks for the ratio to PEFT."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(1000)])
    start = time.perf_counter()
    lora = LoraModel(model, LoraConfig())
    record_property("inject_seconds", time.perf_counter() - start)
    start = time.perf_counter()
    lora.unload()
    record_property("unload_seconds", time.perf_counter() - start)
    assert all(type(layer) is nn.Linear for layer in model)


class TestNested:
    """Two handles over the same layers would each keep a state of them."""

    def test_a_part_of_an_adapted_model(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        lora = LoraModel(model, LoraConfig(r=2))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(StateError, match="a part of an adapted one"):
            LoraModel(model[1], LoraConfig(r=2), "b")
        with pytest.raises(StateError, match="a part of an adapted one"):
            LoraModel(model[1])
        assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])] == []
        with pytest.raises(StateError, match="copy the whole model and take the part from that copy"):
            LoraModel(copy.deepcopy(model[1]))
        copied = copy.deepcopy(model)
        LoraModel(copied).unload()
        LoraModel(copied[1], LoraConfig(r=2), "b")
        lora.unload()
        LoraModel(model[1], LoraConfig(r=2), "b")

    def test_a_model_with_an_adapted_part(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        part = LoraModel(model[1], LoraConfig(r=2))
        with pytest.raises(StateError, match=r"'1' in this model has adapters already.*get_submodule\('1'\)"):
            LoraModel(model, LoraConfig(r=2), "b")
        with pytest.raises(StateError, match=r"'1' in this model has adapters already.*get_submodule\('1'\)"):
            LoraModel(model)
        assert all(parameter.requires_grad for parameter in model[0].parameters())
        LoraModel(model[0], LoraConfig(r=2))  # side by side
        part.unload()


@pytest.mark.parametrize("format", ["lora_plugins", "peft"])
def test_a_file_is_no_place_for_a_folder(tmp_path, format):
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2))
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"path is .*file.* Name a(nother place| folder)\."):
            lora.save_adapter(path, format=format)
    assert (tmp_path / "file").read_text() == "kept"


def test_factors_are_listed_by_adapter():
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), "first")
    lora.add_adapter("second", LoraConfig(r=1, target_modules=["0"]))
    factors = lora.model[0].lora_A
    assert [*factors] == ["first", "second"]
    assert [factors[name].shape[0] for name in factors] == [2, 1]
