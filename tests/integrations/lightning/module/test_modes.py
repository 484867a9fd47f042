"""In which mode the parts of a module are trained, and left."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.inplace import unwrapped
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.toys import CONFIG, Classifier, loader, lora, trainer

OTHER = LoraConfig(r=1, target_modules=["net.3"])


class ArrivesInEvalMode(Classifier):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.net.eval()
        self.modes = []

    def training_step(self, batch, batch_idx):
        self.modes.append((self.net[4].training, self.net[1].training))
        return super().training_step(batch, batch_idx)


def test_models_that_arrive_in_eval_mode_are_put_into_training_mode_without_a_warning(tmp_path):
    module = ArrivesInEvalMode()
    trainer(tmp_path, [lora(), LoraCallback(OTHER, adapter_name="other", merge_on_fit_end=False)]).fit(module, loader())
    assert set(module.modes) == {(True, False)}


def test_models_that_are_to_stay_in_eval_mode_stay_and_lightning_warns(tmp_path):
    module = ArrivesInEvalMode()
    with pytest.warns(UserWarning, match="6 module.s. in eval mode"):
        trainer(tmp_path, [lora(train_mode=False)]).fit(module, loader())
    assert set(module.modes) == {(False, False)}


def stay(self, mode=True):
    """What latent-diffusion puts in place of `train`: called on a module, its first argument is the mode."""
    return self


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # as without the callback
def test_a_target_whose_train_was_replaced_by_a_function_stays_as_it_is(tmp_path):
    module = ArrivesInEvalMode()
    module.net.train = stay
    trainer(tmp_path, [LoraCallback(LoraConfig(r=2), target="net")]).fit(module, loader())
    assert set(module.modes) == {(False, False)}


class Distilled(Classifier):
    """Learns from a copy of itself that its author froze and put into eval mode."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False).eval()
        self.modes = set()

    def training_step(self, batch, batch_idx):
        self.modes.add((self.net[4].training, *(child.training for child in self.teacher)))
        first, second = self.teacher(batch[0]), self.teacher(batch[0])
        assert torch.equal(first, second)
        return super().training_step(batch, batch_idx)


class OfBuffers(Distilled):
    """As Distilled, with buffers for the parameters of the teacher: nothing of it can require a gradient."""

    def __init__(self):
        super().__init__()
        for part in self.teacher:
            for name, value in dict(part.named_parameters()).items():
                delattr(part, name)
                part.register_buffer(name, torch.rand_like(value), persistent=False)


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # as without the callback
def test_a_part_of_buffers_alone_stays_in_eval_mode(tmp_path):
    module = OfBuffers()
    trainer(tmp_path, [LoraCallback(LoraConfig(r=2, target_modules=["net.0"]))]).fit(module, loader(), loader())
    assert module.modes == {(True, *[False] * 5)}
    assert not any(child.training for child in module.teacher.modules())


def test_a_norm_of_buffers_alone_is_put_into_training_mode_with_the_network_around_it(tmp_path):
    module = ArrivesInEvalMode()
    module.net[1] = nn.BatchNorm1d(16, affine=False).eval()
    trainer(tmp_path, [LoraCallback(LoraConfig(r=2, target_modules=["net.0"], norm="track"))]).fit(module, loader())
    assert set(module.modes) == {(True, True)}


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # as without the callback
@pytest.mark.filterwarnings("ignore:.*trainable tensors got no gradient:UserWarning")  # of the adapted teacher
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapted"])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["net.0", "net.3"]),
        LoraConfig(r=2, exclude_modules=["teacher.0", "teacher.3"]),
        LoraConfig(r=2),
        LoraConfig(r=2, norm="track"),
    ],
    ids=["not_named", "excluded", "adapted_too", "tracked_norms"],
)
def test_frozen_modules_in_eval_mode_stay_so(tmp_path, config, merge):
    module = Distilled()
    callback = LoraCallback(config, merge_on_fit_end=merge)
    for _ in range(2):
        trainer(tmp_path, [callback]).fit(module, loader(), loader())
        assert module.modes == {(True, *[False] * 5)}
        assert not any(child.training for child in module.teacher.modules())
    if not merge:
        LoraModel(module).unload()
    assert not any(child.training for child in module.teacher.modules())
    assert all(child.training for child in module.net.modules())


