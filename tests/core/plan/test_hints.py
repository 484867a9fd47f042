"""A pattern that matches nothing is answered with what to write, and what is said works."""

import pytest
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from tests.core.libraries import create_model


def attention(**layers):
    """Two blocks that hold these layers, a convolution and a head."""
    blocks = [nn.ModuleDict({"attn": nn.ModuleDict({name: make() for name, make in layers.items()})}) for _ in range(2)]
    return nn.ModuleDict({"stem": nn.Conv2d(3, 6, 1), "blocks": nn.ModuleList(blocks), "head": nn.Linear(6, 2)})


def fused():
    return attention(qkv=lambda: nn.Linear(6, 18), proj=lambda: nn.Linear(6, 6))


def apart():
    return attention(q_proj=lambda: nn.Linear(6, 6), v_proj=lambda: nn.Linear(6, 6), proj=lambda: nn.Linear(6, 6))


def heads():
    return attention(mha=lambda: nn.MultiheadAttention(6, 2), fc=lambda: nn.Linear(6, 6))


def in_one():  # the fused layers have a name that another one ends in, too
    return nn.ModuleDict({"qkv": nn.Linear(6, 18), "other": nn.ModuleDict({"qkv": nn.Conv2d(3, 6, 1)})})


PARTS = {"target_modules": ["qkv"], "fused_parts": {"qkv": ["q", "v"]}}

ANSWERED = [
    pytest.param(fused, "qkv", {"target_modules": ["qkv"]}, "a regular expression over the whole name", id="end"),
    pytest.param(fused, "attn.qkv", {"target_modules": ["attn.qkv"]}, "write a list", id="end of two components"),
    pytest.param(fused, "blocks.0.attn.qkv,proj", {"target_modules": ["blocks.0.attn.qkv", "proj"]}, "", id="commas"),
    pytest.param(fused, "['qkv', 'proj']", {"target_modules": ["qkv", "proj"]}, "write a list", id="list in a string"),
    pytest.param(fused, "qkv|proj", {"target_modules": ".*(?:qkv|proj)"}, "whole name", id="unanchored"),
    pytest.param(
        fused, "a|b|c|d|e|f|g|h|qkv|proj", {"target_modules": ".*(?:a|b|c|d|e|f|g|h|qkv|proj)"}, "", id="alternatives"
    ),
    pytest.param(fused, [".qkv"], {"target_modules": ["qkv"]}, "end of a name", id="dot in front"),
    pytest.param(fused, [".*attn.*"], {"target_modules": ".*attn.*"}, "As a regular expression", id="expression"),
    pytest.param(
        fused, ["head", "qkv|.*proj"], {"target_modules": r"(?:.*\.)?head|qkv|.*proj"}, "end of a name", id="mixed list"
    ),
    pytest.param(
        fused, [".*qkv", ".*proj"], {"target_modules": ".*qkv|.*proj"}, "As a regular expression", id="two expressions"
    ),
    pytest.param(fused, ["*.qkv"], {"target_modules": ["qkv"]}, "end of a name", id="glob"),
    pytest.param(fused, ["*attn*"], {"target_modules": ".*attn.*"}, "As a regular expression", id="glob around a word"),
    pytest.param(
        fused, ["head", "blocks.*.at*"], {"target_modules": r"blocks\..*\.at.*"}, "end of a name", id="glob in a path"
    ),
    pytest.param(
        fused, ["*.0.*.qkv"], {"target_modules": r".*\.0\..*\.qkv"}, "end of a name", id="glob narrower than its end"
    ),
    pytest.param(fused, ["all"], {"target_modules": "all"}, "not in a list", id="all in a list"),
    pytest.param(fused, ["*"], {"target_modules": "all"}, "not in a list", id="star in a list"),
    pytest.param(fused, "all-linear", {"target_modules": ["qkv", "proj", "head"]}, "PEFT", id="all-linear"),
    pytest.param(fused, ["all-linear"], {"target_modules": "all"}, "convolutions too", id="all-linear in a list"),
    pytest.param(fused, ["query", "value"], PARTS, "one matrix", id="query and value of a fused layer"),
    pytest.param(fused, ["q_proj", "qkv", "v_proj"], PARTS, "one matrix", id="beside a name that is there"),
    pytest.param(fused, ".*(to_q|to_v)", PARTS, "one matrix", id="in an expression"),
    pytest.param(
        heads, ["q", "v"], {"target_modules": ["mha"], "fused_parts": {"mha": ["q", "v"]}}, "", id="multihead"
    ),
    pytest.param(apart, ["qkv"], {"target_modules": ["q_proj", "v_proj"]}, "layers of their own", id="not fused"),
    pytest.param(apart, "qkv", {"target_modules": ["q_proj", "v_proj"]}, "layers of their own", id="not fused, string"),
    pytest.param(heads, ["attn.qkv"], {"target_modules": ["mha"]}, "adapts all three.", id="fused under another name"),
    pytest.param(heads, "in_proj", {"target_modules": ["mha"]}, "adapts all three.", id="fused parameter"),
    pytest.param(apart, ["to_v", "proj"], {"target_modules": ["v_proj"]}, "of their own", id="another name"),
    pytest.param(apart, ".*(query|value)", {"target_modules": ["q_proj", "v_proj"]}, "", id="other names, string"),
    pytest.param(in_one, ["key"], {}, "There is 'qkv'", id="no end means the fused layer alone"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "targets", "remedy", "said"), ANSWERED)
