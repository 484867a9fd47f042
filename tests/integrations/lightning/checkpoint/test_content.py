"""The same small file on every path on which Lightning saves, and what loads it again."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback, LoraCheckpointMixin, load_from_checkpoint
from lora_plugins.integrations.lightning.checkpoint import KEY
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, load, loader, trainer, values

ADAPTER_KEYS = {f"net.{i}.lora_{factor}.default" for i in (0, 3) for factor in "AB"}


def callback(**options):
    return LoraCallback(options.pop("config", CONFIG), **{"merge_on_fit_end": False, **options})


class StopError(Exception):
    pass


class Failing(Classifier):
    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            raise StopError


def by_model_checkpoint(folder, **options):
    saver = ModelCheckpoint(folder, filename="it", **options)
    run = trainer(folder, [callback(), saver])
    run.fit(Classifier(), loader(), loader())
    return folder / "it.ckpt"


def by_last(folder):
    run = trainer(folder, [callback(), ModelCheckpoint(folder, save_last=True)])
    run.fit(Classifier(), loader())
    return folder / "last.ckpt"


def by_exception(folder):
    run = trainer(folder, [callback(), OnExceptionCheckpoint(folder, "it")])
    with pytest.raises(StopError):
        run.fit(Failing(), loader())
    return folder / "it.ckpt"


def by_trainer(folder, **options):
    run = trainer(folder, [callback()])
    run.fit(Classifier(), loader())
    run.save_checkpoint(folder / "it.ckpt", **options)
    return folder / "it.ckpt"


PATHS = {
    "model_checkpoint": by_model_checkpoint,
    "weights_only": lambda folder: by_model_checkpoint(folder, save_weights_only=True),
    "top_k_monitor": lambda folder: by_model_checkpoint(folder, monitor="val/loss", save_top_k=1),
    "last": by_last,
    "on_exception": by_exception,
    "trainer": by_trainer,
    "trainer_weights_only": lambda folder: by_trainer(folder, weights_only=True),
}


@pytest.mark.parametrize("save", PATHS.values(), ids=PATHS.keys())
def test_every_path_saves_the_same_keys_that_load_without_unpickling(save, tmp_path):
    checkpoint = load(save(tmp_path))
    assert set(checkpoint["state_dict"]) == ADAPTER_KEYS
    assert checkpoint[KEY]["format"] == 1
    assert set(checkpoint[KEY]["left_out"]) == set(Classifier().state_dict())
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".partial")]


@pytest.mark.parametrize("save", PATHS.values(), ids=PATHS.keys())
def test_every_file_gives_the_trained_model_in_a_module_that_was_never_adapted(save, tmp_path):
    path = save(tmp_path)
    module = Classifier()
    trainer(tmp_path, [callback()]).test(module, loader(), ckpt_path=path, verbose=False)
    alone = load_from_checkpoint(Classifier, path)
    expected = load(path)["state_dict"]
    for loaded in (module, alone):
        assert {key: values(loaded)[key] for key in expected}.keys() == expected.keys()
        assert not differing({key: values(loaded)[key] for key in expected}, expected)
        assert loaded.strict_loading is True


def test_file_is_little_more_than_the_trained_bytes(tmp_path):
    """Wide layers, so that what a checkpoint of Lightning holds besides tensors does not count."""

    class Wide(Classifier):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    module = Wide(width=40_000)
    run = trainer(tmp_path, [callback(), ModelCheckpoint(tmp_path, filename="it")], max_epochs=1)
    run.fit(module, loader())
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    assert (tmp_path / "it.ckpt").stat().st_size <= 1.1 * trained


def test_fresh_process_gives_the_same_predictions(tmp_path):
    run = trainer(tmp_path, [callback()])
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


class TestOneLiner:
    def test_class_is_the_users_own_and_arguments_come_from_the_file(self, tmp_path):
        run = trainer(tmp_path, [callback()])
        run.fit(Classifier(width=24), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        module = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
        assert type(module) is Classifier
        assert module.net[0].out_features == 24
        assert LoraModel(module).active_adapters == ("default",)

    def test_mixin_makes_lightnings_own_method_do_it(self, tmp_path):
        class Ours(LoraCheckpointMixin, Classifier):
            pass

        run = trainer(tmp_path, [callback()])
        module = Ours()
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        assert not differing(values(Ours.load_from_checkpoint(tmp_path / "it.ckpt")), values(module))

    def test_mixin_loads_plain_files_as_ever(self, tmp_path):
        class Ours(LoraCheckpointMixin, Classifier):
            pass

        run = trainer(tmp_path, [])
        module = Ours()
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        assert not differing(values(Ours.load_from_checkpoint(tmp_path / "it.ckpt")), values(module))

    def test_class_itself_refuses_an_adapter_file(self, tmp_path):
        with pytest.raises(RuntimeError, match="Missing key"):
            Classifier.load_from_checkpoint(by_trainer(tmp_path))

    def test_plain_file_is_refused_with_what_to_call(self, tmp_path):
        run = trainer(tmp_path, [])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        with pytest.raises(AdapterFileError, match=r"Classifier\.load_from_checkpoint"):
            load_from_checkpoint(Classifier, tmp_path / "it.ckpt")

    def test_other_base_is_refused(self, tmp_path):
        with pytest.raises(AdapterFileError, match="another base"):
            load_from_checkpoint(Classifier, by_trainer(tmp_path), base_seed=1)

    @pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "head_only", "tail_missing"])
    def test_truncated_file_is_refused(self, tmp_path, size):
        path = by_trainer(tmp_path)
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(AdapterFileError, match="truncated"):
            load_from_checkpoint(Classifier, path)


class Late(LightningModule):
    """Makes its layers when the trainer asks for it."""

    training_step, validation_step, test_step = Classifier.training_step, Classifier.validation_step, None
    _step, configure_optimizers, forward = Classifier._step, Classifier.configure_optimizers, Classifier.forward
    lr = 0.05

    def build(self):
        if not hasattr(self, "net"):
            self.net = Classifier().net


class InSetup(Late):
    def setup(self, stage):
        self.build()


class InConfigureModel(Late):
    def configure_model(self):
        self.build()


class ReplacesHead(Classifier):
    """Puts in another head and loads pretrained weights strictly, as many scripts do."""

    def setup(self, stage):
        pretrained = Classifier(base_seed=3).net
        self.net[3] = nn.Linear(16, 3)
        self.net.load_state_dict(pretrained.state_dict(), strict=True)


@pytest.mark.parametrize("cls", [InSetup, InConfigureModel, ReplacesHead])
def test_layers_that_are_built_late(cls, tmp_path):
    module = cls()
    run = trainer(tmp_path, [callback()])
    run.fit(module, loader())
    assert {p for p, t in module.named_parameters() if t.requires_grad} == ADAPTER_KEYS
    assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if ".lora_B." in name)
    run.save_checkpoint(tmp_path / "it.ckpt")
    again = cls()
    trainer(tmp_path, [callback()], max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "it.ckpt")
    base = {key for key in module.state_dict() if "lora" not in key}
    assert not base & differing(values(module), values(again))


CHOICES = {
    "none": (LoraConfig(r=2, target_modules=["net.0"]), set()),
    "all": (
        LoraConfig(r=2, target_modules=["net.0"], bias="all"),
        {"net.0.bias", "net.1.bias", "net.3.bias"},
    ),
    "lora_only": (LoraConfig(r=2, target_modules=["net.0"], bias="lora_only"), {"net.0.bias"}),
    "head": (LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"]), {"net.3.weight", "net.3.bias"}),
    "tracked_norm": (
        LoraConfig(r=2, target_modules=["net.0"], norm="track"),
        {"net.1.running_mean", "net.1.running_var", "net.1.num_batches_tracked"},
    ),
}


@pytest.mark.parametrize(("config", "own"), CHOICES.values(), ids=CHOICES.keys())
def test_what_is_trained_is_saved_and_nothing_else_moves(config, own, tmp_path):
    module = Classifier()
    before = values(module)
    run = trainer(tmp_path, [callback(config=config)])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    factors = {"net.0.lora_A.default", "net.0.lora_B.default"}
    assert set(load(tmp_path / "it.ckpt")["state_dict"]) == own | factors
    assert differing(before, values(module)) == own | factors
    assert not differing(values(module), values(load_from_checkpoint(Classifier, tmp_path / "it.ckpt")))


def test_base_changed_by_loftq_is_rebuilt_and_not_stored(tmp_path):
    config = LoraConfig(r=2, target_modules=["net.0"], init="loftq")
    module = Classifier()
    run = trainer(tmp_path, [callback(config=config)])
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert "net.0.weight" not in load(tmp_path / "it.ckpt")["state_dict"]
    assert not differing(values(module), values(load_from_checkpoint(Classifier, tmp_path / "it.ckpt")))
    again = Classifier()
    trainer(tmp_path, [callback(config=config)]).test(again, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert not differing(values(module), values(again))


class TestRefused:
    """Each bad file stops before training, says what to do, and leaves the trainer usable."""

    def refused(self, tmp_path, path, match, module=None, **options):
        module = module or Classifier()
        run = trainer(tmp_path, [callback(**options)], max_epochs=4)
        before = values(module)
        with pytest.raises(AdapterFileError, match=match):
            run.fit(module, loader(), ckpt_path=path)
        assert {k for k in differing(before, values(module)) if k in before} == set()
        return run, module

    def test_resume_from_a_file_without_adapter(self, tmp_path):
        run = trainer(tmp_path, [])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "plain.ckpt")
        self.refused(tmp_path, tmp_path / "plain.ckpt", "holds no adapter")

    def test_other_rank(self, tmp_path):
        self.refused(tmp_path, by_trainer(tmp_path), "r is 2 in the file and 3 here", config=LoraConfig(
            r=3, target_modules=["net.0", "net.3"]
        ))  # fmt: skip

    def test_other_adapter(self, tmp_path):
        self.refused(tmp_path, by_trainer(tmp_path), "other.*adapter_name", adapter_name="other")

    def test_other_base_of_the_same_shape(self, tmp_path):
        self.refused(tmp_path, by_trainer(tmp_path), "another base", Classifier(base_seed=1))

    def test_other_model(self, tmp_path):
        self.refused(tmp_path, by_trainer(tmp_path), "another model", Classifier(width=8))

    @pytest.mark.parametrize("missing", ["manifest", "tensors", "target", "active"])
    def test_damaged_entry(self, tmp_path, missing):
        path = by_trainer(tmp_path)
        checkpoint = load(path)
        del checkpoint[KEY]["adapters"][0][missing]
        torch.save(checkpoint, path)
        self.refused(tmp_path, path, "damaged")

    def test_newer_format(self, tmp_path):
        path = by_trainer(tmp_path)
        checkpoint = load(path)
        checkpoint[KEY]["format"] = 99
        torch.save(checkpoint, path)
        self.refused(tmp_path, path, "format 99.*upgrade")

    @pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "head_only", "tail_missing"])
    def test_truncated(self, tmp_path, size):
        path = by_trainer(tmp_path)
        path.write_bytes(path.read_bytes()[:size])
        self.refused(tmp_path, path, "truncated")

    def test_afterwards_the_same_trainer_tests_what_it_has(self, tmp_path):
        run, module = self.refused(tmp_path, by_trainer(tmp_path), "another base", Classifier(base_seed=1))
        expected = run.test(module, loader(), verbose=False)
        assert run.test(module, loader(), verbose=False) == expected
        reference = trainer(tmp_path, []).test(Classifier(base_seed=1), loader(), verbose=False)
        assert expected[0]["val/loss"] == pytest.approx(reference[0]["val/loss"], rel=1e-6)

    def test_test_with_another_base(self, tmp_path):
        path = by_trainer(tmp_path)
        module = Classifier(base_seed=1)
        run = trainer(tmp_path, [callback()])
        with pytest.raises(AdapterFileError, match="another base"):
            run.test(module, loader(), ckpt_path=path)
        assert type(module.net[0]) is nn.Linear


def test_plain_file_in_test_takes_the_adapter_off(tmp_path):
    plain = trainer(tmp_path, [])
    plain.fit(Classifier(base_seed=2), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    module = Classifier()
    run = trainer(tmp_path, [callback()])
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert not differing(values(module), load(tmp_path / "plain.ckpt")["state_dict"])


KILLED = """
import sys, torch
from lightning.pytorch import Trainer
from tests.integrations.lightning.checkpoint.test_content import callback
from tests.integrations.lightning.toys import Classifier, loader, trainer
run = trainer(sys.argv[1], [callback()], max_epochs=1)
run.fit(Classifier(width=20_000), loader())
print("ready", flush=True)
while True:
    run.save_checkpoint(sys.argv[1] + "/it.ckpt")
