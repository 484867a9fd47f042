"""Loading of plugins, one by one: what one of them does wrong concerns nobody but its own users."""

import pytest
import torch
from torch import nn

from lora_plugins import InitPlugin, LoraConfig, LoraModel, PluginError, RowMajorPlugin, hookimpl
from lora_plugins.errors import TargetError
from lora_plugins.plugins import (
    BLOCK_VARIABLE,
    INITS,
    LAYERS,
    LOAD_VARIABLE,
    TRACE_VARIABLE,
    build_registry,
    default_registry,
)
from tests.core.registries import registers, registry_of

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


def info(registry, name):
    (found,) = [info for info in registry.plugins if info.name == name]
    return found


class TestWhatIsFound:
    def test_the_built_in_plugins_come_by_entry_point(self):
        registry = build_registry()
        assert {i.name: i.distribution for i in registry.plugins if i.name in ("layers", "inits")} == {
            "layers": "lora-plugins", "inits": "lora-plugins",
        }  # fmt: skip
        assert {"kaiming", "gaussian", "loftq", "none"} <= set(info(registry, "inits").names(INITS))
        assert {"linear", "conv2d", "embedding", "multihead_attention"} <= set(info(registry, "layers").names(LAYERS))

    def test_a_plugin_given_in_code_joins_them(self):
        registry = registry_of(ZeroInit(), BilinearPlugin())
        found = info(registry, "mine")
        assert (found.state, found.distribution, found.names(LAYERS), found.names(INITS)) == (
            "loaded", IN_CODE, ("bilinear",), ("zero",),
        )  # fmt: skip
        assert registry.get(INITS, "zero").name == "zero"
        assert registry.layer_for(nn.Bilinear).name == "bilinear"

    def test_the_registry_of_the_process_is_built_once_and_stays_as_it_is(self):
        first = default_registry()
        registry_of(ZeroInit())
        assert default_registry() is first
        assert "zero" not in first.of(INITS)

    def test_a_registry_is_used_where_it_is_given(self):
        model = nn.ModuleDict({"bi": nn.Bilinear(2, 3, 4)})
        registry = registry_of(ZeroInit(), BilinearPlugin())
        lora = LoraModel(model, LoraConfig(r=2, init="zero"), registry=registry)
        assert lora.plans["default"].layers[0].shapes == ((4, 6),)


def raising(error):
    def hook(registrar):
        raise error

    return hook


BROKEN = {
    "raises": plugin(lora_plugins_register_inits=raising(RuntimeError("no license server"))),
    "ends the process": plugin(lora_plugins_register_inits=raising(SystemExit(3))),
    "registers a class": plugin(lora_plugins_register_inits=lambda registrar: registrar.add(ZeroInit)),
    "registers a nameless one": registers(type("Nameless", (ZeroInit,), {"name": ""})()),
    "registers a layer of no class": registers(type("Odd", (BilinearPlugin,), {"module_type": 5})()),
    "has an unknown hook": plugin(lora_plugins_register_init=lambda registrar: None),
    "has a hook with another signature": plugin(lora_plugins_register_inits=lambda registrar, extra: None),
    "returns its init": plugin(lora_plugins_register_inits=lambda registrar: ZeroInit()),
    "has no hook": plugin(),
    "registers a name twice": registers(ZeroInit(), ZeroInit()),
    "says a branch that is not there": registers(
        type("Odd", (BilinearPlugin,), {"branch_use": "always", "branch_types": (nn.Bilinear,)})()
    ),
    "says a base that is not changed": registers(type("Odd", (ZeroInit,), {"changes_base": True})()),
    "calls what is not there": plugin(lora_plugins_register_layers=lambda registrar: registrar.register(1)),
}


