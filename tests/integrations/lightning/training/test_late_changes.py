"""What is changed after the adapter was saved and merged is said."""

import copy
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from lora_plugins import LoraConfig
from tests.integrations.lightning.toys import Classifier, loader, lora, trainer


class Averages(Classifier):
    """Takes other values of what it has trained at the end, as of a schedule-free optimizer."""

    def change(self):
        with torch.no_grad():
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)

    def configure_optimizers(self):
        self.optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
        return self.optimizer


ALONE = LoraConfig(r=2, target_modules=["net.0"])


@pytest.mark.parametrize("place", ["save_adapter_to", "export_to"])
def test_frozen_weights_are_named_as_well(tmp_path, place):
    module = Averages()
    module.on_fit_end = lambda: nn.init.ones_(module.net[3].bias)
    callback = lora(ALONE, merge_on_fit_end=True, **{place: str(tmp_path / "file.safetensors")})
    with pytest.warns(UserWarning, match=r"1 tensor .*: 'net\.3\.bias'\. on_fit_end"):
        trainer(tmp_path, [callback]).fit(module, loader())


def prune(module):
    nn.init.zeros_(module.net[3].weight)


def free(module):
    module.net[3].weight.data = torch.empty(0)


@pytest.mark.parametrize(
    ("act", "writes"),
    [
        pytest.param(lambda module: module.half(), True, id="converted"),
        pytest.param(free, True, id="freed"),
        pytest.param(prune, False, id="pruned where no file lacks it"),
    ],
)
def test_what_is_done_with_the_merged_module_is_not_named(tmp_path, act, writes):
    """No warning passes in these tests."""
    module = Averages()
    module.on_fit_end = lambda: act(module)
    files = {"save_adapter_to": tmp_path / "ours"} if writes else {}
    trainer(tmp_path, [lora(ALONE, merge_on_fit_end=True, **files)]).fit(module, loader())


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_values_that_are_taken_too_late_are_named(tmp_path, hook, merge):
    module = Averages()
    setattr(module, hook, module.change)
    late = pytest.warns(UserWarning, match=r"4 tensors .*net\.0\.lora_A.*Do it in on_train_end")
    with late if hook == "on_fit_end" else nullcontext():
        trainer(tmp_path, [lora(merge_on_fit_end=merge)]).fit(module, loader())


def test_several_adapters_are_told_of_once(tmp_path):
    module = Averages()
    module.on_fit_end = module.change
    first, second = (lora(LoraConfig(r=2, target_modules=[at]), adapter_name=at[-1]) for at in ("net.0", "net.3"))
    with pytest.warns(UserWarning, match="4 tensors") as told:
        trainer(tmp_path, [first, second]).fit(module, loader())
    assert sum("tensors were changed after" in str(each.message) for each in told) == 1


class TwoNetworks(Averages):
    def __init__(self):
        super().__init__()
        self.second = nn.Sequential(nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x) + self.second(x)

    def on_train_end(self):
        self.trained = dict(self.named_parameters())

    def on_fit_end(self):
        nn.init.ones_(self.trained[self.late])


@pytest.mark.parametrize("late", ["net.0.lora_B.default", "second.0.lora_B.default"])
def test_each_of_several_targets_is_told_of(tmp_path, late):
    """The first one is merged before the second one is saved."""
    module = TwoNetworks()
    module.late = late
    callbacks = [lora(LoraConfig(r=2), target=name, merge_on_fit_end=True) for name in ("net", "second")]
    with pytest.warns(UserWarning, match=f"1 tensor was changed after .*'{late}'"):
        trainer(tmp_path, callbacks).fit(module, loader())


class Best(Callback):
    """Loads values of the training when fit has ended, as the ModelCheckpoint of RF-DETR does."""

    def on_train_end(self, trainer, pl_module):
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_fit_end(self, trainer, pl_module):
        pl_module.load_state_dict(self.state)


class Teacher(Classifier):
    """Has a copy, which is not adapted: another error of keys could come of that."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)


@pytest.mark.parametrize(
    "adapters",
    [
        pytest.param([["net.0", "net.3", "teacher.0", "teacher.3"]], id="all"),
        pytest.param([["net.0"]], id="not the teacher"),
        pytest.param([["net.0"], ["net.3"]], id="two callbacks"),
    ],
)
def test_values_of_the_training_that_are_loaded_too_late_are_explained(tmp_path, adapters):
    callbacks = [
        lora(LoraConfig(r=2, target_modules=layers), adapter_name=f"of_{number}", merge_on_fit_end=True)
        for number, layers in enumerate(adapters)
    ]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_A") as caught:
        trainer(tmp_path, [*callbacks, Best()]).fit(Teacher(), loader())
    (note,) = caught.value.__notes__
    assert "was saved and merged before this" in note
    assert "on_train_end" in note
    assert "merge_on_fit_end=False" in note


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_what_follows_the_advice_runs(tmp_path, merge):
    """The values may be loaded ahead of the merge, or where there is none."""
    best, module = Best(), Classifier()
    if merge:
        best.on_fit_end, module.on_train_end = lambda *_: None, lambda: module.load_state_dict(module.state_dict())
    trainer(tmp_path, [lora(merge_on_fit_end=merge), best]).fit(module, loader())


def test_another_error_after_the_merge_gets_no_note(tmp_path):
    module = Teacher()
    module.on_fit_end = lambda: {}["size mismatch"]
    with pytest.raises(KeyError) as caught:
        trainer(tmp_path, [lora(ALONE, merge_on_fit_end=True)]).fit(module, loader())
    assert not getattr(caught.value, "__notes__", [])
