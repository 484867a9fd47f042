"""Plugins of third parties: real distributions, installed by pip, found by their entry points, used by name."""

import json
import sys

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, PluginError
from lora_plugins.plugins import ALLOW_VARIABLE, BLOCK_VARIABLE, INITS, LAYERS, build_registry
from lora_plugins.testing import INIT_CHECKS, LAYER_CHECKS
from tests.core.processes import run_python, run_tests


def info(registry, name):
    (found,) = [info for info in registry.plugins if info.name == name]
    return found


class Pair(nn.Module):
    """A bilinear layer, which lora_plugins itself does not serve, and a linear one."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(5, 4, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, a, b):
        return self.out(self.bilinear(a, b))


def test_a_checkout_that_is_imported_but_not_installed(monkeypatch):
    monkeypatch.setattr(sys, "path", [])  # nothing that is installed is found; what is imported stays
    with pytest.raises(PluginError, match=r"imported from .*lora_plugins, but lora-plugins is not installed.*pip inst"):
        build_registry()


class TestExample:
    def test_it_is_listed_with_its_distribution_and_version(self, with_plugins):
        with_plugins("plugin_example")
        found = info(build_registry(), "example")
        assert (found.distribution, found.version, found.state) == ("lora-plugins-example", "1.2.3", "loaded")
        assert (found.names(LAYERS), found.names(INITS)) == (("bilinear",), ("orthonormal",))

    def test_without_it_nobody_serves_the_layer(self):
        assert [layer.name for layer in LoraModel.plan(Pair(), LoraConfig()).layers] == ["out"]

    @pytest.mark.slow
    def test_its_own_tests_pass_where_it_is_installed(self, installed):
        site = installed("plugin_example")
        assert f"{len(LAYER_CHECKS) + len(INIT_CHECKS) + 1} passed" in run_tests(site.parent / "source", site)

    def test_its_layer_keeps_the_law(self, with_plugins):
        with_plugins("plugin_example")
        model, a, b = Pair().double().eval(), torch.randn(7, 5).double(), torch.randn(7, 4).double()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = LoraConfig(r=2, alpha=3, target_modules=["bilinear"], init="none")
        lora = LoraModel(model, config, registry=build_registry())
        A, B = model.bilinear.lora_A["default"], model.bilinear.lora_B["default"]
        assert (A.shape, B.shape) == ((2, 20), (6, 2))
        delta = (1.5 * B @ A).reshape(6, 5, 4)
        expected = model.out(nn.functional.bilinear(a, b, before["bilinear.weight"] + delta, model.bilinear.bias))
        adapted = model(a, b)
        torch.testing.assert_close(adapted, expected, rtol=1e-12, atol=1e-12)
        adapted.sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in (A, B))
        lora.merge_adapter()
        torch.testing.assert_close(model(a, b), adapted, rtol=1e-12, atol=1e-12)
        lora.unload()
        assert type(model.bilinear) is nn.Bilinear
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_its_init_is_asked_for_by_name(self, with_plugins):
        with_plugins("plugin_example")
        model = Pair()
        config = LoraConfig(r=3, init="orthonormal", init_options={"gain": 2.0})
        LoraModel(model, config, registry=build_registry())
        A = model.bilinear.lora_A["default"]
        torch.testing.assert_close(A @ A.T, 4 * torch.eye(3))
        assert not model.bilinear.lora_B["default"].any()

    def test_its_options_are_checked_by_itself(self, with_plugins, untouched):
        with_plugins("plugin_example")
        model, registry = Pair(), build_registry()
        with untouched(model), pytest.raises(ValueError, match="gain of orthonormal is 0"):
            LoraModel(model, LoraConfig(init="orthonormal", init_options={"gain": 0}), registry=registry)
        with untouched(model), pytest.raises(ValueError, match=r"'gian'.*Did you mean 'gain'"):
            LoraModel(model, LoraConfig(init="orthonormal", init_options={"gian": 1}), registry=registry)

    def test_a_saved_adapter_names_it_and_loads_again(self, with_plugins, tmp_path):
        with_plugins("plugin_example")
        model, registry = Pair(), build_registry()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = LoraConfig(r=2, target_modules=["bilinear"], init="orthonormal")
        lora = LoraModel(model, config, registry=registry)
        nn.init.normal_(model.bilinear.lora_B["default"])
        folder = lora.save_adapter(tmp_path / "adapter")
        text = (folder / "adapter.json").read_text()
        assert text.count("lora-plugins-example") == 2  # of the layer type, and of the init
        fresh = Pair()
        fresh.load_state_dict(base)
        LoraModel.load_adapter(fresh, folder, registry=registry)
        a, b = torch.randn(2, 5), torch.randn(2, 4)
        assert torch.equal(fresh(a, b), model(a, b))

    def test_without_it_its_adapter_is_refused(self, with_plugins, tmp_path, untouched):
        with_plugins("plugin_example")
        model = Pair()
        lora = LoraModel(model, LoraConfig(r=2, target_modules=["bilinear"]), registry=build_registry())
        folder = lora.save_adapter(tmp_path / "adapter")
        fresh = Pair()
        with (
            untouched(fresh),
            pytest.raises(Exception, match=r"'bilinear' of lora-plugins-example 1\.2\.3, which is not here"),
        ):
            LoraModel.load_adapter(fresh, folder)


class TestBroken:
    def test_it_does_not_stop_a_run_that_does_not_need_it(self, with_plugins):
        with_plugins("plugin_broken", "plugin_example")
        registry = build_registry()
        assert info(registry, "broken_init").state == (
            "failed: ImportError: libquantum.so.7: cannot open shared object file"
        )
        assert info(registry, "example").state == "loaded"
        LoraModel(Pair(), LoraConfig(r=2, init="orthonormal"), registry=registry)

    def test_asking_for_its_init_fails_with_its_own_error(self, with_plugins, untouched):
        with_plugins("plugin_broken")
        model, registry = Pair(), build_registry()
        with untouched(model), pytest.raises(PluginError, match=r"lora-plugins-broken 0\.0\.7.*libquantum") as caught:
            LoraModel(model, LoraConfig(init="broken_init"), registry=registry)
        assert isinstance(caught.value.__cause__, ImportError)


class TestClash:
    def test_both_distributions_are_named(self, with_plugins):
        with_plugins("plugin_clash")
        with pytest.raises(PluginError) as caught:
            build_registry()
        for words in ("torch.nn.modules.linear.Linear", "lora-plugins 0", "lora-plugins-clash 3.0"):
            assert words in str(caught.value)

    def test_every_clash_is_told(self, with_plugins):
        with_plugins("plugin_clash")
        with pytest.raises(PluginError) as caught:
            build_registry()
        assert "'torch.nn.modules.linear.Linear'" in str(caught.value)
        assert "init 'kaiming'" in str(caught.value)

    def test_a_clashing_name_is_found_when_no_class_clashes(self, with_plugins, monkeypatch):
        with_plugins("plugin_clash")
        monkeypatch.setenv(BLOCK_VARIABLE, "other_linear")
        with pytest.raises(PluginError, match=r"init 'kaiming'.*lora-plugins 0.*lora-plugins-clash 3\.0"):
            build_registry()

    def test_the_way_out_that_the_error_names_works(self, with_plugins, monkeypatch):
        with_plugins("plugin_clash")
        monkeypatch.setenv(BLOCK_VARIABLE, " other_kaiming ,other_linear")
        registry = build_registry()
        assert {info(registry, name).state for name in ("other_kaiming", "other_linear")} == {
            f"blocked by {BLOCK_VARIABLE}"
        }
        assert type(registry.get(INITS, "kaiming")).__module__ == "lora_plugins.inits.kaiming"


ZEROS = """
from lora_plugins import InitPlugin, hookimpl
class Zeros(InitPlugin):
    name = "zeros"
    def fill(self, context):
        return {}
