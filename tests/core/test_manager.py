"""Loading of plugins, one by one: what one of them does wrong concerns nobody but its own users."""

import pytest
import torch
from torch import nn

from lora_plugins import InitPlugin, LoraConfig, LoraModel, PluginError, RowMajorPlugin, hookimpl
from lora_plugins.manager import build_registry, default_registry
from lora_plugins.sources import BLOCK_VARIABLE

IN_CODE = "(given in code)"


class ZeroInit(InitPlugin):
    name = "zero"

    def fill(self, context):
        context.A.zero_()
        context.B.zero_()
        return {}


class BilinearPlugin(RowMajorPlugin):
    name = "bilinear"
    module_type = nn.Bilinear


def plugin(**hooks):
    """A plugin object with hook implementations by name."""
    return type("Plugin", (), {name: staticmethod(hookimpl(function)) for name, function in hooks.items()})()


def registers(*plugins):
    """A plugin object that registers these layer types and inits."""

    def lora_plugins_register_layers(registrar):
        for each in plugins:
            if isinstance(each, RowMajorPlugin):
                registrar.add(each)

    def lora_plugins_register_inits(registrar):
        for each in plugins:
            if isinstance(each, InitPlugin):
                registrar.add(each)

    return plugin(
        lora_plugins_register_layers=lora_plugins_register_layers,
        lora_plugins_register_inits=lora_plugins_register_inits,
    )


def info(registry, name):
    (found,) = [info for info in registry.plugins if info.name == name]
    return found


class TestWhatIsFound:
    def test_the_built_in_plugins_come_by_entry_point(self):
        registry = build_registry()
        assert {i.name: i.distribution for i in registry.plugins if i.name in ("layers", "inits")} == {
            "layers": "lora-plugins", "inits": "lora-plugins",
        }  # fmt: skip
        assert {"kaiming", "gaussian", "loftq", "none"} <= set(info(registry, "inits").inits)
        assert {"linear", "conv2d", "embedding", "multihead_attention"} <= set(info(registry, "layers").layers)

    def test_a_plugin_given_in_code_joins_them(self):
        registry = build_registry([("mine", registers(ZeroInit(), BilinearPlugin()))])
        found = info(registry, "mine")
        assert (found.state, found.distribution, found.layers, found.inits) == (
            "loaded", IN_CODE, ("bilinear",), ("zero",),
        )  # fmt: skip
        assert registry.init("zero").name == "zero"
        assert registry.layer_for(nn.Bilinear).name == "bilinear"

    def test_the_registry_of_the_process_is_built_once_and_stays_as_it_is(self):
        first = default_registry()
        build_registry([("mine", registers(ZeroInit()))])
        assert default_registry() is first
        assert "zero" not in first.inits

    def test_a_registry_is_used_where_it_is_given(self):
        model = nn.ModuleDict({"bi": nn.Bilinear(2, 3, 4)})
        registry = build_registry([("mine", registers(ZeroInit(), BilinearPlugin()))])
        lora = LoraModel(model, LoraConfig(r=2, init="zero"), registry=registry)
        assert lora.plans["default"].layers[0].shapes == ((4, 6),)


def raising(error):
    def hook(registrar):
        raise error

    return hook


BROKEN = {
    "raises": plugin(lora_plugins_register_inits=raising(RuntimeError("no licence server"))),
    "registers a class": plugin(lora_plugins_register_inits=lambda registrar: registrar.add(ZeroInit)),
    "registers a nameless one": registers(type("Nameless", (ZeroInit,), {"name": ""})()),
    "registers a layer of no class": registers(type("Odd", (BilinearPlugin,), {"module_type": 5})()),
    "has an unknown hook": plugin(lora_plugins_register_init=lambda registrar: None),
    "has a hook with another signature": plugin(lora_plugins_register_inits=lambda registrar, extra: None),
    "calls what is not there": plugin(lora_plugins_register_layers=lambda registrar: registrar.register(1)),
}


