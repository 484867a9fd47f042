"""Arguments that are swapped, of another type or of another library: the error says what to write."""

import contextlib
import copy
import importlib
import inspect
import pickle
import re

import pytest
import torch
from torch import nn

from lora_plugins import (
    ConfigError,
    InitData,
    LoraConfig,
    LoraError,
    LoraModel,
    PluginError,
    TargetError,
    build_registry,
    calibrate,
    load_quantized,
)
from lora_plugins.words import ARGUMENTS, FUNCTIONS, INITS, MEMBERS, VARIANTS

CONFIG = LoraConfig(r=2, target_modules=["0"])


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def lora():
    return LoraModel(net(), CONFIG)


class Holder:
    """What holds a module, as trainers and pipelines do."""

    model = nn.Linear(2, 2)


MODEL_FIRST = r"Write LoraModel\(model, config\)"
LOAD = r"Write LoraModel\.load_adapter\(model, path\)"

CALLS = [
    pytest.param(lambda: LoraModel(CONFIG, net()), f"swapped. {MODEL_FIRST}", id="config, model"),
    pytest.param(lambda: LoraModel(config=net(), model=CONFIG), f"swapped. {MODEL_FIRST}", id="by name"),
    pytest.param(lambda: LoraModel.plan(CONFIG, net()), r"swapped.*plan\(model, config\)", id="plan"),
    pytest.param(lambda: LoraModel.load_adapter("here", net()), f"swapped. {LOAD}", id="path, model"),
    pytest.param(lambda: lora().load_adapter("here"), f"model is a str.*{LOAD}", id="load on the handle"),
    pytest.param(lambda: lora().load_adapter("here", "b"), f"model is a str.*{LOAD}", id="load a second on the handle"),
    pytest.param(lambda: LoraModel.load_adapter(net(), net()), "path is a Sequential", id="two models"),
    pytest.param(
        lambda: lora().add_adapter(CONFIG, "b"), r"swapped.*add_adapter\(adapter_name, config\)", id="config, name"
    ),
    pytest.param(lambda: lora().add_adapter(CONFIG), r"adapter_name is a LoraConfig.*name, config\)", id="no name"),
    pytest.param(lambda: LoraModel(net(), {"r": 4}), r"config is a dict.*LoraConfig\(\*\*values\)", id="dict"),
    pytest.param(lambda: LoraModel(net(), LoraConfig), "the class LoraConfig, .*an instance", id="class for a config"),
    pytest.param(lambda: LoraModel(net(), "here"), r"load_adapter\(model, 'here'\)", id="path for a config"),
    pytest.param(lambda: LoraModel(net(), 8), f"config is an int.*{MODEL_FIRST}", id="rank for a config"),
    pytest.param(lambda: LoraModel("google/vit", CONFIG), f"model is a str.*{MODEL_FIRST}", id="name of a model"),
    pytest.param(lambda: LoraModel(nn.Linear, CONFIG), f"model is the class Linear.*{MODEL_FIRST}", id="class"),
    pytest.param(lambda: LoraModel(Holder(), CONFIG), "model is a Holder.*attribute 'model'", id="a trainer"),
    pytest.param(lambda: LoraModel(lora(), CONFIG), "model is a LoraModel.*attribute 'model'", id="a handle"),
    pytest.param(lambda: lora().save_adapter(3), r"path is an int.*save_adapter\(path\)", id="no path"),
    pytest.param(lambda: lora().merge_and_unload(safe_merge=True), "'safe_merge'.*always checked", id="safe_merge"),
    pytest.param(lambda: lora().unload(adapter_name="a"), "Where several may be named, it is", id="one of all"),
    pytest.param(lambda: lora().delete_adapter(adapter_names=["a"]), "it is .adapter_name. here", id="several"),
    pytest.param(
        lambda: lora().merge_and_unload(dequantize="no"), "dequantize is a str.* has to be True or False", id="no flag"
    ),
    pytest.param(lambda: LoraConfig(load_in_4bit=True), "Write quantize='nf4'", id="load_in_4bit"),
    pytest.param(lambda: lora().merge_and_unload(progressbar=True), "'progressbar'. Leave it out", id="progressbar"),
    pytest.param(lambda: lora().set_adapter("default", inference_mode=True), "trainable=False", id="inference_mode"),
    pytest.param(lambda: LoraModel.load_adapter(net(), "a", is_trainable=True), "can be trained", id="is_trainable"),
    pytest.param(lambda: LoraModel.load_adapter(net(), model_id="a"), "It is 'path' here", id="model_id"),
    pytest.param(lambda: lora().save_adapter(save_directory="a"), "It is 'path' here", id="save_directory"),
    pytest.param(
        lambda: lora().add_weighted_adapter(["default"], [1.0], "b", "svd", svd_rank=2), "is 'rank' here", id="svd_rank"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "said"), CALLS)
