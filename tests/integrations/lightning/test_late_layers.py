"""Layers that are built after the constructor: in `setup`, `configure_model`, `on_load_checkpoint` or a first step."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError, TargetError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.late_layers import LATE, ByShape, FromScratch, InEverySetup, InSetup, head
from tests.integrations.lightning.toys import Classifier, differing, loader, trainer, values

CONFIGS = {"all": LoraConfig(r=2), "head": LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["head"])}

every_kind = pytest.mark.parametrize("kind", LATE)
every_config = pytest.mark.parametrize("config", CONFIGS)


def callback(config="all", **options):
    return LoraCallback(CONFIGS[config], print_plan=False, **{"merge_on_fit_end": False, **options})


def fitted(tmp_path, cls, config="all", epochs=2, **options):
    module, run = cls(), trainer(tmp_path, [callback(config)], max_epochs=epochs)
    run.fit(module, loader(), **options)
    return module, run


@every_kind
@every_config
def test_resuming_is_training_on(kind, config, tmp_path):
    whole, _ = fitted(tmp_path, LATE[kind], config, 3)
    checkpoints = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = LATE[kind]()
    trainer(tmp_path, [callback(config), checkpoints], max_epochs=2).fit(first, loader())
    fresh, _ = fitted(tmp_path, LATE[kind], config, 3, ckpt_path=checkpoints.best_model_path)
    assert not differing(values(fresh), values(whole))
    trainer(tmp_path, [callback(config)], max_epochs=3).fit(first, loader(), ckpt_path=checkpoints.best_model_path)
    assert not differing(values(first), values(whole))


@every_kind
@every_config
def test_a_fresh_module_gets_what_the_file_has(kind, config, tmp_path):
    module, run = fitted(tmp_path, LATE[kind], config)
    expected = torch.cat(run.predict(module, loader()))
    run.save_checkpoint(tmp_path / "it.ckpt")
    for call in ("validate", "test"):
        again = getattr(trainer(tmp_path, [callback(config)]), call)
        (score,) = getattr(run, call)(module, loader(), verbose=False)
        assert again(LATE[kind](), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False) == [score]
    fresh = trainer(tmp_path, [callback(config)])
    assert torch.equal(torch.cat(fresh.predict(LATE[kind](), loader(), ckpt_path=tmp_path / "it.ckpt")), expected)
    loaded = load_from_checkpoint(LATE[kind], tmp_path / "it.ckpt")
    assert torch.equal(torch.cat([loaded.eval()(x) for x, _ in loader()]), expected)
    assert type(loaded) is LATE[kind]


@every_kind
def test_merged_and_trained_again(kind, tmp_path):
    module, run = LATE[kind](), trainer(tmp_path, [callback(merge_on_fit_end=True)], max_epochs=1)
    run.fit(module, loader())
    assert all("lora_" not in key for key in values(module))
    assert run.validate(module, loader(), verbose=False) == run.test(module, loader(), verbose=False)


def test_layers_that_are_built_again_keep_their_adapter(tmp_path):
    module, run = fitted(tmp_path, InEverySetup)
    before, layer = values(module), module.head
    run.validate(module, loader(), verbose=False)
    assert module.head is not layer
    assert not differing(values(module), before)
    assert LoraModel(module).active_adapters == ("default",)


def test_layers_that_are_built_again_without_the_callback_are_missed_when_saving(tmp_path):
    module, run = fitted(tmp_path, InEverySetup)
    trainer(tmp_path, []).predict(module, loader())
    with pytest.raises(StateError, match=r"1 adapted layer was replaced .*'head'"):
        run.save_checkpoint(tmp_path / "it.ckpt")


def test_layers_that_are_built_again_with_other_values_are_refused(tmp_path):
    class Fresh(InEverySetup):
        def setup(self, stage=None):
            self.head = nn.Linear(16, 3)

    module, run = fitted(tmp_path, Fresh)
    with pytest.raises(StateError, match=r"Fresh\.setup\(\) built layers again .*'head\.weight'.*Build them once"):
        run.validate(module, loader(), verbose=False)


def test_a_base_that_the_hook_loads_is_the_one_that_counts(tmp_path):
    class Pretrained(Classifier):
        """Starts with a random layer, and has the pretrained one after setup or loading."""

        def setup(self, stage=None):
            self.net[3] = head()

        def on_load_checkpoint(self, checkpoint):
            self.net[3] = head()

    module, run = fitted(tmp_path, Pretrained)
    run.save_checkpoint(tmp_path / "it.ckpt")
    loaded = load_from_checkpoint(Pretrained, tmp_path / "it.ckpt")
    assert torch.equal(loaded.net[3].bias, head().bias)
    assert not differing(values(loaded), values(module))


@every_config
def test_a_base_that_the_hook_makes_at_random_is_put_back(config, tmp_path):
    whole, _ = fitted(tmp_path, FromScratch, config, 3)
    module, run = fitted(tmp_path, FromScratch, config)
    run.save_checkpoint(tmp_path / "it.ckpt")
    resumed, _ = fitted(tmp_path, FromScratch, config, 3, ckpt_path=tmp_path / "it.ckpt")
    assert not differing(values(resumed), values(whole))
    (score,) = run.validate(module, loader(), verbose=False)
    fresh = trainer(tmp_path, [callback(config)])
    assert fresh.validate(FromScratch(), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False) == [score]
    assert not differing(values(load_from_checkpoint(FromScratch, tmp_path / "it.ckpt")), values(module))


def test_a_hook_that_looks_for_the_base_in_the_file_is_refused(tmp_path):
    _, run = fitted(tmp_path, ByShape)
    run.save_checkpoint(tmp_path / "it.ckpt")
    for load in (
        lambda: load_from_checkpoint(ByShape, tmp_path / "it.ckpt"),
        lambda: trainer(tmp_path, [callback()]).test(ByShape(), loader(), ckpt_path=tmp_path / "it.ckpt"),
    ):
        with pytest.raises(AdapterFileError, match=r"reads 'head\.weight' .*modules_to_save"):
            load()
    _, run = fitted(tmp_path, ByShape, "head")
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert load_from_checkpoint(ByShape, tmp_path / "saved.ckpt").head.in_features == 16


def test_a_setup_that_needs_a_trainer_is_named(tmp_path):
    class Needy(InSetup):
        def setup(self, stage):
            assert self.trainer.world_size == 1
            self.build()

    _, run = fitted(tmp_path, Needy)
    run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(
        AdapterFileError,
        match=r"need 'head', which Needy does not have before setup\(\), and .* without a Trainer .*trainer\.test",
    ):
        load_from_checkpoint(Needy, tmp_path / "it.ckpt")


@pytest.mark.parametrize("needs_trainer", [False, True])
def test_networks_that_are_arguments_and_no_hyperparameters_are_asked_for(needs_trainer, tmp_path):
    class OfParts(Classifier):
        def __init__(self, **parts):
            super().__init__()
            del self.net
            for name, part in parts.items():
                setattr(self, name, part)

        def save_hyperparameters(self, *_):
            """A network is none."""

        def setup(self, stage):
            assert not needs_trainer or self.trainer.world_size == 1

    def net():
        torch.manual_seed(0)
        return Classifier().net

    run = trainer(tmp_path, [callback()])
    module = OfParts(net=net())
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(AdapterFileError, match=r"need 'net.*OfParts does not have.*Give load_from_checkpoint the arg"):
        load_from_checkpoint(OfParts, tmp_path / "it.ckpt")
    loaded = load_from_checkpoint(OfParts, tmp_path / "it.ckpt", net=net())
    assert not differing(values(loaded), values(module))


class Lazy(Classifier):
    def __init__(self):
        super().__init__()
        self.net[3] = nn.LazyLinear(3)


class TestFirstStep:
    # Torch says of every lazy module that it is one.
    pytestmark = pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")

    def test_layers_without_a_shape_are_refused_before_it(self, tmp_path):
        with pytest.raises(TargetError, match=r"'net\.3\.weight', 'net\.3\.bias' has no shape yet.*Run the model once"):
            fitted(tmp_path, Lazy)

    def test_the_way_that_is_named(self, tmp_path):
        module = Lazy()
        module(next(iter(loader()))[0])
        run = trainer(tmp_path, [callback()])
        run.fit(module, loader())
        assert LoraModel(module).plans["default"].layers[1].name == "net.3"


class InForward(Classifier):
    """Builds its head when it sees the first batch, and gives it to the optimizer."""

    def __init__(self):
        super().__init__()
        self.net[3], self.head = nn.Identity(), None

    def forward(self, x):
        x = self.net(x)
        if self.head is None:
            self.head = head(x.shape[1])
            self.optimizers().add_param_group({"params": self.head.parameters()})
        return self.head(x)

    def on_load_checkpoint(self, checkpoint):
        self.head = head(checkpoint["state_dict"]["head.weight"].shape[1])


def test_head_that_the_first_step_builds_is_the_authors_own(tmp_path):
    """Trained as without the callback, and in the files."""

    def net():
        return LoraCallback(LoraConfig(r=2, target_modules=["net.0"]), merge_on_fit_end=False)

    saver = ModelCheckpoint(tmp_path, filename="it")
    module, run = InForward(), trainer(tmp_path, [net(), saver], max_epochs=3)
    with pytest.warns(UserWarning, match=r"'head\.weight', 'head\.bias' were built after .* in its first step"):
        run.fit(module, loader(), loader())
    assert not torch.equal(module.head.weight, head().weight)
    expected = run.validate(module, loader(), verbose=False)
    fresh = trainer(tmp_path, [net()])
    assert fresh.validate(InForward(), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False) == expected
    assert not differing(values(load_from_checkpoint(InForward, tmp_path / "it.ckpt")), values(module))


def test_head_that_the_first_step_builds_and_the_configuration_means_is_refused_after_it(tmp_path):
    with pytest.raises(StateError, match=r"'head' were built .*no checkpoint with them could be loaded.*once before"):
        fitted(tmp_path, InForward)


class InEpoch(Classifier):
    """Grows in its second epoch."""

    def __init__(self):
        super().__init__()
        self.grown = None

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.grown = head(3)
            self.optimizers().add_param_group({"params": self.grown.parameters()})

    def forward(self, x):
        x = self.net(x)
        return x if self.grown is None else self.grown(x)


def test_layer_that_a_later_epoch_builds_is_named(tmp_path):
    run = trainer(tmp_path, [LoraCallback(LoraConfig(r=2, target_modules=["net.0"]))], max_epochs=3)
    with pytest.warns(UserWarning, match=r"'grown\.weight', 'grown\.bias' were built after .* a later epoch") as told:
        run.fit(InEpoch(), loader())
    assert sum("were built" in str(warning.message) for warning in told) == 1


def test_layer_that_a_later_epoch_builds_and_the_configuration_means_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"'grown' were built .*no checkpoint with them could be loaded"):
        trainer(tmp_path, [LoraCallback(LoraConfig(r=2))], max_epochs=2).fit(InEpoch(), loader())


def test_lazy_head_beside_the_target(tmp_path):
    """Trained as the author trains it, and in the files."""

    class Headed(Classifier):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(3)

        def forward(self, x):
            return self.head(self.net(x))

    def lora():
        config = LoraConfig(r=2, target_modules=["0", "3"])
        return LoraCallback(config, target="net", merge_on_fit_end=False, print_plan=False)

    module = Headed()
    saver = ModelCheckpoint(tmp_path, filename="it")
    run = trainer(tmp_path, [lora(), saver])
    run.fit(module, loader(), loader())
    expected = run.validate(module, loader(), verbose=False)
    fresh = trainer(tmp_path, [lora()]).validate(Headed(), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert fresh == expected