class TestBrokenPlugins:
    @pytest.mark.parametrize("kind", BROKEN)
    def test_it_never_stops_a_run_that_does_not_need_it(self, kind):
        registry = build_registry([("broken", BROKEN[kind]), ("good", registers(BilinearPlugin()))])
        assert info(registry, "broken").state.startswith("failed: ")
        assert (info(registry, "broken").layers, info(registry, "broken").inits) == ((), ())
        assert info(registry, "good").state == "loaded"
        model = nn.Sequential(nn.Linear(2, 2))
        LoraModel(model, LoraConfig(r=2), registry=registry)
        model(torch.ones(1, 2)).sum().backward()

    @pytest.mark.parametrize("kind", BROKEN)
    def test_it_is_named_with_its_error_as_cause_when_something_is_missing(self, kind):
        registry = build_registry([("broken", BROKEN[kind])])
        with pytest.raises(PluginError, match=r"no init 'zero'.*'broken' of \(given in code\)") as caught:
            registry.init("zero")
        assert caught.value.__cause__ is info(registry, "broken").error

    def test_an_unknown_hook_is_named(self):
        registry = build_registry([("mine", BROKEN["has an unknown hook"])])
        assert "lora_plugins_register_init" in info(registry, "mine").state

    def test_half_of_a_plugin_that_fails_is_not_kept(self):
        def fails_late(registrar):
            registrar.add(ZeroInit())
            raise RuntimeError("later")

        registry = build_registry([("late", plugin(lora_plugins_register_inits=fails_late))])
        assert "zero" not in registry.inits

    def test_the_plugin_asked_for_by_its_own_name_is_the_cause(self):
        first = plugin(lora_plugins_register_inits=raising(RuntimeError("first")))
        second = plugin(lora_plugins_register_inits=raising(RuntimeError("second")))
        registry = build_registry([("one", first), ("zero", second)])
        with pytest.raises(PluginError, match=r"(?s)first.*second") as caught:
            registry.init("zero")
        assert str(caught.value.__cause__) == "second"

    def test_a_model_is_untouched_by_a_missing_init(self, untouched):
        model = nn.Sequential(nn.Linear(2, 2))
        registry = build_registry([("broken", BROKEN["raises"])])
        with untouched(model), pytest.raises(PluginError, match="no licence server"):
            LoraModel(model, LoraConfig(init="zero"), registry=registry)


class TestHookNames:
    def test_a_function_may_have_another_name_than_its_hook(self):
        class Plugin:
            @hookimpl(specname="lora_plugins_register_inits")
            def my_inits(self, registrar):
                registrar.add(ZeroInit())

        registry = build_registry([("mine", Plugin())])
        assert info(registry, "mine").state == "loaded"
        assert registry.init("zero").name == "zero"

    def test_a_hook_named_like_something_else_in_the_module_is_unknown(self):
        registry = build_registry([("mine", plugin(hookspec=lambda registrar: None))])
        assert "hooks that do not exist: 'hookspec'" in info(registry, "mine").state


class TestClashes:
    def test_two_owners_of_an_init(self):
        with pytest.raises(PluginError) as caught:
            build_registry([("one", registers(ZeroInit())), ("two", registers(ZeroInit()))])
        for words in ("init 'zero'", f"'one' of {IN_CODE}", f"'two' of {IN_CODE}", f"{BLOCK_VARIABLE}=two"):
            assert words in str(caught.value)

    def test_two_owners_of_a_layer_name(self):
        other = type("Other", (BilinearPlugin,), {"module_type": nn.PReLU})()
        with pytest.raises(PluginError, match=r"layer type 'bilinear': 'one'.*'two'"):
            build_registry([("one", registers(BilinearPlugin())), ("two", registers(other))])

    @pytest.mark.parametrize("module_type", [nn.Bilinear, "torch.nn.modules.linear.Bilinear"], ids=["class", "path"])
    def test_two_owners_of_a_class_however_it_is_named(self, module_type):
        other = type("Other", (BilinearPlugin,), {"name": "other", "module_type": module_type})()
        with pytest.raises(PluginError, match=r"module class 'torch.*Bilinear': 'one'.*'two'"):
            build_registry([("one", registers(BilinearPlugin())), ("two", registers(other))])

    @pytest.mark.parametrize("name", ["kaiming", "none"])
    def test_a_built_in_name_is_taken(self, name):
        mine = type("Mine", (ZeroInit,), {"name": name})()
        with pytest.raises(PluginError, match=rf"init '{name}': 'inits' of lora-plugins .* and 'mine'"):
            build_registry([("mine", registers(mine))])
