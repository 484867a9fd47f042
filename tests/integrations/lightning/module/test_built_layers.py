"""The plan of a module whose hooks build layers."""

import pytest

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.late_layers import LATE
from tests.integrations.lightning.toys import Classifier, differing, values


@pytest.mark.parametrize("kind", LATE)
def test_the_plan_has_layers_that_hooks_build(kind):
    module = LATE[kind]()
    before = values(module)
    plan = LoraCallback(LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["head"])).plan(module)
    assert [layer.name for layer in plan.layers] == ["net.0"]
    assert plan.trained == ("head.weight", "head.bias")
    assert module.head is None
    assert not differing(before, values(module))


def test_a_hook_that_needs_a_trainer_is_named():
    class Module(Classifier):
        def setup(self, stage):
            self.width = self.trainer.datamodule.width

    with pytest.warns(UserWarning, match=r"setup of Module cannot be called without a Trainer .*not in the plan"):
        plan = LoraCallback(LoraConfig(r=2)).plan(Module())
    assert [layer.name for layer in plan.layers] == ["net.0", "net.3"]