class WithLossNetwork(Classifier):
    """Has a loss network that its author froze and put into eval mode, and hands it what needs gradients."""

    def __init__(self):
        super().__init__()
        self.percept = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).requires_grad_(False).eval()

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.percept(self(batch[0])).square().mean()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # as without the callback
class TestFrozenPartThatAdaptersTrain:
    def test_beside_parts_that_are_not_frozen_it_is_warned_of(self, tmp_path):
        with pytest.warns(UserWarning, match=r"'percept' arrived frozen and in eval mode.*1 layer there.*exclude_mod"):
            trainer(tmp_path, [LoraCallback(LoraConfig(r=2))]).fit(WithLossNetwork(), loader())

    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(LoraConfig(r=2, target_modules=["percept.0"]), id="nothing but it"),
            pytest.param(LoraConfig(r=2, exclude_modules=["percept.0"]), id="all but it"),
        ],
    )
    def test_otherwise_there_is_no_warning(self, tmp_path, config):
        trainer(tmp_path, [LoraCallback(config)]).fit(WithLossNetwork(), loader())


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # as without the callback
@pytest.mark.parametrize("part", ["net", "teacher"])
def test_frozen_modules_that_something_is_wrapped_around_stay_in_eval_mode(tmp_path, part):
    module = Distilled()
    setattr(module, part, checkpoint_wrapper(getattr(module, part)).train(part == "net"))
    trainer(tmp_path, [LoraCallback(LoraConfig(r=2, target_modules=["net.0"]))]).fit(module, loader(), loader())
    assert module.modes == {(True, *[False] * 5)}
    assert not any(child.training for child in module.teacher.modules())
    assert all(child.training for child in unwrapped(module.net).modules())


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # as without the callback
def test_averages_in_eval_mode_stay_so(tmp_path):
    """As timm's ModelEmaV2, which puts its copy into eval mode and does not freeze it."""

    class Average(Classifier):
        def __init__(self):
            super().__init__(dropout=0.5)
            self.average = copy.deepcopy(self.net).eval()

    module = Average()
    trainer(tmp_path, [LoraCallback(LoraConfig(r=2))]).fit(module, loader(), loader())
    assert not any(child.training for child in module.average.modules())
    assert all(child.training for child in module.net.modules())


@pytest.mark.filterwarnings("ignore:. weights of Classifier are those that an adapter was merged into:UserWarning")
@pytest.mark.parametrize("config", [CONFIG, LoraConfig(r=2, target_modules=["net.0"], norm="track")])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_modules_in_training_mode_are_in_it_after_all_runs(tmp_path, frozen, config):
    """Also the normalization layers that are kept in eval mode: else plain training afterwards would not move them."""
    module = Classifier()
    module.net.requires_grad_(not frozen)
    callback = LoraCallback(config)
    run = trainer(tmp_path, [callback])
    run.fit(module, loader(), loader())
    assert all(child.training for child in module.modules())
    run.validate(module, loader(), verbose=False)
    assert all(child.training for child in module.modules())
    adapted = trainer(tmp_path, [unmerged := lora(config, adapter_name="second")])
    adapted.fit(module, loader(), loader())
    adapted.test(module, loader(), verbose=False)
    adapted.save_checkpoint(tmp_path / "it.ckpt")
    LoraModel(module).unload()
    assert all(child.training for child in module.modules())
    trainer(tmp_path, [unmerged]).test(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    LoraModel(module).unload()
    assert all(child.training for child in module.modules())


class Synchronize(Callback):
    """Makes norms synchronized ones once the layers are adapted, as strategies do for `sync_batchnorm=True`."""

    def setup(self, trainer, pl_module, stage):
        pl_module.net = nn.SyncBatchNorm.convert_sync_batchnorm(pl_module.net)


def test_norms_that_are_made_synchronized_stand_still_as_well(tmp_path):
    module = Classifier()
    module.net[1].running_mean.uniform_()
    before = module.net[1].running_mean.clone()
    run = trainer(tmp_path, [lora(), Synchronize()], max_epochs=1)
    run.fit(module, loader(), loader())  # on a CPU, synchronized norms that count raise
    assert isinstance(module.net[1], nn.SyncBatchNorm)
    assert torch.equal(module.net[1].running_mean, before)
    LoraModel(module).save_adapter(tmp_path / "adapter")