def test_a_wrong_argument_is_told_what_to_write(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


@pytest.mark.parametrize(
    ("call", "error"),
    [(lambda: lora().merge_and_unload(safe=True), "safe"), (lambda: LoraModel.load_adapter(net()), "path")],
    ids=["unknown", "missing"],
)
def test_what_nobody_calls_so_is_pythons_error(call, error):
    with pytest.raises(TypeError, match=error):
        call()


def test_a_refused_call_changes_nothing():
    handle = lora()
    before = {name: tensor.clone() for name, tensor in handle.model.state_dict().items()}
    with pytest.raises(ConfigError):
        handle.merge_and_unload(safe_merge=True)
    assert handle.adapters.keys() == {"default"}
    assert all(tensor.equal(before[name]) for name, tensor in handle.model.state_dict().items())


VALUES = (
    None,
    True,
    -1,
    1.5,
    float("nan"),
    10**30,
    "x",
    b"x",
    [],
    [1],
    ["a", 1],
    {"a": 1},
    object(),
    nn.Linear(2, 2),
    int,
)
"""What may be given where something else is expected."""

GOOD = {
    "plan": {"model": net(), "config": CONFIG, "registry": None},
    "add_adapter": {"adapter_name": "b", "config": CONFIG},
    "set_adapter": {"adapter_names": "default", "weights": None, "trainable": True},
    "mixed_batch": {"adapter_names": ["default"]},
    "delete_adapter": {"adapter_name": "default"},
    "merge_adapter": {"adapter_names": None, "max_error": 0.1},
    "unload": {"dequantize": None},
    "merge_and_unload": {"max_error": 0.1, "dequantize": False},
    "add_weighted_adapter": {
        "adapters": ["default"],
        "weights": [1.0],
        "adapter_name": "b",
        "combination_type": "ties",
        "density": 0.5,
    },
    "save_adapter": {"path": "out", "adapter_name": "default", "format": "peft", "format_options": None},
    "load_adapter": {
        "model": net(),
        "path": "saved",
        "adapter_name": None,
        "format": None,
        "format_options": None,
    },
    "swap_adapter": {"adapter_name": "default", "path": "saved", "format": None, "format_options": None},
    "push_to_hub": {"repository": "a/b", "license": None, "revision": None, "private": None, "metrics": None},
    "pack": {"adapter_name": "default"},
}
"""By method, arguments that it takes."""


@pytest.mark.parametrize(
    ("method", "argument"), [(method, argument) for method, arguments in GOOD.items() for argument in arguments]
)
def test_an_argument_of_any_other_type_is_no_error_of_python(method, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lora().save_adapter("saved")
    for value in VALUES:
        with contextlib.suppress(LoraError):
            getattr(lora(), method)(**{**copy.deepcopy(GOOD[method]), argument: value})


LEARNS = LoraConfig(r=2, target_modules=["0"], init="eva")

FUNCTIONS_OF_OURS = {
    build_registry: {"extra": [], "allow": None, "block": [], "files": []},
    calibrate: {"model": net(), "plan": LoraModel.plan(net(), LEARNS), "data": InitData([torch.ones(2, 4)])},
    load_quantized: {"model": net(), "path": "base", "config": LoraConfig(quantize="nf4"), "registry": None},
}
"""By function, arguments that it takes."""


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        pytest.param(function, argument, id=f"{function.__name__}-{argument}")
        for function, arguments in FUNCTIONS_OF_OURS.items()
        for argument in arguments
    ],
)
def test_an_argument_of_a_function_of_any_other_type_is_no_error_of_python(function, argument):
    for value in VALUES:
        with contextlib.suppress(LoraError):
            function(**{**copy.copy(FUNCTIONS_OF_OURS[function]), argument: value})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: build_registry([object()]), r"build_registry: extra lists pairs .*\[\('mine', MyPlugins\(\)\)\], not"),
        (lambda: build_registry({"mine": object()}), "extra lists pairs"),
        (lambda: build_registry(allow="mine"), "allow is a list of names, not 'mine'"),
        (lambda: build_registry(files="mine.py"), "files is a list of paths, not 'mine.py'"),
        (lambda: LoraModel(net(), CONFIG, registry=[]), r"registry is what build_registry\(.* returns, not \[\]"),
        (lambda: calibrate(net(), LEARNS, InitData([])), r"plan is a LoraConfig. Give what LoraModel\.plan\("),
        (
            lambda: calibrate(nn.Linear(2, 2), LoraModel.plan(net(), LEARNS), InitData([torch.ones(1, 2)])),
            "plan is of another model. Linear has no module '0'",
        ),
        (lambda: calibrate(net(), LoraModel.plan(net(), LEARNS), []), r"data is a list. Write InitData\(batches\)"),
        (lambda: load_quantized("base", net(), CONFIG), r"swapped. Write load_quantized\(model, path, config\)"),
        (lambda: lora().set_adapter(3), "LoraModel.set_adapter: adapter_names is a list, not 3"),
        (lambda: lora().set_adapter("default", weights=0.5), "weights is a list, not 0.5"),
        (lambda: lora().set_adapter("default", weights={"default": 0.5}), r"weights is a list, not \{'default': 0.5\}"),
        (lambda: lora().set_adapter({"default": 0.5}), r"adapter_names is a list, not \{'default': 0.5\}"),
        (lambda: lora().set_adapter("default", weights={0.5}), "weights is a set, which has no order. Give a list"),
        (lambda: lora().set_adapter({"default"}, weights=[0.5]), "set_adapter with weights: adapter_names is a set,"),
        (lambda: lora().mixed_batch({"default", None}), "mixed_batch: adapter_names is a set, which has no order"),
        (lambda: lora().add_weighted_adapter({"default"}, [1.0], "b"), "add_weighted_adapter: adapters is a set,"),
        (lambda: lora().set_adapter("default", trainable="no"), "trainable is True or False, not 'no'"),
        (lambda: lora().merge_adapter(max_error=float("nan")), "max_error is a share, a number of at least 0, not nan"),
        (lambda: lora().add_adapter("b", None), "config is a NoneType"),
        (lambda: InitData(3), "batches is 3. It is a DataLoader, or a list of batches"),
        (lambda: InitData([], step=3), "step is 3. It is a function of the model and a batch"),
        (lambda: InitData([], limit=0), "limit is a whole number of at least 1, not 0"),
        (
            lambda: LoraModel(net(), LoraConfig(init="eva", target_modules=["0"]), init_data=[torch.ones(1, 4)]),
            r"init_data is a list. Write InitData\(batches\)",
        ),
        (lambda: LoraModel(lora().model, adapter_name="b"), "was given adapter_name 'b' and no config, .*set_adapter"),
        (lambda: LoraModel(lora().model, init_data=InitData([])), "LoraModel was given init_data and no config"),
    ],
)
def test_an_argument_is_told_what_it_is(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


@pytest.mark.parametrize("names", [["default"], ("default",), {"default"}, {"default": 1}.keys()], ids=str)
def test_names_come_in_any_collection(names):
    handle = lora()
    handle.set_adapter(names)
    assert handle.active_adapters == ("default",)


class TestConfigsOfPeft:
    @pytest.fixture
    def peft(self):
        return pytest.importorskip("peft")

    def test_what_they_say_is_written_in_our_words(self, peft):
        theirs = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.1, target_modules=["b", "a"], task_type="SEQ_CLS", modules_to_save=["1"]
        )
        with pytest.raises(ConfigError) as caught:
            LoraModel(net(), theirs)
        ours = "LoraConfig(r=16, target_modules=['a', 'b'], alpha=32, dropout=0.1, modules_to_save=['1'])"
        assert f"config is a LoraConfig of peft, and has to be a LoraConfig of lora_plugins. Write {ours}" in str(
            caught.value
        )
        assert "'task_type': Name a new head in 'modules_to_save'" in str(caught.value)
        assert "peft_type" not in str(caught.value)
        assert eval(ours, {"LoraConfig": LoraConfig}).r == 16

    def test_what_has_no_field_of_its_own_is_told(self, peft):
        theirs = peft.LoraConfig(init_lora_weights="pissa_niter_16", layer_replication=[(0, 1)])
        with pytest.raises(
            ConfigError, match=r"'init_lora_weights': It is 'init'.*'niter': 16.*'layer_replication': There is no"
        ):
            lora().add_adapter("b", theirs)

    @pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "orthogonal", False])
    def test_starts_and_variants_are_written_as_fields(self, peft, init):
        theirs = peft.LoraConfig(use_dora=True, init_lora_weights=init)
        ours = rf"Write LoraConfig\(init='{init or 'none'}', variant='dora'\) of lora_plugins\."
        with pytest.raises(ConfigError, match=ours) as caught:
            LoraModel(net(), theirs)
        assert "It is 'init' here" not in str(caught.value)

    @pytest.mark.parametrize(
        ("field", "said"),
        [
            pytest.param({"layers_to_transform": 0}, r"layers_to_transform=0\)", id="the first block"),
            pytest.param({"init_lora_weights": False}, r"init='none'\)", id="False"),
        ],
    )
    def test_values_that_are_false_are_told(self, peft, field, said):
        with pytest.raises(ConfigError, match=said):
            LoraModel(net(), peft.LoraConfig(target_modules=["0"], **field))

    def test_other_methods_are_not_translated(self, peft):
        with pytest.raises(ConfigError, match=r"config is a LoHaConfig.*'LOHA' is none that is here") as caught:
            LoraModel(net(), peft.LoHaConfig(r=4))
        assert "LoraConfig(" not in str(caught.value)

    @pytest.mark.parametrize("targets", [["0"], ".*0", ["base_model.model.0"]], ids=str)
    def test_a_model_that_they_have_adapted_is_told_from_a_wrong_pattern(self, peft, targets):
        theirs = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["0"]))
        before = list(theirs.state_dict())
        with pytest.raises(TargetError, match=r"Another library has adapted the model.*peft_model\.unload\(\)"):
            LoraModel(theirs, LoraConfig(target_modules=targets))
        assert list(theirs.state_dict()) == before
        LoraModel(theirs.unload(), LoraConfig(target_modules=["0"]))

    def test_swapped_ones_are_told_the_order(self, peft):
        with pytest.raises(ConfigError, match="model is a LoraConfig of peft"):
            LoraModel(peft.LoraConfig(), net())

    def test_one_of_ours_in_their_function_is_told(self, peft):
        with pytest.raises(AttributeError, match=r"no configuration of PEFT's: write LoraModel\(model, config\)"):
            peft.get_peft_model(net(), CONFIG)