class TestBrokenPlugins:
    @pytest.mark.parametrize("kind", BROKEN)
    def test_it_never_stops_a_run_that_does_not_need_it(self, kind):
        registry = build_registry([("broken", BROKEN[kind]), ("good", registers(BilinearPlugin()))])
        assert info(registry, "broken").state.startswith("failed: ")
        assert (info(registry, "broken").names(LAYERS), info(registry, "broken").names(INITS)) == ((), ())
        assert info(registry, "good").state == "loaded"
        model = nn.Sequential(nn.Linear(2, 2))
        LoraModel(model, LoraConfig(r=2), registry=registry)
        model(torch.ones(1, 2)).sum().backward()

    @pytest.mark.parametrize("kind", BROKEN)
    def test_it_is_named_with_its_error_as_cause_when_something_is_missing(self, kind):
        registry = build_registry([("broken", BROKEN[kind])])
        with pytest.raises(PluginError, match=r"no init 'zero'.*'broken' of \(given in code\)") as caught:
            registry.get(INITS, "zero")
        assert caught.value.__cause__ is info(registry, "broken").error

    def test_an_unknown_hook_is_named(self):
        registry = build_registry([("mine", BROKEN["has an unknown hook"])])
        assert "lora_plugins_register_init" in info(registry, "mine").state

    def test_a_class_in_place_of_its_instance_is_told(self):
        class Plugin:
            @hookimpl
            def lora_plugins_register_inits(self, registrar):
                registrar.add(ZeroInit())

        registry = build_registry([("mine", Plugin)])
        assert "is the class Plugin. Name an instance of it" in info(registry, "mine").state

    def test_half_of_a_plugin_that_fails_is_not_kept(self):
        def fails_late(registrar):
            registrar.add(ZeroInit())
            raise RuntimeError("later")

        registry = build_registry([("late", plugin(lora_plugins_register_inits=fails_late))])
        assert "zero" not in registry.of(INITS)

    def test_the_plugin_asked_for_by_its_own_name_is_the_cause(self):
        first = plugin(lora_plugins_register_inits=raising(RuntimeError("first")))
        second = plugin(lora_plugins_register_inits=raising(RuntimeError("second")))
        registry = build_registry([("one", first), ("zero", second)])
        with pytest.raises(PluginError, match=r"(?s)first.*second") as caught:
            registry.get(INITS, "zero")
        assert str(caught.value.__cause__) == "second"

    def test_a_model_is_untouched_by_a_missing_init(self, untouched):
        model = nn.Sequential(nn.Linear(2, 2))
        registry = build_registry([("broken", BROKEN["raises"])])
        with untouched(model), pytest.raises(PluginError, match="no license server"):
            LoraModel(model, LoraConfig(init="zero"), registry=registry)

    def test_a_targeted_layer_that_nobody_adapts_names_it_with_its_error_as_cause(self):
        model = nn.ModuleDict({"pair": nn.Bilinear(2, 2, 2), "other": nn.Linear(2, 2)})
        registry = build_registry([("broken", BROKEN["raises"])])
        for targets in (["pair"], ".*"):
            with pytest.raises(TargetError, match=r"pair.*'broken' of \(given in code\).*no license") as caught:
                LoraModel(model, LoraConfig(target_modules=targets), registry=registry)
            assert str(caught.value.__cause__) == "no license server"


class TestHookNames:
    def test_a_function_may_have_another_name_than_its_hook(self):
        class Plugin:
            @hookimpl(specname="lora_plugins_register_inits")
            def my_inits(self, registrar):
                registrar.add(ZeroInit())

        registry = build_registry([("mine", Plugin())])
        assert info(registry, "mine").state == "loaded"
        assert registry.get(INITS, "zero").name == "zero"

    def test_a_hook_named_like_something_else_in_the_module_is_unknown(self):
        registry = build_registry([("mine", plugin(hookspec=lambda registrar: None))])
        assert "hooks that do not exist: 'hookspec'" in info(registry, "mine").state


class TestClashes:
    def test_two_owners_of_an_init(self):
        with pytest.raises(PluginError) as caught:
            build_registry([("one", registers(ZeroInit())), ("two", registers(ZeroInit()))])
        for words in ("init 'zero'", f"'one' of {IN_CODE}", f"'two' of {IN_CODE}", "Leave one of them out. A plugin"):
            assert words in str(caught.value)

    def test_the_installed_one_of_two_can_be_blocked(self, with_plugins, monkeypatch):
        """As an author has them who hands the plugin of an installed package to a registry."""
        with_plugins("plugin_example")
        mine = ("mine", registers(BilinearPlugin()))
        with pytest.raises(PluginError, match=f"Leave one of them out, or set {BLOCK_VARIABLE}=example. A plugin"):
            build_registry([mine])
        monkeypatch.setenv(BLOCK_VARIABLE, "example")
        assert info(build_registry([mine]), "mine").state == "loaded"

    def test_built_in_ones_cannot_be_blocked(self):
        linear = type("Linear", (BilinearPlugin,), {"module_type": nn.Linear})()
        with pytest.raises(PluginError, match=r"Leave one of them out\. A plugin"):
            registry_of(linear)

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
            registry_of(mine)

    def test_a_plugin_may_not_own_a_name_twice(self):
        registry = registry_of(ZeroInit(), ZeroInit())
        assert "'mine'" in info(registry, "mine").state
        assert "init 'zero', which the same plugin registered already" in info(registry, "mine").state

    def test_a_plugin_may_not_own_a_class_twice(self):
        other = type("Other", (BilinearPlugin,), {"name": "other"})()
        registry = registry_of(BilinearPlugin(), other)
        assert "Bilinear', which the same plugin registered already" in info(registry, "mine").state


