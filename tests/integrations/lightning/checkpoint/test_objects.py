"""Hyperparameters that are objects, constructor arguments that a file lacks, and the line that loads it."""

import argparse
import contextlib
import enum
import functools
import pathlib
import re
import types
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from packaging.version import Version
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import LoraCheckpointMixin, load_from_checkpoint
from lora_plugins.integrations.lightning.cli import export_checkpoint, merge_checkpoint
from tests.integrations.lightning.checkpoint.checkpoint_cases import shown_by_lightning
from tests.integrations.lightning.toys import Classifier, differing, loader, lora, trainer, values


class Mode(enum.Enum):
    SMALL = 16
    LARGE = 24


@dataclass(frozen=True)
class Sizes:
    width: int = 24
    path: pathlib.Path = pathlib.Path("a")


class Configured(Classifier):
    """Takes any object, and is as wide as it says."""

    def __init__(self, option) -> None:
        super().__init__(width=24)
        self.save_hyperparameters("option")
        self.option = option


class WithNetwork(Classifier):
    """Needs a network, which is no hyperparameter."""

    def __init__(self, net, lr: float = 0.05) -> None:
        super().__init__(lr=lr)
        self.net = net

    def save_hyperparameters(self):
        super().save_hyperparameters({"lr": 0.05})


HERE = __name__
OBJECTS = {
    "enum": (Mode.LARGE, [f"{HERE}.Mode"]),
    "dataclass": (Sizes(), [f"{HERE}.Sizes"]),
    "class": (nn.GELU, ["torch.nn.modules.activation.GELU"]),
    "partial": (functools.partial(torch.optim.Adam, lr=0.1), ["functools.partial", "torch.optim.adam.Adam"]),
}
HARMLESS = {
    "path": pathlib.Path("a/b"),
    "range": range(3),
    "frozenset": frozenset([1]),
    "namespace": argparse.Namespace(a=1, b=[argparse.Namespace(c=pathlib.Path("a"))]),
    "simple namespace": types.SimpleNamespace(a=1),
    "numbers of numpy": [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True)],
    "attributes": AttributeDict(a=1, b=[AttributeDict(c=2), (3, AttributeDict(d=4))]),
}


def written(tmp_path, module):
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    return tmp_path / "it.ckpt"


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_have_to_be_allowed(kind, tmp_path):
    option, names = OBJECTS[kind]
    module = Configured(option)
    path = written(tmp_path, module)
    with pytest.raises(AdapterFileError, match="must be allowed before they are read") as refused:
        load_from_checkpoint(Configured, path)
    assert f"allow_globals={names!r}" in str(refused.value)
    assert "truncated" not in str(refused.value)
    loaded = load_from_checkpoint(Configured, path, allow_globals=names)
    assert repr(loaded.option) == repr(option)
    assert not differing(values(loaded), values(module))
    with pytest.raises(AdapterFileError, match="must be allowed before they are read"):  # nothing stays allowed
        load_from_checkpoint(Configured, path)


@pytest.mark.parametrize("kind", HARMLESS)
@pytest.mark.parametrize("through", ["function", "mixin", "trainer"])
def test_harmless_types_are_read_as_they_are(kind, through, tmp_path):
    option = HARMLESS[kind]
    module = Configured(option)
    path = written(tmp_path, module)
    if through == "trainer":
        other = Configured(option)
        trainer(tmp_path, [lora()]).test(other, loader(), ckpt_path=path, weights_only=True, verbose=False)
        assert not differing(values(other), values(module))
        return

    class Ours(LoraCheckpointMixin, Configured):
        pass

    loaded = load_from_checkpoint(Configured, path) if through == "function" else Ours.load_from_checkpoint(path)
    assert loaded.option == option
    assert type(loaded.option) is type(option)
    if kind == "attributes":
        assert loaded.option.b[0].c + loaded.option.b[1][1].d == 6


def test_numbers_that_numpy_1_wrote_are_read(tmp_path):
    path = written(tmp_path, Configured(np.float64(0.5)))
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert load_from_checkpoint(Configured, path).option == 0.5


def test_attributes_beside_objects_are_read_as_they_are(tmp_path):
    class Ours(LoraCheckpointMixin, Configured):
        pass

    path = written(tmp_path, Configured([AttributeDict(a=1), Mode.LARGE]))
    assert Ours.load_from_checkpoint(path, weights_only=False).option[0].a == 1


