"""What is adapted, in which mode, and what is refused before anything is touched."""

import pytest
import torch
from lightning.pytorch.plugins import Precision
from torch import nn
from torchmetrics import Metric

from lora_plugins import LoraConfig, LoraModel, StateError, TargetError
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values


class Swaps(Precision):
    """Replaces linear layers when the strategy is set up, as the plugins of bitsandbytes and TransformerEngine do."""

    def convert_module(self, module):
        new = nn.Linear(4, 16)
        module.net[0] = new
        return module


def test_precision_plugin_that_replaces_layers_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"replaced by others.*net\.0.*precision plugin"):
        trainer(tmp_path, [lora()], plugins=[Swaps()]).fit(Classifier(), loader())


HEADED = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])


@pytest.mark.parametrize(
    ("hook", "place", "told"),
    [
        pytest.param("on_fit_start", 3, r"'net\.3\.weight'.*A head was replaced", id="head ahead of training"),
        pytest.param("on_train_start", 3, r"'net\.3\.weight'.*A head was replaced", id="head at the start"),
        pytest.param("on_train_epoch_start", 3, r"'net\.3\.weight'.*A head was replaced", id="head in an epoch"),
        pytest.param("on_train_start", 0, r"1 adapted layer was replaced.*'net\.0'", id="adapted layer at the start"),
    ],
)
def test_what_a_hook_replaces_is_refused_before_a_step_is_trained(tmp_path, hook, place, told):
    """Else the run would end in this error, with all that it has learned."""
    module = Classifier()
    setattr(module, hook, lambda: module.net.__setitem__(place, nn.Linear(*{0: (4, 16), 3: (16, 5)}[place])))
    run = trainer(tmp_path, [lora(HEADED)])
    with pytest.raises(StateError, match=told):
        run.fit(module, loader())
    assert run.global_step == 0


def test_head_that_grew_between_two_fits(tmp_path):
    module = Classifier()
    trainer(tmp_path, [lora(HEADED)]).fit(module, loader())
    module.net[3] = nn.Linear(16, 5)
    before = values(module)
    run = trainer(tmp_path, [lora(HEADED)])
    with pytest.raises(StateError, match=r"'net\.3\.bias': gone, or .*merge_and_unload\(\) of the target keeps"):
        run.fit(module, loader())
    assert not differing(before, values(module))
    expected = module.eval()(torch.ones(2, 4))
    LoraModel(module).merge_and_unload()
    assert torch.allclose(module(torch.ones(2, 4)), expected, rtol=1e-5, atol=1e-6)  # float32
    trainer(tmp_path, [lora(HEADED)]).fit(module, loader())
    assert not torch.equal(module.net[3].weight, before["net.3.weight"])


class Distance(Metric):
    """A metric with a network of its own, as FID has."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4))

    def update(self, x):
        pass

    def compute(self):
        return 0.0


def test_networks_of_metrics_are_not_adapted(tmp_path):
    module = Classifier()
    module.metric = Distance()
    trainer(tmp_path, [lora(LoraConfig(r=2))]).fit(module, loader())
    assert type(module.metric.net[0]) is nn.Linear
    assert LoraModel(module).plans["default"].layers[0].name == "net.0"


OTHER = LoraConfig(r=1, target_modules=["net.3"])


class TestRefusedAtOnce:
    def test_no_match_lists_what_there_is(self, tmp_path):
        module = Classifier()
        before = values(module)
        with pytest.raises(TargetError, match=r"'net\.O' matches no module.*'net\.3'"):
            trainer(tmp_path, [lora(LoraConfig(target_modules=["net.O"]))]).fit(module, loader())
        assert not differing(before, values(module))
        assert type(module.net[0]) is nn.Linear

    def test_nested_targets(self, tmp_path):
        callbacks = [lora(LoraConfig(r=2), target="net"), lora(LoraConfig(r=2), adapter_name="other")]
        with pytest.raises(StateError, match="lie inside one another"):
            trainer(tmp_path, callbacks).fit(Classifier(), loader())

    def test_a_second_one_that_trains_the_same_head(self, tmp_path):
        module = Classifier()
        config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
        trainer(tmp_path, [lora(config)]).fit(module, loader())
        before = values(module)
        with pytest.raises(StateError, match=r"cannot be active together.*'net\.3\.weight'.*only one that trains it"):
            trainer(tmp_path, [lora(config, adapter_name="second")]).fit(module, loader())
        assert LoraModel(module).adapters.keys() == {"default"}
        assert not differing(before, values(module))

    def test_unknown_target(self, tmp_path):
        with pytest.raises(ValueError, match=r"target is 'nett'.*'net'"):
            trainer(tmp_path, [lora(target="nett")]).fit(Classifier(), loader())


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_base_that_an_init_changes_is_not_written_by_the_module(tmp_path, init, first):
    """No warning passes in these tests; the other adapter is there before its base changes, or after."""
    callbacks = [
        lora(
            LoraConfig(r=2, target_modules=["net.0"], init=init), adapter_name="changes", save_adapter_to=tmp_path / "a"
        ),
        lora(LoraConfig(r=2, target_modules=["net.3"]), adapter_name="other", save_adapter_to=tmp_path / "b"),
    ]
    run = trainer(tmp_path, callbacks if first else callbacks[::-1])
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert not {"net.0.weight", "net.0.bias"} & load(tmp_path / "it.ckpt")["state_dict"].keys()