def test_the_remedy_is_named_and_works(model, targets, remedy, said):
    model = model()
    with pytest.raises(TargetError, match=r"^target_modules: .* matches no module of the model\. ") as caught:
        LoraModel.plan(model, LoraConfig(r=2, target_modules=targets))
    message = str(caught.value)
    assert said in message
    for value in remedy.values():
        assert repr(value) in message
    assert not remedy or LoraModel.plan(model, LoraConfig(r=2, **remedy)).layers


def test_all_linear_names_the_linear_layers_alone():
    remedy = LoraConfig(r=2, target_modules=["qkv", "proj", "head"])
    assert {layer.module_class for layer in LoraModel.plan(fused(), remedy).layers} == {"Linear"}


@pytest.mark.parametrize(("layers", "end"), [(8, r"'7'\]\.$"), (9, r"convolutions too\.$")])
def test_of_many_linear_layers_all_linear_names_none(layers, end):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    with pytest.raises(TargetError, match=end):
        LoraModel.plan(model, LoraConfig(target_modules="all-linear"))


def test_where_no_layer_is_linear_all_linear_names_none():
    with pytest.raises(TargetError, match=r"convolutions too\.$"):
        LoraModel.plan(nn.Sequential(nn.Conv1d(2, 2, 1)), LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize("targets", [["query", "value"], ["q_proj", "v_proj"]], ids=["transformers", "others"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "swin_tiny_patch4_window7_224"])
def test_the_words_of_guides_on_models_of_timm(name, targets):
    with pytest.raises(TargetError, match=r"\['qkv'\].*fused_parts=\{'qkv': \['q', 'v'\]\}"):
        LoraModel.plan(create_model(name), LoraConfig(target_modules=targets))


def test_where_there_is_no_attention_the_layers_are_listed():
    with pytest.raises(TargetError, match=r"'query' matches no module of the model\. There is '0', '2'\.$"):
        LoraModel.plan(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)), LoraConfig(target_modules=["query"])
        )


@pytest.mark.parametrize("last", [nn.LayerNorm(4), nn.Linear(4, 4)], ids=["none", "one that is trained in full"])
@pytest.mark.parametrize("targets", [["0"], ["query"]], ids=["of another type", "unknown"])
def test_where_no_layer_could_be_adapted_that_is_said(targets, last):
    said = r" match.*\. The model has no layer of a type that a plugin adapts, outside of modules_to_save\.$"
    with pytest.raises(TargetError, match=said):
        LoraModel.plan(nn.Sequential(nn.ReLU(), last), LoraConfig(target_modules=targets, modules_to_save=["1"]))


def test_a_model_that_is_a_layer_is_not_said_to_have_none():
    with pytest.raises(TargetError, match=r"'query' matches no module of the model\. There are none\."):
        LoraModel.plan(nn.Linear(4, 4), LoraConfig(target_modules=["query"]))


@pytest.mark.parametrize("targets", [["attn"], "blocks", ["blocks.1"]], ids=str)
def test_of_a_module_that_is_no_layer_the_layers_in_it_are_named(targets):
    with pytest.raises(
        TargetError, match=r"no plugin adapts\. Name the layers in it by their ends, .*\['proj', 'qkv'\]"
    ):
        LoraModel.plan(fused(), LoraConfig(target_modules=targets))


@pytest.mark.parametrize(("beside", "close"), [(nn.ReLU(), ""), (nn.Linear(4, 4), "There is 'beside'. ")], ids=str)
def test_of_a_layer_of_a_type_without_a_plugin_the_type_is_named(beside, close):
    model = nn.ModuleDict({"own": nn.Bilinear(2, 3, 4), "beside": beside})
    with pytest.raises(TargetError, match=rf"which no plugin adapts\. {close}A plugin for 'Bilinear' is .*new-plugin"):
        LoraModel.plan(model, LoraConfig(target_modules=["own"]))


def test_a_glob_as_a_string_is_told():
    with pytest.raises(ConfigError, match=r"not a regular expression.*Where '\*' stands for any text, write '\.\*'"):
        LoraModel.plan(fused(), LoraConfig(target_modules="*.qkv"))


def test_a_layer_that_is_trained_in_full_is_no_target():
    with pytest.raises(
        TargetError, match="target_modules: 'head' matches 'head', which modules_to_save trains in full"
    ):
        LoraModel.plan(fused(), LoraConfig(target_modules=["qkv", "head"], modules_to_save=["head"]))


def test_a_head_of_another_name_is_told():
    with pytest.raises(TargetError, match=r"modules_to_save: 'classifier'.*The last layer of the model is 'head'"):
        LoraModel.plan(fused(), LoraConfig(target_modules=["qkv"], modules_to_save=["classifier"]))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("wrap", [str, lambda pattern: [pattern]], ids=["string", "list"])
def test_no_expression_is_tried_that_may_take_forever(wrap):
    model = nn.ModuleDict({"a" * 60: nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="matches no module"):
        LoraModel.plan(model, LoraConfig(target_modules=wrap("x((a+)+)+b")))


@pytest.mark.parametrize(
    ("targets", "unsaid"),
    [("qkv, nothing", "To match the ends of names"), (["*.nothing"], "word for word")],
    ids=["a list in a string", "a glob in a list"],
)
def test_what_would_match_nothing_either_is_not_proposed(targets, unsaid):
    with pytest.raises(TargetError, match="matches no module of the model") as caught:
        LoraModel.plan(fused(), LoraConfig(target_modules=targets))
    assert unsaid not in str(caught.value)


def test_layers_are_proposed_by_more_than_their_number():
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1))})
    with pytest.raises(TargetError, match=r"for linear layers alone \['net\.0'\]"):
        LoraModel.plan(model, LoraConfig(target_modules="all-linear"))