class OwnLoader(Classifier):
    """Reads the file itself before Lightning does, twice, as chemprop does."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path, map_location=None, hparams_file=None, strict=True, **kwargs):
        for _ in range(2):
            assert torch.load(checkpoint_path, weights_only=False)["hyper_parameters"]["width"] == 24
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=False, **kwargs
        )


@pytest.mark.parametrize("mixed", [True, False], ids=["mixin", "function"])
def test_a_class_with_a_loader_of_its_own(mixed, tmp_path):
    class Ours(LoraCheckpointMixin, OwnLoader):
        pass

    module = OwnLoader(width=24)
    path = written(tmp_path, module)
    loaded = Ours.load_from_checkpoint(path) if mixed else load_from_checkpoint(OwnLoader, path)
    assert not differing(values(loaded), values(module))


class Options(dict):
    """What torch reads in no case without unpickling; 2.8 does."""


since_2_10 = pytest.mark.skipif(Version(torch.__version__) < Version("2.10"), reason="torch 2.8 and 2.9 read it")


@since_2_10
def test_what_cannot_be_read_without_unpickling_needs_trust(tmp_path):
    path = written(tmp_path, Configured(Options(a=1)))
    with pytest.raises(AdapterFileError, match=r"though their types are allowed: .*Options.* weights_only=False"):
        load_from_checkpoint(Configured, path, allow_globals=[Options])
    assert load_from_checkpoint(Configured, path, weights_only=False).option == {"a": 1}
    assert merge_checkpoint(Configured, path, tmp_path / "out.ckpt", weights_only=False).is_file()


class Outer:
    @dataclass(frozen=True)
    class Inner:
        """A class that pickles find by `getattr`."""

        width: int = 24

    def method(self):
        """A method, which they find likewise."""


@pytest.mark.parametrize("option", [Outer.Inner(), Outer().method], ids=["nested-class", "method"])
def test_what_cannot_be_allowed_by_name_needs_trust(option, tmp_path):
    path = written(tmp_path, Configured(option))
    with pytest.raises(AdapterFileError, match=r"or a method: 'builtins\.getattr', .*Outer'\. .* weights_only=False"):
        load_from_checkpoint(Configured, path)
    assert type(load_from_checkpoint(Configured, path, weights_only=False).option) is type(option)


def test_classes_themselves_and_old_names_are_allowed_too(tmp_path):
    path = written(tmp_path, Configured(Mode.LARGE))
    for given in ([Mode], [(Mode, f"{HERE}.Mode")]):
        assert load_from_checkpoint(Configured, path, allow_globals=given).option is Mode.LARGE
    for name in ("package.Mode", "./package.Mode"):
        with pytest.raises(ConfigError, match=rf"allow_globals names '{re.escape(name)}', which cannot be imported"):
            load_from_checkpoint(Configured, path, allow_globals=[name])
    with pytest.raises(ConfigError, match=r"allow_globals is a list, not 'package\.Mode'"):
        load_from_checkpoint(Configured, path, allow_globals="package.Mode")


def test_an_argument_that_the_file_lacks_is_named(tmp_path):
    path = written(tmp_path, WithNetwork(Classifier().net))
    with pytest.raises(AdapterFileError, match=r"WithNetwork needs 'net'.*load_from_checkpoint: net=\.\.\."):
        load_from_checkpoint(WithNetwork, path)
    assert LoraModel(load_from_checkpoint(WithNetwork, path, net=Classifier().net)).active_adapters == ("default",)


class SavesNetwork(Classifier):
    """Has its network among its hyperparameters, as Lightning warns of and many do."""

    def __init__(self, net, mode: Mode = Mode.SMALL) -> None:
        super().__init__()
        LightningModule.save_hyperparameters(self, {"net": net, "mode": mode})
        self.net = net

    def save_hyperparameters(self, *_):
        """Those of its own are all."""


class PassesOn(SavesNetwork):
    """Takes what its base takes, which its own signature does not say."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)


@dataclass
class Nets:
    net: nn.Module
    depth: int = 1


class SavesSome(Classifier):
    """Has networks among its hyperparameters, in something that holds them, which nobody has to give."""

    def __init__(self, nets=None) -> None:
        super().__init__()
        LightningModule.save_hyperparameters(self, {"nets": nets})
        self.net = nets["a"] if isinstance(nets, dict) else nets.net if isinstance(nets, Nets) else nets[0]
        self.out = nn.Linear(3, 3, bias=False)
        nn.init.eye_(self.out.weight)

    def forward(self, x):
        return self.out(self.net(x))

    def save_hyperparameters(self, *_):
        """Those of its own are all."""


class SavesLoss(Classifier):
    """Has its loss among its hyperparameters."""

    def __init__(self, criterion) -> None:
        super().__init__()
        LightningModule.save_hyperparameters(self, {"criterion": criterion})
        self.criterion = criterion

    def save_hyperparameters(self, *_):
        """Those of its own are all."""


