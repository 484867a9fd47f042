"""State dicts that are loaded into a part of an adapted model."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError

X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_of(seed=0):
    torch.manual_seed(seed)
    backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6))
    return nn.Sequential(backbone, nn.Linear(6, 2)).double().eval()


def adapted(**fields):
    return LoraModel(model_of(), LoraConfig(r=2, target_modules=["0.0"], **{"init": "gaussian", **fields}), "a")


def by_itself(model):
    return model


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"modules_to_save": ["0.2"]}], ids=["plain", "biases", "norm"])
@pytest.mark.parametrize("part", ["0", "0.0"])
@pytest.mark.parametrize("again", [by_itself, copy.deepcopy])
def test_a_part_takes_its_base_as_the_whole_model_does(part, fields, strict, again):
    """As modules do that load a teacher when training starts: into a part of them, which may be adapted."""
    model, whole = (again(adapted(**fields).model) for _ in range(2))
    other = model_of(1).get_submodule(part).state_dict()
    before = dict(other)
    model.get_submodule(part).load_state_dict(other, strict=strict)
    assert other.keys() == before.keys()
    whole.load_state_dict({f"{part}.{key}": value for key, value in other.items()}, strict=False)
    assert torch.equal(model(X), whole(X))
    assert not torch.equal(model(X), adapted(**fields).model(X))
    for lora in (LoraModel(model), LoraModel(whole)):
        lora.unload()
    assert torch.equal(model(X), whole(X))


def test_keys_that_a_part_lacks_are_told_as_ever():
    lora, other = adapted(), model_of(1)[0].state_dict()
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.bias"'):
        lora.model[0].load_state_dict({key: value for key, value in other.items() if key != "0.bias"})


def test_a_base_that_an_init_has_changed_is_not_replaced_by_way_of_a_part():
    lora, other = adapted(init="pissa"), model_of(1)
    before = lora.model(X)
    with pytest.raises(StateError, match="'pissa', which changed the base"):
        lora.model[0].load_state_dict(other[0].state_dict())
    assert torch.equal(lora.model(X), before)


def test_a_layer_with_two_names_is_loaded_by_either():
    model = model_of()
    model.add_module("again", model[0])
    lora, other = LoraModel(model, LoraConfig(r=2, target_modules=["0.0"])), model_of(1)[0]
    lora.model.again.load_state_dict(other.state_dict())
    assert torch.equal(lora.model[0](X), other(X))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_part_without_its_model_takes_no_base(duplicate):
    part = duplicate(adapted().model[0])
    with pytest.raises(StateError, match=r"is a part of an adapted model, with '0\.0'.*into the whole model"):
        part.load_state_dict(model_of(1)[0].state_dict())


def test_the_way_the_message_says_is_right():
    lora, other = adapted(), model_of(1)
    part = {f"0.{key}": value for key, value in other[0].state_dict().items()}
    lora.model.load_state_dict(part, strict=False)
    with lora.disable_adapter():
        assert torch.equal(lora.model[0](X), other[0](X))


@pytest.mark.parametrize(
    ("enter", "leave", "message"),
    [
        pytest.param(lambda lora: lora.merge_adapter(), lambda lora: lora.unmerge_adapter(), "merged", id="merged"),
        pytest.param(lambda lora: lora.disable_adapter(), None, "inside disable_adapter", id="in a block"),
    ],
)
def test_nothing_is_loaded_that_would_be_lost(enter, leave, message):
    lora = adapted()
    own = copy.deepcopy(lora.model[0].state_dict())
    entered = enter(lora)
    if leave is None:
        entered.__enter__()
    with pytest.raises(StateError, match=f"nothing can be loaded into it .*{message}"):
        lora.model[0].load_state_dict(own)
    lora.model[1].load_state_dict(model_of(1)[1].state_dict())  # no adapter is there
    entered.__exit__(None, None, None) if leave is None else leave(lora)
    lora.model[0].load_state_dict({key: value + 1 for key, value in own.items()})
    assert torch.equal(lora.model[0][0].lora_A["a"], own["0.lora_A.a"] + 1)


def test_an_adapter_belongs_to_the_base_that_a_part_was_given(tmp_path):
    lora, other = adapted(), adapted()
    other.model.load_state_dict(model_of(1).state_dict())
    lora.save_adapter(tmp_path / "before")
    lora.model[0].load_state_dict(other.model[0].state_dict())
    with pytest.warns(UserWarning, match=r"does not hold '0\.0\.weight', '0\.0\.bias', which have changed"):
        lora.save_adapter(tmp_path / "after")
    LoraModel.load_adapter(model_of(1), tmp_path / "after")
    with pytest.raises(AdapterFileError):
        LoraModel.load_adapter(model_of(0), tmp_path / "after")


def test_an_adapter_belongs_to_the_base_that_was_written_in_place(tmp_path):
    lora, other = adapted(), model_of(1)
    lora.save_adapter(tmp_path / "before")
    with torch.no_grad():
        dict(lora.model.named_parameters())["0.0.weight"].copy_(other[0][0].weight)
    with pytest.warns(UserWarning, match=r"does not hold '0\.0\.weight', which have changed"):
        lora.save_adapter(tmp_path / "after")
    LoraModel.load_adapter(other, tmp_path / "after")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
@pytest.mark.parametrize("part", ["0", "0.0"])
def test_a_part_is_not_copied_inside_a_block(part, duplicate):
    lora = adapted()
    with lora.disable_adapter(), pytest.raises(StateError, match=r"'0\.0' cannot be copied or pickled inside"):
        duplicate(lora.model.get_submodule(part))
    twin = duplicate(lora.model.get_submodule(part))
    assert torch.equal(twin(X), lora.model.get_submodule(part)(X))


def test_the_untouched_model_loads_as_ever():
    lora = adapted()
    lora.unload()
    lora.model[0].load_state_dict(model_of(1)[0].state_dict())
    assert torch.equal(lora.model[0](X), model_of(1)[0](X))
    assert not any(module._load_state_dict_pre_hooks for module in lora.model.modules())


def test_only_parts_with_adapted_layers_are_watched():
    """What else a model has may be pickled by itself, as the loss among the hyperparameters of a LightningModule."""
    lora = adapted(modules_to_save=["1"])
    assert b"lora_plugins" not in pickle.dumps(lora.model[0][1])
    assert b"lora_plugins" not in pickle.dumps(lora.model[1])


def test_parts_of_a_later_adapter_take_their_base():
    lora, other = adapted(), model_of(1)
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["1"]))
    lora.model[1].load_state_dict(other[1].state_dict())
    with lora.disable_adapter():
        assert torch.equal(lora.model[1].weight, other[1].weight)


def test_parts_know_the_model_and_not_what_is_around_it():
    model, other = model_of(), model_of(1)
    LoraModel(torch.compile(model, backend="eager"), LoraConfig(r=2, target_modules=["0.0"]))
    for each in (model, copy.deepcopy(model)):
        each[0].load_state_dict(other[0].state_dict())
        assert torch.equal(each[0](X), other[0](X))


FIELDS = {"bias": ({"bias": "all"}, "0.0.bias"), "head": ({"modules_to_save": ["0.2"]}, "0.2.weight")}


@pytest.mark.parametrize(("fields", "name"), FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("active", [True, False], ids=["active", "waiting"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "as it was"])
def test_what_an_adapter_has_not_changed_becomes_that_of_the_new_base(trained, active, fields, name):
    """As where a module loads pretrained weights after it was adapted, and before it is trained."""
    model = model_of()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0.0"], **fields), "a")
    if trained:
        with torch.no_grad():
            model.get_parameter(name).add_(1)
    own = model.get_parameter(name).detach().clone()
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0.0"]))
    lora.set_adapter("a" if active else "b")
    new = model_of(seed=1)
    with torch.no_grad():
        new.get_parameter(name).add_(0.5)
    model.load_state_dict(new.state_dict())
    lora.set_adapter("b")
    assert torch.equal(model.get_parameter(name), new.get_parameter(name))
    lora.set_adapter("a")
    assert torch.equal(model.get_parameter(name), own if trained else new.get_parameter(name))