"""


def test_killed_while_saving_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while b"ready" not in process.stdout.readline():
            assert process.poll() is None
        while not (tmp_path / "it.ckpt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert set(load(tmp_path / "it.ckpt")["state_dict"]) == ADAPTER_KEYS


def test_two_callbacks_on_two_submodules_share_one_file(tmp_path):
    module = Classifier()
    module.net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 8), nn.ReLU()), "b": nn.Sequential(nn.Linear(8, 3))})
    module.forward = lambda x: module.net["b"](module.net["a"](x))

    def pair():
        return [callback(config=LoraConfig(r=2), target=f"net.{name}") for name in "ab"]

    run = trainer(tmp_path, pair())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    checkpoint = load(tmp_path / "it.ckpt")
    assert [adapter["target"] for adapter in checkpoint[KEY]["adapters"]] == ["net.a", "net.b"]
    assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if ".lora_B." in name)
    trainer(tmp_path, pair(), max_epochs=3).fit(module, loader(), ckpt_path=tmp_path / "it.ckpt")


def test_two_adapters_on_one_module(tmp_path):
    def pair():
        return [
            callback(config=LoraConfig(r=2, target_modules=["net.0"]), adapter_name="first"),
            callback(config=LoraConfig(r=1, target_modules=["net.0", "net.3"]), adapter_name="second"),
        ]

    module = Classifier()
    run = trainer(tmp_path, pair())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    again = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
    assert LoraModel(again).active_adapters == ("first", "second")
    assert not differing(values(module), values(again))


def test_two_callbacks_with_one_adapter_name_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="LoraCallback"):
        Trainer(callbacks=[callback(), callback()], logger=False, accelerator="cpu", default_root_dir=tmp_path)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_base_changed_by_an_init_and_cast_by_the_precision_is_rebuilt(tmp_path, init, precision):
    """The module is adapted in its own type, cast, and restored in its own type before it is cast again."""
    config = LoraConfig(r=2, target_modules=["net.0", "net.3"], init=init)

    def run(epochs):
        lora = LoraCallback(config, merge_on_fit_end=False, print_plan=False)
        return trainer(tmp_path, [lora], max_epochs=epochs, precision=precision)

    half = run(1)
    module = Classifier()
    half.fit(module, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Classifier()
    run(1).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert not {name for name in differing(values(resumed), values(module)) if "lora_" not in name}
    LoraModel(resumed).unload()
    expected = {key: value.to(resumed.state_dict()[key]) for key, value in values(Classifier()).items()}
    assert not {name for name in differing(values(resumed), expected) if "net.1." not in name}