class TestOtherNames:
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_a_name_of_peft_is_told_when_it_is_imported(self, name):
        with pytest.raises(ImportError, match=f"lora_plugins has no '{name}'. [A-Z]"):
            exec(f"from lora_plugins import {name}")

    @pytest.mark.parametrize(
        ("field", "name", "said"),
        [(field, *entry) for field, words in (("init", INITS), ("variant", VARIANTS)) for entry in words.items()],
    )
    def test_a_value_of_a_field_is_told_when_it_is_planned(self, field, name, said):
        with pytest.raises(PluginError, match=f"There is no {field} '{re.escape(name)}'. {re.escape(said)}"):
            LoraModel.plan(net(), LoraConfig(target_modules=["0"], **{field: name}))

    def test_others_are_missing_as_ever(self):
        assert not hasattr(importlib.import_module("lora_plugins"), "loraconfig")

    @pytest.mark.parametrize(
        ("name", "said"),
        [("lora_alpha", "It is 'alpha' here."), ("peft_type", "write LoraModel"), ("ranks", "rank")],
    )
    def test_a_field_of_another_config_is_told_when_it_is_read(self, name, said):
        with pytest.raises(AttributeError, match=f"LoraConfig has no attribute '{name}'.*{said}"):
            getattr(CONFIG, name)

    def test_a_config_is_copied_and_pickled_as_ever(self):
        assert copy.deepcopy(CONFIG) == pickle.loads(pickle.dumps(CONFIG)) == copy.copy(CONFIG) == CONFIG


