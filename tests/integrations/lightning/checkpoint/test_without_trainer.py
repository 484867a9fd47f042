"""What loads a small file without a Trainer."""

import copy
import subprocess
import sys
import tempfile
from abc import ABC
from typing import Generic, TypeVar

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCheckpointMixin, load_from_checkpoint
from lora_plugins.testing.full_disk import no_file_beyond
from tests.integrations.lightning.checkpoint.checkpoint_cases import by_trainer, shown_by_lightning
from tests.integrations.lightning.toys import Classifier, differing, loader, lora, trainer, values

T = TypeVar("T")


@pytest.mark.slow
def test_fresh_process_gives_the_same_predictions(tmp_path):
    run = trainer(tmp_path, [lora()])
    module = Classifier()
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    expected = torch.cat(trainer(tmp_path, []).predict(module, loader()))
    code = (
        "import sys, torch; from lora_plugins.integrations.lightning import load_from_checkpoint;"
        "from tests.integrations.lightning.toys import Classifier, loader;"
        "torch.set_num_threads(1); m = load_from_checkpoint(Classifier, sys.argv[1]).eval();"
        "torch.save(torch.cat([m(x) for x, _ in loader()]).detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "it.ckpt", tmp_path / "out.pt"], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)


def test_an_adapter_folder_is_told_from_a_checkpoint(tmp_path):
    module = Classifier()
    LoraModel(module, LoraConfig(target_modules=["net.0"])).save_adapter(tmp_path / "adapter")

    class Loading(LoraCheckpointMixin, Classifier):
        pass

    with pytest.raises(AdapterFileError, match=r"is an adapter folder.*LoraModel.load_adapter\(module, '.*adapter'\)"):
        Loading.load_from_checkpoint(tmp_path / "adapter")


def test_a_full_disk_for_temporary_files_is_told(tmp_path, monkeypatch):
    run = trainer(tmp_path, [lora()])
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with no_file_beyond(100), pytest.raises(OSError, match=r"File too large: .*/temporary/"):
        load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
    assert list((tmp_path / "temporary").iterdir()) == []


class TestOneLiner:
    def test_class_is_the_users_own_and_arguments_come_from_the_file(self, tmp_path):
        run = trainer(tmp_path, [lora()])
        run.fit(Classifier(width=24), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        module = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
        assert type(module) is Classifier
        assert module.net[0].out_features == 24
        assert LoraModel(module).active_adapters == ("default",)

    def test_arguments_come_from_a_file_of_their_own(self, tmp_path):
        class Needs(Classifier):
            def __init__(self, width):
                super().__init__(width=width)

            def save_hyperparameters(self):
                pass

        run = trainer(tmp_path, [lora()])
        run.fit(Needs(24), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        (tmp_path / "hparams.yaml").write_text("width: 24")
        module = load_from_checkpoint(Needs, tmp_path / "it.ckpt", hparams_file=tmp_path / "hparams.yaml")
        assert module.net[0].out_features == 24

    def test_what_is_loaded_first_is_of_the_file(self, tmp_path):
        """By that, Lightning tells the device of the module."""

        class Notes(Classifier):
            def load_state_dict(self, state_dict, *args, **kwargs):
                self.first = next(iter(state_dict))
                return super().load_state_dict(state_dict, *args, **kwargs)

        path = by_trainer(tmp_path, cls=Notes)
        assert load_from_checkpoint(Notes, path).first == "net.0.lora_A.default"

    @pytest.mark.parametrize("base", [ABC, Generic[T]], ids=["ABC", "Generic"])
    def test_class_has_another_base_before_lightnings(self, tmp_path, base):
        class Other(base, LightningModule):
            def __init__(self):
                super().__init__()
                self.net = nn.Linear(4, 3)

            training_step, configure_optimizers = Classifier.training_step, Classifier.configure_optimizers
            forward, _step, lr = Classifier.forward, Classifier._step, 0.05

        torch.manual_seed(0)
        module = Other()
        run = trainer(tmp_path, [lora(LoraConfig(r=2))])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        torch.manual_seed(0)
        loaded = load_from_checkpoint(Other, tmp_path / "it.ckpt")
        assert type(loaded) is Other
        assert not differing(values(loaded), values(module))

    @pytest.mark.parametrize("callbacks", [[lora], []], ids=["adapted", "plain"])
    def test_mixin_makes_lightnings_own_method_do_it(self, tmp_path, callbacks):
        class Ours(LoraCheckpointMixin, Classifier):
            pass

        run = trainer(tmp_path, [make() for make in callbacks])
        module = Ours()
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        assert not differing(values(Ours.load_from_checkpoint(tmp_path / "it.ckpt")), values(module))

    def test_class_itself_says_how_an_adapter_file_is_loaded(self, tmp_path):
        with shown_by_lightning(r"load_from_checkpoint\(Classifier, path\)") as refused:
            Classifier.load_from_checkpoint(by_trainer(tmp_path))
        assert "net.0.weight" not in str(refused.value)

    def test_plain_file_is_refused_with_what_to_call(self, tmp_path):
        run = trainer(tmp_path, [])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        with pytest.raises(AdapterFileError, match=r"Classifier\.load_from_checkpoint"):
            load_from_checkpoint(Classifier, tmp_path / "it.ckpt")

    def test_class_that_the_file_names_has_to_be_imported(self, tmp_path):
        path = by_trainer(tmp_path)
        checkpoint = torch.load(path)
        checkpoint["hyper_parameters"]["_class_path"] = "elsewhere.Net"  # as LightningCLI saves it
        torch.save(checkpoint, path)
        with pytest.raises(AdapterFileError, match=r"made from elsewhere\.Net, .* imported subclass of Classifier"):
            load_from_checkpoint(Classifier, path)

    def test_other_base_is_refused(self, tmp_path):
        with pytest.raises(AdapterFileError, match="another base"):
            load_from_checkpoint(Classifier, by_trainer(tmp_path), base_seed=1)

    @pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "head_only", "tail_missing"])
    def test_truncated_file_is_refused(self, tmp_path, size):
        path = by_trainer(tmp_path)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(AdapterFileError, match="truncated"):
            load_from_checkpoint(Classifier, path)


def test_two_adapters_on_one_module(tmp_path):
    def pair():
        return [
            lora(LoraConfig(r=2, target_modules=["net.0"]), adapter_name="first"),
            lora(LoraConfig(r=1, target_modules=["net.0", "net.3"]), adapter_name="second"),
        ]

    module = Classifier()
    run = trainer(tmp_path, pair())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
    assert LoraModel(again).active_adapters == ("first", "second")
    assert not differing(values(module), values(again))


def test_module_that_saves_its_head_alone(tmp_path):
    """Its hook takes the adapters of the backbone out of the state dict, and puts the backbone in again."""

    class HeadAlone(Classifier):
        def on_save_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: value for key, value in state.items() if key.startswith("net.3.")}

        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"].update({f"net.{key}": value for key, value in self.net.state_dict().items()})

    module = HeadAlone()
    trainer(tmp_path, [lora(), ModelCheckpoint(tmp_path, filename="it")]).fit(module, loader(), loader())
    again = load_from_checkpoint(HeadAlone, tmp_path / "it.ckpt")
    kept = {f"net.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}  # taken out as well
    assert differing(values(again), values(module)) <= kept


class Averages(Classifier):
    """Keeps an average of its network, in an entry of its own."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for own, its in zip(self.average.parameters(), self.net.parameters(), strict=True):
                own.lerp_(its, 0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["average"] = self.average.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.average.load_state_dict(checkpoint["average"])


class HidesItsAverage(Averages):
    """Keeps it out of its state dict, and starts it with weights of its own."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.strict_loading = False
        for parameter in self.average.parameters():
            parameter.mul_(1.1)

    def state_dict(self, *args, **kwargs):
        return {key: value for key, value in super().state_dict(*args, **kwargs).items() if "average" not in key}


class SwapsItsAverage(Averages):
    """Writes its average under the names of the network, for those who load it elsewhere."""

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["network"] = {key: value for key, value in state.items() if key.startswith("net.")}
        for key in [key for key in state if key.startswith("average.")]:
            state[key.replace("average.", "net.")] = state.pop(key)

    def on_load_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        state.update({key.replace("net.", "average."): value for key, value in state.items() if key[:4] == "net."})
        state.update(checkpoint["network"])


class BuildsItsHead(Classifier):
    """Leaves it to the file what values its head has."""

    def on_load_checkpoint(self, checkpoint):
        self.net[3] = nn.Linear(16, 3)


class BuildsItsNorm(Classifier):
    def on_load_checkpoint(self, checkpoint):
        self.net[1] = nn.BatchNorm1d(16)


def trained(module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def everything(module) -> dict[str, torch.Tensor]:
    """What a module has, whatever its own state dict says."""
    return {key: tensor.clone() for key, tensor in nn.Module.state_dict(module).items()}


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the:UserWarning")
@pytest.mark.parametrize("cls", [Averages, HidesItsAverage, SwapsItsAverage, BuildsItsHead, BuildsItsNorm])
def test_a_hook_finds_what_it_finds_in_fit(tmp_path, cls):
    """The adapted module, with the frozen base of layers that it builds again."""
    config = LoraConfig(r=2, target_modules=["0", "3"] if issubclass(cls, Averages) else ["net.0"])
    module = cls(lr=0.3)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, [lora(config), saver], max_epochs=2).fit(module, loader(), loader())
    (score,) = trainer(tmp_path, [lora(config)]).validate(module, loader(), verbose=False)
    path = tmp_path / "epoch=1.ckpt"
    loaded = load_from_checkpoint(cls, path)
    resumed = cls(lr=0.3)
    trainer(tmp_path, [lora(config)], max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for found in (loaded, resumed):
        assert not differing(everything(found), everything(module))
    assert trained(resumed) == trained(module)
    assert trainer(tmp_path, [lora(config)]).validate(cls(), loader(), ckpt_path=path, verbose=False) == [score]


class LoadsAnotherBase(Classifier):
    """Takes its pretrained weights from somewhere else whenever it is loaded."""

    def on_load_checkpoint(self, checkpoint):
        self.net[0].load_state_dict(Classifier(base_seed=1).net[0].state_dict(), strict=False)


def test_a_hook_that_loads_another_base_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["net.0"])
    run = trainer(tmp_path, [lora(config)], max_epochs=1)
    run.fit(LoadsAnotherBase(), loader())
    run.save_checkpoint(path := tmp_path / "one.ckpt")
    with pytest.raises(AdapterFileError, match=r"another base: '.*0\.weight' differ"):
        load_from_checkpoint(LoadsAnotherBase, path)
    with pytest.raises(AdapterFileError, match=r"another base: '.*0\.weight' differ"):
        trainer(tmp_path, [lora(config)], max_epochs=2).fit(LoadsAnotherBase(), loader(), ckpt_path=path)


def test_a_module_that_is_lenient_about_keys_loads(tmp_path):
    """A class says so by `strict_loading`, and then Lightning refuses any other word on it."""

    class Lenient(Classifier):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.strict_loading = False

    module = Lenient()
    run = trainer(tmp_path, [lora()])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert not differing(values(load_from_checkpoint(Lenient, tmp_path / "it.ckpt")), values(module))
