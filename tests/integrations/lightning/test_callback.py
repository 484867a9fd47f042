"""With other callbacks and in other modes of Lightning: nothing lost, nothing silent."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_plugins import ConfigError, LoraConfig, LoraModel, MergeError, StateError
from lora_plugins.adapter import model_state
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.toys import BASE, CONFIG, Classifier, differing, loader, lora, trainer, values


class NoRows(torch.utils.data.IterableDataset):
    """Without a length, and without a row."""

    def __iter__(self):
        yield from ()


EMPTY = torch.utils.data.DataLoader(loader(4).dataset, batch_size=8, drop_last=True)


@pytest.mark.parametrize("data", [EMPTY, torch.utils.data.DataLoader(NoRows())], ids=["fewer than a batch", "no rows"])
@pytest.mark.filterwarnings("ignore:Total length of `.*Loader` across ranks is zero")
def test_a_fit_without_a_batch_is_refused_and_writes_nothing(tmp_path, data):
    places = {"save_adapter_to": tmp_path / "adapter", "export_to": tmp_path / "merged.safetensors"}
    run = trainer(tmp_path, [lora(**places)])
    with pytest.raises(StateError, match="Nothing was trained: the data for training holds not one batch"):
        run.fit(Classifier(), data, loader())
    assert not any(path.exists() for path in places.values())


@pytest.mark.filterwarnings("ignore:Trainer was signaled to stop")
def test_a_fit_that_is_stopped_before_its_first_batch_is_not_told_to_look_at_its_data(tmp_path):
    run = trainer(tmp_path, [lora(save_adapter_to=tmp_path / "adapter")], max_time="00:00:00:00")
    with pytest.raises(StateError, match="told to stop before its first batch, by max_time"):
        run.fit(Classifier(), loader())
    assert not (tmp_path / "adapter").exists()


class TestTuners:
    class Watch(Callback):
        """Notes the weights ahead of the tuner, and when it is done and training has not begun."""

        def on_fit_start(self, trainer, pl_module):
            self.adapted = values(pl_module)

        def on_train_start(self, trainer, pl_module):
            self.start = values(pl_module)

    # The tuner's own short runs come before any hook of ours.
    pytestmark = pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode:UserWarning")

    @pytest.mark.parametrize("norm", ["freeze", "track"])
    def test_learning_rate_finder_leaves_adapter_and_statistics_as_they_were(self, tmp_path, norm):
        finder = LearningRateFinder(num_training_steps=8, max_lr=0.5)
        self.check(tmp_path, finder, norm)

    @pytest.mark.parametrize("norm", ["freeze", "track"])
    def test_batch_size_finder_leaves_adapter_and_statistics_as_they_were(self, tmp_path, norm):
        finder = BatchSizeFinder(mode="power", steps_per_trial=2, init_val=4, max_trials=2, batch_arg_name="batch_size")
        self.check(tmp_path, finder, norm)

    def check(self, tmp_path, finder, norm):
        torch.manual_seed(4)
        module, watch = Sized(), self.Watch()
        run = trainer(tmp_path, [lora(replace(CONFIG, norm=norm)), finder, watch], max_epochs=1)
        run.fit(module)
        torch.manual_seed(4)
        untouched = Sized()
        LoraModel(untouched, replace(CONFIG, norm=norm))
        assert not differing(watch.start, values(untouched))
        assert LoraModel(module).active_adapters == ("default",)

    @pytest.mark.parametrize(("target", "init"), [(None, "pissa"), ("net", "kaiming")], ids=["whole", "part"])
    @pytest.mark.parametrize(
        "finder",
        [
            lambda: LearningRateFinder(num_training_steps=8, max_lr=0.5),
            lambda: BatchSizeFinder(mode="power", steps_per_trial=2, max_trials=2, batch_arg_name="batch_size"),
        ],
        ids=["rate", "batch_size"],
    )
    def test_they_leave_what_the_module_moves_by_hand_as_it_was(self, tmp_path, finder, target, init):
        module, watch = MovesByHand(with_copy=target is None), self.Watch()
        names = ["0"] if target else ["net.0", "average.0"]
        config = LoraConfig(r=2, target_modules=names, modules_to_save=["3"] if target else ["net.3"], init=init)
        trainer(tmp_path, [lora(config, target=target), watch, finder()], max_epochs=1).fit(module)
        assert not differing(watch.start, watch.adapted)
        assert differing(values(module), watch.start) >= {
            "center",
            "head.weight",
            *(f"net.0.{part}.default" for part in ("lora_A", "lora_B")),
        }


class Sized(Classifier):
    batch_size = 8

    def train_dataloader(self):
        return torch.utils.data.DataLoader(loader().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


class MovesByHand(Sized):
    """Keeps a center, an average of its head and, if wanted, one of its network, all frozen."""

    def __init__(self, with_copy):
        super().__init__()
        self.center = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.head = copy.deepcopy(self.net[3]).requires_grad_(False)
        self.average = copy.deepcopy(self.net).requires_grad_(False) if with_copy else None

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        self.center.mul_(0.9).add_(0.1)
        for own, part in ((self.head, self.net[3]), (self.average, self.net)):
            for mean, value in zip(own.parameters(), part.parameters(), strict=True) if own is not None else ():
                mean.mul_(0.7).add_(value, alpha=0.3)


class Tied(Classifier):
    """Another layer has a weight of its network too."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Linear(4, 16)
        self.decoder.weight = self.net[0].weight