@pytest.mark.filterwarnings("ignore:Attribute 'criterion' is an instance:UserWarning")
def test_a_loss_among_hyperparameters_is_as_it_was(tmp_path):
    path = written(tmp_path, SavesLoss(nn.CrossEntropyLoss()))
    again = load_from_checkpoint(SavesLoss, path, allow_globals=[nn.CrossEntropyLoss])
    assert not again.criterion._load_state_dict_pre_hooks


HOLDERS = {
    "list": lambda net: [net],
    "tuple": lambda net: (net, 1),
    "dict": lambda net: {"a": net},
    "dataclass": Nets,
}


@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("layers", [["net.0"], ["out"]], ids=["adapted", "norm that stands still"])
def test_what_holds_an_adapted_network_is_left_out_and_asked_for(tmp_path, capsys, hold, layers):
    module, saver = SavesSome(hold(Classifier().net)), ModelCheckpoint(tmp_path, filename="it")
    trainer(tmp_path, [lora(LoraConfig(r=2, target_modules=layers)), saver], max_epochs=1).fit(module, loader())
    assert "nets=..." in capsys.readouterr().out
    again = load_from_checkpoint(SavesSome, tmp_path / "it.ckpt", nets=hold(Classifier().net))
    assert not differing(values(again), values(module))


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance:UserWarning")
class TestNetworkAmongHyperparameters:
    """It is adapted in place, and would bring the whole base into the file."""

    @pytest.mark.parametrize("options", [{}, {"target": "net"}], ids=["whole", "target"])
    def test_is_left_out_and_asked_for(self, tmp_path, capsys, options):
        module, saver = SavesNetwork(Classifier().net), ModelCheckpoint(tmp_path, filename="it")
        trainer(tmp_path, [lora(LoraConfig(r=2), **options), saver], max_epochs=1).fit(module, loader())
        assert "net=..." in capsys.readouterr().out
        path = tmp_path / "it.ckpt"
        with pytest.raises(AdapterFileError, match=r"SavesNetwork needs 'net'.*net=\.\.\."):
            load_from_checkpoint(SavesNetwork, path, allow_globals=[Mode])
        again = load_from_checkpoint(SavesNetwork, path, allow_globals=[Mode], net=Classifier().net)
        assert not differing(values(again), values(module))

    def test_merged_module_has_it(self, tmp_path):
        module = SavesNetwork(Classifier().net)
        run = trainer(tmp_path, [lora(merge_on_fit_end=True)], max_epochs=1)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        again = SavesNetwork.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=False)
        assert not differing(values(again), values(module))

    def test_is_no_copy_of_weights_that_somebody_averages(self, tmp_path, recwarn):
        trainer(tmp_path, [lora()], max_epochs=1).fit(SavesNetwork(Classifier().net), loader())
        assert not [each for each in recwarn if "copies of weights" in str(each.message)]


