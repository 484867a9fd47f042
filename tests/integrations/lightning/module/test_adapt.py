"""What is adapted, in which mode, and what is refused before anything is touched."""

import pytest
from lightning.pytorch.plugins import Precision
from torch import nn
from torchmetrics import Metric

from lora_plugins import LoraConfig, LoraModel, StateError, TargetError
from tests.integrations.lightning.toys import Classifier, differing, loader, lora, trainer, values


class Swaps(Precision):
    """Replaces linear layers when the strategy is set up, as the plugins of bitsandbytes and TransformerEngine do."""

    def convert_module(self, module):
        new = nn.Linear(4, 16)
        module.net[0] = new
        return module


def test_precision_plugin_that_replaces_layers_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"replaced by others.*net\.0.*precision plugin"):
        trainer(tmp_path, [lora()], plugins=[Swaps()]).fit(Classifier(), loader())


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
        with pytest.raises(StateError, match=r"cannot be active together.*'net\.3\.weight'"):
            trainer(tmp_path, [lora(config, adapter_name="second")]).fit(module, loader())
        assert LoraModel(module).adapters.keys() == {"default"}
        assert not differing(before, values(module))

    def test_unknown_target(self, tmp_path):
        with pytest.raises(ValueError, match=r"target is 'nett'.*'net'"):
            trainer(tmp_path, [lora(target="nett")]).fit(Classifier(), loader())