@hookimpl
def lora_plugins_register_inits(registrar):
    registrar.add(Zeros())
"""


class TestBlocking:
    def test_a_blocked_plugin_is_not_even_imported(self, with_plugins, monkeypatch):
        with_plugins("plugin_example", "plugin_broken")
        monkeypatch.setenv(BLOCK_VARIABLE, "broken_init,example")
        registry = build_registry()
        assert {info(registry, name).state for name in ("broken_init", "example")} == {f"blocked by {BLOCK_VARIABLE}"}
        assert "lora_plugins_example" not in sys.modules

    def test_what_is_missing_without_it_says_that_it_is_blocked(self, with_plugins, monkeypatch):
        with_plugins("plugin_example")
        monkeypatch.setenv(BLOCK_VARIABLE, "example")
        with pytest.raises(
            PluginError, match=r"'orthonormal'.*'example' of lora-plugins-example 1\.2\.3 is blocked by LORA"
        ):
            build_registry().get(INITS, "orthonormal")

    def test_one_of_two_of_the_same_name(self, tmp_path, monkeypatch):
        """The way out that the error of their clash names."""
        for distribution in ("one-lora", "two-lora"):
            module, folder = distribution.replace("-", "_"), tmp_path / f"{distribution}-1.0.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
            (folder / "entry_points.txt").write_text(f"[lora_plugins]\nzeros = {module}\n")
            (tmp_path / f"{module}.py").write_text(ZEROS)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(PluginError, match=f"set {BLOCK_VARIABLE}=two-lora:zeros"):
            build_registry()
        monkeypatch.setenv(BLOCK_VARIABLE, "two-lora:zeros")
        registry = build_registry()
        states = {each.distribution: each.state for each in registry.plugins if each.name == "zeros"}
        assert states == {"one-lora": "loaded", "two-lora": f"blocked by {BLOCK_VARIABLE}"}
        monkeypatch.delenv(BLOCK_VARIABLE)
        assert "zeros" in build_registry(allow=["two-lora:zeros"]).of(INITS)

    def test_only_allowed_plugins_load(self, with_plugins, monkeypatch):
        with_plugins("plugin_example", "plugin_broken")
        monkeypatch.setenv(ALLOW_VARIABLE, "example")
        registry = build_registry()
        assert info(registry, "broken_init").state == f"blocked by {ALLOW_VARIABLE}"
        assert info(registry, "example").state == info(registry, "layers").state == "loaded"

    def test_a_config_allows_and_blocks(self, with_plugins):
        with_plugins("plugin_example", "plugin_clash")
        model = Pair()
        config = LoraConfig(r=2, init="orthonormal", allow_plugins=["example"])
        lora = LoraModel(model, config)
        assert [layer.name for layer in lora.plans["default"].layers] == ["bilinear", "out"]
        fresh = Pair()
        fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
        LoraModel.load_packed(fresh, lora.pack("default"))  # the same plugins, without saying so again
        with pytest.raises(PluginError, match=r"'example' of lora-plugins-example 1\.2\.3 is blocked by block_plugins"):
            LoraModel(
                Pair(), LoraConfig(init="orthonormal", block_plugins=["example", "other_kaiming", "other_linear"])
            )

    @pytest.mark.parametrize("field", ["allow_plugins", "block_plugins"])
    def test_a_misspelt_name_is_warned_of(self, with_plugins, field):
        with_plugins("plugin_example")
        with pytest.warns(
            UserWarning, match=rf"{field} names 'exampel', which is not installed. Did you mean 'example'"
        ):
            LoraModel(Pair(), LoraConfig(r=2, **{field: ["exampel"]}))
        LoraModel(Pair(), LoraConfig(r=2, block_plugins=["of_another_machine"]))

    def test_our_own_plugins_cannot_be_blocked(self, monkeypatch):
        monkeypatch.setenv(BLOCK_VARIABLE, "layers,inits")
        assert build_registry().layer_for(nn.Linear).name == "linear"


SCRIPT = """
import torch
from torch import nn
from lora_plugins import LoraConfig, LoraModel