def test_best_checkpoint_of_the_run_itself_is_read_whatever_it_holds(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/loss")
    best = lora(merge_source="best", save_adapter_to=str(tmp_path / "adapter"))
    module = Configured(Mode.LARGE)
    trainer(tmp_path, [best, saver]).fit(module, loader(), loader())
    again = load_from_checkpoint(Configured, saver.best_model_path, allow_globals=[Mode])
    assert not differing(values(again), values(module))


@pytest.mark.parametrize("write", [merge_checkpoint, export_checkpoint], ids=["merge", "export"])
def test_merging_takes_arguments_and_objects(write, tmp_path):
    suffix = {merge_checkpoint: "ckpt", export_checkpoint: "safetensors"}[write]
    path = written(tmp_path, WithNetwork(Classifier().net))
    assert write(WithNetwork, path, tmp_path / f"out.{suffix}", net=Classifier().net).is_file()
    path = written(tmp_path, Configured(Mode.LARGE))
    assert write(Configured, path, tmp_path / f"two.{suffix}", allow_globals=[Mode]).is_file()


class OfWidth(Classifier):
    """Needs a width, which is no hyperparameter."""

    def __init__(self, width: int, mode: Mode = Mode.SMALL) -> None:
        self.mode = mode
        super().__init__(width=width)

    def save_hyperparameters(self):
        super().save_hyperparameters({"mode": self.mode})


@pytest.mark.parametrize(("command", "suffix"), [("merge", "ckpt"), ("export", "safetensors")])
def test_commands_take_arguments_and_objects(command, suffix, tmp_path, capsys):
    path, out = written(tmp_path, OfWidth(24, Mode.LARGE)), tmp_path / f"out.{suffix}"
    call = [command, str(path), str(out), "--model", f"{HERE}.OfWidth"]
    assert main(call) != 0
    assert f"allow_globals=['{HERE}.Mode']" in capsys.readouterr().err
    call += ["--allow-globals", f"{HERE}.Mode"]
    assert main(call) != 0
    assert "OfWidth needs 'width'" in capsys.readouterr().err
    assert main([*call, "--argument", "width"]) != 0
    assert "NAME=VALUE" in capsys.readouterr().err
    assert main([*call, "--argument", "width=24"]) == 0
    assert out.is_file()


class TestLine:
    def test_fit_ends_with_a_line_that_can_be_pasted(self, tmp_path, capsys):
        checkpoints = ModelCheckpoint(tmp_path / ("long" * 40), filename="it")
        module = OfWidth(24, Mode.LARGE)
        trainer(tmp_path, [lora(), checkpoints], max_epochs=1).fit(module, loader())
        line = capsys.readouterr().out.splitlines()[-1]
        assert "load_from_checkpoint(OfWidth, " in line
        assert line.endswith(f", width=..., allow_globals=['{HERE}.Mode'])")
        found = {}
        exec(line.replace("width=...", "width=24"), found)
        assert not differing(values(found["module"]), values(module))

    @pytest.mark.parametrize(
        ("option", "argument"),
        [
            pytest.param(Options(a=1), "weights_only=False", marks=since_2_10),
            (Outer.Inner(), "weights_only=False"),
            (Sizes(), f"allow_globals=['{HERE}.Sizes']"),
            (np.str_("a"), "weights_only=False"),
            (pathlib.Path("a"), ""),
        ],
        ids=["dictionary", "nested-class", "dataclass", "text of numpy", "harmless"],
    )
    def test_it_reads_the_objects_in_the_file(self, option, argument, tmp_path, capsys):
        trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path)], max_epochs=1).fit(Configured(option), loader())
        line = capsys.readouterr().out.splitlines()[-1]
        assert argument in line
        assert bool(argument) == ("weights_only" in line or "allow_globals" in line)
        found = {}
        exec(line, found)
        assert found["module"].option == option

    @pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"enable_checkpointing": False}], ids=str)
    def test_without_a_file_there_is_none(self, options, tmp_path, capsys):
        trainer(tmp_path, [lora()], max_epochs=1, **options).fit(Classifier(), loader())
        assert "load_from_checkpoint" not in capsys.readouterr().out

    @pytest.mark.parametrize("saves", [True, False], ids=["hyperparameters", "none"])
    def test_the_class_itself_says_it(self, saves, tmp_path):
        module = Classifier()
        if not saves:
            module.hparams.clear()
            module._hparams_initial = None
        path = written(tmp_path, module)
        with shown_by_lightning(r"import Classifier; module = load_from_checkpoint\(Classifier, path\)"):
            Classifier.load_from_checkpoint(path)
        assert not differing(values(load_from_checkpoint(Classifier, path)), values(module))

    def test_hooks_see_the_hyperparameters_of_the_module(self, tmp_path):
        seen = []

        class Hooked(Classifier):
            def on_load_checkpoint(self, checkpoint):
                seen.append(dict(checkpoint["hyper_parameters"]))

        path = written(tmp_path, Hooked(width=24))
        load_from_checkpoint(Hooked, path)
        trainer(tmp_path, [lora()]).test(Hooked(width=24), loader(), ckpt_path=path, verbose=False)
        assert seen == [dict(Classifier(width=24).hparams)] * 2


def test_a_damaged_file_is_still_called_so(tmp_path):
    path = written(tmp_path, Classifier())
    path.write_bytes(path.read_bytes()[:2000])
    with contextlib.suppress(FileNotFoundError), pytest.raises(AdapterFileError, match="truncated or damaged"):
        load_from_checkpoint(Classifier, path)


def test_the_line_allows_what_only_this_process_has_allowed(tmp_path, capsys):
    with torch.serialization.safe_globals([Mode]):
        saver = ModelCheckpoint(tmp_path, filename="it")
        trainer(tmp_path, [lora(), saver], max_epochs=1).fit(Configured(Mode.LARGE), loader())
        assert Mode in torch.serialization.get_safe_globals()
    assert f"it.ckpt', allow_globals=['{HERE}.Mode'])" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance:UserWarning")
def test_a_network_that_a_constructor_passes_on_is_asked_for(tmp_path, capsys):
    module, saver = PassesOn(net=Classifier().net), ModelCheckpoint(tmp_path, filename="it")
    trainer(tmp_path, [lora(), saver], max_epochs=1).fit(module, loader())
    assert "it.ckpt', net=..., allow_globals=" in capsys.readouterr().out
    again = load_from_checkpoint(PassesOn, tmp_path / "it.ckpt", net=Classifier().net, allow_globals=[Mode])
    assert not differing(values(again), values(module))