class TestMembers:
    @pytest.mark.parametrize("name", MEMBERS)
    def test_a_word_of_others_is_told_on_the_handle_and_on_the_class(self, name):
        for owner in (lora(), LoraModel):
            with pytest.raises(AttributeError, match=f"LoraModel has no attribute '{name}'"):
                getattr(owner, name)
            assert not hasattr(owner, name)

    def test_what_they_name_exists(self):
        for word in [*MEMBERS.values(), *ARGUMENTS.values()]:
            for called in [part.rpartition(" ")[2].rpartition(".")[2] for part in word.split("(")[:-1]]:
                assert not called.endswith("adapter") or hasattr(LoraModel, called), word

    def test_what_the_model_has_is_asked_of_the_model(self):
        with pytest.raises(AttributeError, match=r"the model itself has it: lora\.model\.parameters"):
            lora().parameters()

    def test_the_model_is_called_and_not_the_handle(self):
        with pytest.raises(TypeError, match=r"call the model itself: lora\.model"):
            lora()(torch.zeros(1, 4))

    def test_private_names_are_not_guessed_at(self):
        name = "_repr_html_"
        for owner in (lora(), LoraModel):
            with pytest.raises(AttributeError, match=rf"no attribute '{name}'\.$"):
                getattr(owner, name)

    def test_a_typo_is_told(self):
        with pytest.raises(AttributeError, match="Did you mean 'merge_adapter'"):
            lora().merge_adaptor()

    def test_words_of_ours_are_none_of_theirs(self):
        assert not {*vars(LoraModel)} & {*MEMBERS}

    def test_peft_has_no_word_that_is_not_told(self):
        peft = pytest.importorskip("peft")
        theirs = {name for name in dir(peft.PeftModel) if name[0] != "_"} - {*dir(nn.Module)}
        unknown = theirs - {*MEMBERS} - {*dir(LoraModel)}
        assert unknown == {  # of prompts, language models and PEFT's insides
            "active_peft_config", "base_model_torch_dtype", "generate", "get_prompt", "get_prompt_embedding_to_save",
            "has_active_enabled_adapter", "supports_lora_conversion",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("owner", "method"),
        [
            ("PeftModel", "load_adapter"), ("PeftModel", "add_adapter"), ("PeftModel", "set_adapter"),
            ("LoraModel", "merge_and_unload"), ("LoraModel", "merge_adapter"), ("LoraModel", "add_weighted_adapter"),
        ],
    )  # fmt: skip
    def test_peft_has_no_argument_that_is_not_told(self, owner, method):
        theirs = inspect.signature(getattr(getattr(pytest.importorskip("peft"), owner), method)).parameters
        ours = inspect.signature(getattr(LoraModel, method)).parameters
        options = {"density", "majority_sign_method"}  # of a combination, which names those it knows
        assert {*theirs} - {*ours} - {"self", "kwargs"} - options <= {*ARGUMENTS}


def test_signatures_and_copies_are_as_ever():
    assert [*inspect.signature(LoraModel).parameters] == ["model", "config", "adapter_name", "registry", "init_data"]
    assert [*inspect.signature(LoraModel.load_adapter).parameters][:2] == ["model", "path"]
    again = pickle.loads(pickle.dumps(lora()))
    assert again.adapters.keys() == {"default"}