model = nn.ModuleDict({"pair": nn.Bilinear(3, 4, 5)})
lora = LoraModel(model, LoraConfig(r=2, init="orthonormal"))
print(lora.plans["default"])
A = model["pair"].lora_A["default"]
assert torch.allclose(A @ A.T, torch.eye(2), atol=1e-6)
"""


def test_a_fresh_process_uses_it_without_any_registration(installed):
    """What a user does: install the distribution, name its init, run."""
    run = run_python("-W", "error", "-c", SCRIPT, paths=map(installed, ("plugin_example", "plugin_broken")))
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[1].split() == ["pair", "Bilinear", "bilinear", "2", "8", "34"]


MODULE = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Compare(LightningModule):
    def __init__(self):
        super().__init__()
        self.pair = nn.Bilinear(3, 4, 2)

    def training_step(self, batch, _):
        first, second, label = batch
        return nn.functional.cross_entropy(self.pair(first, second), label)


class Pairs(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 3), torch.randn(8, 4), torch.arange(8) % 2), batch_size=4)
"""

YAML = """
seed_everything: 0
trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_checkpointing: false, enable_progress_bar: false}
model: compare.Compare
data: compare.Pairs
lora: {r: 2, target_modules: [pair], init: %s}
lora_callback: {save_adapter_to: adapter}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
"""


class TestFromYaml:
    """The command line, in a process of its own, over a module and a YAML file of a user."""

    @staticmethod
    def fit(folder, installed, init, *command):
        pytest.importorskip("lightning")
        (folder / "compare.py").write_text(MODULE)
        (folder / "run.yaml").write_text(YAML % init)
        return run_python(
            *("-P", "-m", "lora_plugins", *(command or ("fit", "--config", "run.yaml"))),
            paths=[installed("plugin_example"), installed("plugin_broken"), folder],
            cwd=folder,
            COLUMNS="250",  # a wide terminal, so that a table does not break the words that are looked for
        )

    def test_layer_type_and_init_are_used_by_name(self, installed, tmp_path):
        run = self.fit(tmp_path, installed, "orthonormal")
        assert run.returncode == 0, run.stdout + run.stderr
        manifest = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
        assert manifest["init"] == {"name": "orthonormal", "distribution": "lora-plugins-example", "version": "1.2.3"}
        assert manifest["layers"]["pair"]["plugin"] == "bilinear"

    def test_asking_for_a_broken_plugin_names_its_distribution_and_error(self, installed, tmp_path):
        run = self.fit(tmp_path, installed, "broken_init")
        assert run.returncode != 0
        assert "lora-plugins-broken 0.0.7" in run.stderr
        assert "libquantum.so.7" in run.stderr
        assert not (tmp_path / "adapter").exists()

    def test_plugins_are_listed_with_distribution_version_and_state(self, installed, tmp_path):
        run = self.fit(tmp_path, installed, "orthonormal", "plugins")
        for words in ("lora-plugins-example", "1.2.3", "bilinear", "orthonormal", "lora-plugins-broken", "libquantum"):
            assert words in run.stdout
