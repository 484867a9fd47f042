"""The registrars that plugins are handed, and the lookup of what they registered."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from torch import nn

from lora_plugins import InitPlugin, PluginError, RowMajorPlugin, StoragePlugin, hookimpl
from lora_plugins.plugins import (
    INITS,
    LAYERS,
    STORAGES,
    PluginInfo,
    Registrar,
    build_registry,
    class_path,
    default_registry,
)
from tests.core.registries import registers

INFO = PluginInfo("mine", "some-dist", "1.0")


class Init(InitPlugin):
    name = "mine"

    def fill(self, context):
        return {}


class Layer(RowMajorPlugin):
    name = "mine"
    module_type = nn.Bilinear


class OwnAttributes(Layer):
    def __init__(self):
        self.class_attributes = {"sparse": property(lambda layer: False)}


class Storage(StoragePlugin):
    name = "mine"

    def store(self, weight, options):
        return {}

    def restore(self, tensors, shape, options):
        return tensors["codes"]


UNUSED = {"changed_base": "changes_base=False", "base_to_store": "changes_base=False", "allocate": "needs=None"}
"""Methods that are never called, by what the init says of itself."""


def variant(base, **attributes):
    return type("Variant", (base,), attributes)()


class TestRegistrars:
    @pytest.mark.parametrize(("kind", "plugin"), [(INITS, Init()), (LAYERS, Layer())], ids=["init", "layer"])
    def test_an_instance_is_taken(self, kind, plugin):
        taker = Registrar(kind, INFO)
        taker.add(plugin)
        assert [owned.plugin for owned in taker.owned] == [plugin]

    @pytest.mark.parametrize(
        ("kind", "plugin", "words"),
        [
            pytest.param(INITS, Init, "Register an instance, not the class", id="init class"),
            pytest.param(LAYERS, Layer, "Register an instance, not the class", id="layer class"),
            pytest.param(INITS, Layer(), "no InitPlugin", id="layer as init"),
            pytest.param(LAYERS, Init(), "no LayerPlugin. lora_plugins_register_layers takes", id="init as layer"),
            pytest.param(INITS, object(), "no InitPlugin", id="object"),
            pytest.param(INITS, variant(Init, name=""), "'name'", id="init without name"),
            pytest.param(INITS, variant(Init, name=["a"]), "'name'", id="init whose name is a list"),
            pytest.param(LAYERS, variant(Layer, name=None), "'name'", id="layer without name"),
            pytest.param(LAYERS, variant(Layer, module_type=None), "'module_type'", id="layer without class"),
            pytest.param(LAYERS, variant(Layer, module_type=5), "'module_type'", id="layer of a number"),
            pytest.param(LAYERS, variant(Layer, module_type=int), "'module_type'", id="layer of no module"),
            pytest.param(LAYERS, variant(Layer, slots=["it"]), "'slots' to ['it']. It has to be a method", id="slots"),
            pytest.param(LAYERS, variant(Layer, function="linear"), "It has to be a function of torch", id="function"),
            pytest.param(LAYERS, variant(Layer, class_attributes={3: 4}), "attributes by name", id="class attributes"),
            pytest.param(LAYERS, variant(Layer, class_attributes={"forward": print}), "is 'branch'", id="forward"),
            pytest.param(INITS, variant(Init, options=["rate"]), "'options' to ['rate']. It has to be", id="options"),
            pytest.param(STORAGES, variant(Storage, options={"to": print}), "files can hold", id="not for files"),
            pytest.param(INITS, variant(Init, fill=None), "'fill' to None. It has to be a method", id="no method"),
            pytest.param(INITS, variant(Init, changes_base=True), "and has no changed_base", id="no base"),
            pytest.param(LAYERS, OwnAttributes(), "those of the plugin's class", id="attributes of an instance"),
            *(
                pytest.param(
                    INITS, variant(Init, **{method: print}), f"has a method {method} and says {says}", id=method
                )
                for method, says in UNUSED.items()
            ),
        ],
    )
    def test_anything_else_is_refused_by_the_name_of_its_plugin(self, kind, plugin, words):
        taker = Registrar(kind, INFO)
        with pytest.raises(PluginError) as caught:
            taker.add(plugin)
        assert words in str(caught.value)
        assert "'mine' of some-dist 1.0" in str(caught.value)
        assert taker.owned == []

    def test_nothing_is_taken_after_the_hook_has_returned(self):
        class Later:
            @hookimpl
            def lora_plugins_register_layers(self, registrar):
                self.kept = registrar

        later = Later()
        build_registry([("later", later)])
        with pytest.raises(PluginError, match=r"'later' of .*after lora_plugins_register_layers has returned"):
            later.kept.add(Layer())


class TestLookup:
    def test_built_in_types_are_found_by_class(self):
        registry = default_registry()
        assert registry.layer_for(nn.Linear).name == "linear"
        assert registry.layer_for(nn.Conv2d).name == "conv2d"
        assert registry.layer_for(nn.LayerNorm) is None
        assert registry.layer_for(nn.Module) is None

    def test_a_subclass_is_served_by_the_most_specific_plugin(self):
        class Special(nn.Linear):
            pass

        class MoreSpecial(Special):
            pass

        class Other(nn.Linear):
            pass

        plugin = variant(Layer, name="special", module_type=Special)
        registry = build_registry([("special", registers(plugin))])
        assert registry.layer_for(MoreSpecial) is plugin
        assert registry.layer_for(Special) is plugin
        assert registry.layer_for(Other).name == "linear"

    def test_a_class_can_be_named_by_its_import_path(self):
        plugin = variant(Layer, name="by_path", module_type="torch.nn.modules.linear.Bilinear")
        assert build_registry([("by_path", registers(plugin))]).layer_for(nn.Bilinear) is plugin
        assert class_path(nn.Bilinear) == "torch.nn.modules.linear.Bilinear"

    def test_a_path_from_which_a_class_is_imported_leads_to_it(self, monkeypatch):
        plugin = variant(Layer, name="by_path", module_type="some_package.Layer")
        registry = build_registry([("by_path", registers(plugin))])
        assert registry.layer_for(nn.Bilinear) is None
        monkeypatch.setitem(sys.modules, "some_package", SimpleNamespace(Layer=nn.Bilinear))
        assert registry.layer_for(nn.Bilinear) is plugin
        assert class_path("torch.nn.Bilinear") == class_path(nn.Bilinear)

    def test_two_paths_that_lead_to_one_class_are_a_clash_once_it_is_imported(self, monkeypatch):
        plugins = [variant(Layer, name=name, module_type=f"{name}.Layer") for name in ("one", "two")]
        registry = build_registry([(each.name, registers(each)) for each in plugins])
        for each in plugins:
            monkeypatch.setitem(sys.modules, each.name, SimpleNamespace(Layer=nn.Bilinear))
        with pytest.raises(PluginError, match=r"Two plugins own the module class 'torch\S*Bilinear': 'one'.*'two'"):
            registry.layer_for(nn.Bilinear)
        assert registry.layer_for(nn.Linear).name == "linear"

    def test_of_two_paths_to_one_class_the_one_that_overrides_is_taken(self, monkeypatch):
        plugins = [variant(Layer, name=name, module_type=f"{name}.Layer") for name in ("one", "two")]
        registry = build_registry([("one", registers(plugins[0], override=True)), ("two", registers(plugins[1]))])
        for each in plugins:
            monkeypatch.setitem(sys.modules, each.name, SimpleNamespace(Layer=nn.Bilinear))
        assert registry.layer_for(nn.Bilinear) is plugins[0]

    def test_a_path_imports_nothing(self, monkeypatch):
        class Lazy(ModuleType):
            def __getattr__(self, name):
                raise AssertionError(f"{name} would be imported")

        monkeypatch.setitem(sys.modules, "some_package", Lazy("some_package"))
        assert class_path("some_package.Layer") == "some_package.Layer"

    def test_an_unknown_init_offers_the_near_one(self):
        with pytest.raises(PluginError, match=r"no init 'gausian'. Did you mean 'gaussian'"):
            default_registry().get(INITS, "gausian")

    def test_an_init_is_found_by_name(self):
        names = ["kaiming", "gaussian", "loftq", "none"]
        assert [default_registry().get(INITS, name).name for name in names] == names


class TestInfo:
    def test_states(self):
        assert INFO.state == "loaded"
        assert PluginInfo("a", "b", "1", blocked="LORA_PLUGINS_BLOCK").state == "blocked by LORA_PLUGINS_BLOCK"
        assert PluginInfo("a", "b", "1", error=ImportError("no libx")).state == "failed: ImportError: no libx"
