"""The head: kept, trained, or initialized anew."""

import math

import pytest
import torch
from safetensors.torch import save_file

from lora_plugins import ConfigError
from lora_plugins.tasks import ImageClassificationTask, ModelConfig
from lora_plugins.tasks.models import (
    CLASSIFIERS,
    SEGMENTERS,
    build_network,
)

from ..conftest import tiny_segformer
from .architectures import TORCHVISION, TRANSFORMERS, config


@pytest.mark.parametrize("classes", [10, 7], ids=["asked_for", "of_another_number"])
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet10t"])
def test_a_new_classifier_over_weights_starts_with_the_loss_of_a_guess(name, classes, tmp_path):
    torch.manual_seed(0)
    build = CLASSIFIERS["timm"].build
    save_file(build(ModelConfig("timm", name, 10, "none")).module.state_dict(), tmp_path / "w.safetensors")
    model = ModelConfig("timm", name, classes, str(tmp_path / "w.safetensors"), head="new")
    task = ImageClassificationTask(model).train()  # batch statistics: those of these weights were never learned
    loss = torch.nn.functional.cross_entropy(task(torch.rand(8, 3, 96, 96)), torch.arange(8) % classes)
    assert loss.item() == pytest.approx(math.log(classes), abs=0.3)


class TestHeads:
    """A head whose class count happens to equal that of the weights is trained when asked."""

    def written(self, make, path):
        network = build_network(make(), SEGMENTERS)
        save_file(network.module.state_dict(), path)
        return network.module.state_dict()

    @pytest.mark.parametrize("head", ["auto", "train", "new"])
    def test_of_as_many_classes(self, tmp_path, head):
        from dataclasses import replace

        path = tmp_path / "w.safetensors"
        state = self.written(tiny_segformer, path)
        network = build_network(replace(tiny_segformer(weights=str(path)), head=head), SEGMENTERS)
        assert network.new_modules == (() if head == "auto" else ("decode_head.classifier",))
        key = "decode_head.classifier.weight"
        assert torch.equal(network.module.state_dict()[key], state[key]) == (head != "new")

    @pytest.mark.parametrize("name", [*TRANSFORMERS, TORCHVISION[1]])
    def test_the_layers_that_depend_on_the_classes_are_found(self, name):
        from lora_plugins.tasks.models import class_dependent_modules

        found = class_dependent_modules(lambda classes: build_network(config(name, classes), SEGMENTERS).module, 4)
        expected = TRANSFORMERS[name][3:] if name in TRANSFORMERS else None
        assert found == (expected or ("classifier.high_classifier", "classifier.low_classifier"))

    def test_an_unknown_word(self):
        with pytest.raises(ConfigError, match="Did you mean 'train'"):
            ModelConfig("timm", "resnet18", 3, "none", head="trian")