class TestOverride:
    def test_an_init_by_name(self):
        mine = type("Mine", (ZeroInit,), {"name": "kaiming"})()
        registry = build_registry([("mine", registers(mine, override=True))])
        assert registry.get(INITS, "kaiming") is mine
        assert "replaces init 'kaiming' of 'inits' of lora-plugins" in info(registry, "mine").state
        assert f"its init 'kaiming' is replaced by 'mine' of {IN_CODE}" in info(registry, "inits").state
        assert "kaiming" not in info(registry, "inits").names(INITS)
        assert registry.of(INITS)["kaiming"].info is info(registry, "mine")

    def test_a_layer_type_by_class(self):
        mine = type("Mine", (BilinearPlugin,), {"name": "mine", "module_type": nn.Linear})()
        registry = build_registry([("mine", registers(mine, override=True))])
        assert registry.layer_for(nn.Linear) is mine
        assert "linear" not in registry.of(LAYERS)

    def test_two_that_override_the_same_are_named(self):
        mine = [type("Mine", (ZeroInit,), {"name": "kaiming"})() for _ in range(2)]
        with pytest.raises(PluginError, match=r"Two plugins override the init 'kaiming': 'one'.*'two'"):
            build_registry([("one", registers(mine[0], override=True)), ("two", registers(mine[1], override=True))])

    def test_where_there_is_nothing_to_replace_it_is_an_ordinary_one(self):
        registry = build_registry([("mine", registers(ZeroInit(), override=True))])
        assert info(registry, "mine").state == "loaded"
        assert registry.get(INITS, "zero").name == "zero"


FILE = """
from lora_plugins import InitPlugin, hookimpl

class FileInit(InitPlugin):
    name = "from_file"
    def fill(self, context):
        context.A.fill_(1.0)
        context.B.zero_()
        return {}

@hookimpl
def lora_plugins_register_inits(registrar):
    registrar.add(FileInit())
"""


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "mine.py").write_text(FILE)
        return tmp_path / "mine.py"

    def test_a_file_is_a_plugin(self, file):
        registry = build_registry(files=[file])
        found = info(registry, "mine")
        assert (found.distribution, found.state, found.names(INITS)) == (str(file), "loaded", ("from_file",))

    def test_one_that_the_environment_names(self, file, monkeypatch, tmp_path):
        monkeypatch.setenv(LOAD_VARIABLE, str(file))
        model = nn.Sequential(nn.Linear(2, 2))
        LoraModel(model, LoraConfig(r=1, init="from_file"), registry=build_registry())
        assert (model[0].lora_A["default"] == 1).all()

    @pytest.mark.parametrize(
        "given", [lambda file: [str(file)], lambda file: file.parent.glob("*.py")], ids=["text", "glob"]
    )
    def test_they_come_as_texts_and_from_iterators(self, file, given):
        assert info(build_registry(files=given(file)), "mine").state == "loaded"

    def test_it_is_imported_once(self, file):
        first, second = (build_registry(files=[file]).get(INITS, "from_file") for _ in range(2))
        assert type(first) is type(second)

    def test_one_that_fails_was_asked_for(self, tmp_path):
        (tmp_path / "bad.py").write_text("raise RuntimeError('no license server')")
        with pytest.raises(PluginError, match=r"'bad' of .*bad\.py.*no license server") as caught:
            build_registry(files=[tmp_path / "bad.py"])
        assert isinstance(caught.value.__cause__, RuntimeError)

    @pytest.mark.parametrize(("name", "words"), [("gone.py", "does not exist"), ("it.txt", r"has to end in \.py")])
    def test_what_is_no_file_of_python(self, tmp_path, name, words):
        (tmp_path / "it.txt").write_text(FILE)
        with pytest.raises(PluginError, match=words):
            build_registry(files=[tmp_path / name])


class TestTrace:
    def test_every_call_of_a_hook_is_written(self, monkeypatch, capsys):
        monkeypatch.setenv(TRACE_VARIABLE, "1")
        registry_of(ZeroInit())
        written = capsys.readouterr().err
        for hook in ("lora_plugins_register_layers", "lora_plugins_register_inits"):
            assert f"{hook} [hook]" in written
            assert f"finish {hook}" in written
        assert f"<Registrar of the inits of 'mine' of {IN_CODE}>" in written

    def test_nothing_is_written_else(self, capsys):
        build_registry()
        assert capsys.readouterr().err == ""