def test_a_weight_of_two_layers_is_refused_before_training(tmp_path):
    module = Tied()
    with pytest.raises(MergeError, match=r"'net\.0\.weight' is the same tensor as 'decoder\.weight'"):
        trainer(tmp_path, [LoraCallback(CONFIG, print_plan=False)]).fit(module, loader())
    assert model_state(module) is None
    trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False, print_plan=False)]).fit(module, loader())


def test_early_stopping_merges(tmp_path):
    module = Classifier(lr=5.0)
    run = trainer(
        tmp_path,
        [lora(merge_on_fit_end=True), EarlyStopping("val/loss", patience=1)],
        max_epochs=20,
    )
    run.fit(module, loader(), loader())
    assert run.current_epoch < 20
    assert values(module).keys() == BASE


class Deep(Classifier):
    """Gradient checkpointing as it should be: without reentry."""

    checkpointing = False

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False) if self.checkpointing else self.net(x)


class Gradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def test_gradients_with_checkpointing_are_those_without(tmp_path):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        module, watch = Deep(), Gradients()
        module.checkpointing = checkpointing
        trainer(tmp_path, [lora(), watch]).fit(module, loader())
        found.append(watch.found)
    assert not differing(*found)


@pytest.mark.parametrize(
    ("precision", "base", "factors"),
    [("bf16-true", torch.bfloat16, torch.float32), ("64-true", torch.float64, torch.float64)],
)
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_trainer_that_casts_the_base_leaves_what_is_trained_float32_at_least(
    tmp_path, precision, base, factors, variant
):
    module = Classifier(lr=1e-4)
    run = trainer(tmp_path, [lora(replace(CONFIG, variant=variant))], precision=precision)
    run.fit(module, loader())
    found = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert {dtype for name, dtype in found.items() if "lora_" in name} == {factors}
    assert {dtype for name, dtype in found.items() if "lora_" not in name} == {base}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train_merge_and_load(tmp_path, precision):
    module = Classifier(lr=0.3)
    saver = ModelCheckpoint(tmp_path, filename="it")
    run = trainer(tmp_path, [lora(merge_on_fit_end=True), saver], precision=precision)
    run.fit(module, loader())
    assert values(module).keys() == BASE
    run.test(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        pytest.param(Classifier(), "config is a Classifier, and has to be a LoraConfig", id="module"),
        pytest.param({"r": 4}, r"config is a dict.*LoraConfig\(\*\*values\)", id="dict"),
        pytest.param(None, "config is a NoneType", id="none"),
    ],
)
def test_what_is_no_config_is_refused_at_once(config, said):
    with pytest.raises(ConfigError, match=f"^LoraCallback: {said}"):
        LoraCallback(config)


@pytest.mark.parametrize("argument", [name for name in inspect.signature(LoraCallback).parameters if name != "config"])
def test_an_argument_of_another_type_is_told_at_once(argument):
    for value in (b"x", object(), [1], float("nan"), -1):
        with pytest.raises(ConfigError, match=rf"{argument} (is|holds) "):
            LoraCallback(LoraConfig(), **{argument: value})


@pytest.mark.parametrize("argument", ["merge_on_fit_end", "dequantize", "train_mode", "print_plan"])
def test_a_word_is_no_flag(argument):
    with pytest.raises(ConfigError, match=f"{argument} is True or False, not 'no'"):
        LoraCallback(LoraConfig(), **{argument: "no"})
