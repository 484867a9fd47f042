"""A new head that nobody trains is said; a model that is new altogether, or whose head is trained, says nothing."""

import copy
import re

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig
from tests.integrations.lightning.toys import Classifier, loader, lora, trainer


class Pretrained(Classifier):
    """Its first layers have values that training left; its head is what each case says."""

    def __init__(self, head, head_modules=()):
        super().__init__()
        self.head_modules = head_modules
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(3)
            trained = [nn.Linear(4, 32), nn.Linear(32, 32)]
            for layer in trained:
                layer.weight.mul_(1 + torch.randn_like(layer.weight))
                layer.bias.add_(0.1)
            self.net = nn.Sequential(trained[0], nn.ReLU(), trained[1], nn.ReLU(), head())

    def save_hyperparameters(self, *_):
        """A function is no hyperparameter."""


def new():
    return nn.Linear(32, 3)


def with_zero_bias():
    layer = nn.Linear(32, 3)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def zeros():
    layer = with_zero_bias()
    nn.init.zeros_(layer.weight)
    return layer


def trained():
    layer = new()
    with torch.no_grad():
        layer.weight.mul_(1 + torch.randn_like(layer.weight))
        layer.bias.add_(0.1)
    return layer


BODY = LoraConfig(r=2, target_modules=["net.0", "net.2"])


def fit(tmp_path, module, config=BODY):
    trainer(tmp_path, [lora(config)], max_epochs=1).fit(module, loader())


@pytest.mark.filterwarnings("ignore:.*did not move in 4 steps:UserWarning")  # behind a head of zeros
@pytest.mark.parametrize("head", [new, with_zero_bias, zeros])
def test_forgotten_head_is_named_in_plan_and_warning(tmp_path, capsys, head):
    with pytest.warns(UserWarning, match=r"'net\.4' of Pretrained look newly initialized.*modules_to_save"):
        fit(tmp_path, Pretrained(head))
    assert "Looks new, and is not trained: 'net.4'" in capsys.readouterr().out


def test_names_are_those_below_the_target_as_modules_to_save_takes_them(tmp_path):
    callback = lora(LoraConfig(r=2, target_modules=["0", "2"]), target="net")
    with pytest.warns(UserWarning, match=r"'4' of Sequential look newly initialized"):
        trainer(tmp_path, [callback], max_epochs=1).fit(Pretrained(new), loader())


@pytest.mark.parametrize("head", [new, with_zero_bias, zeros])
@pytest.mark.parametrize(
    ("config", "declared"),
    [
        (LoraConfig(r=2, target_modules=["net.0", "net.2"], modules_to_save=["net.4"]), ()),
        (BODY, ("net.4",)),
        (LoraConfig(r=2, target_modules=["net.0", "net.2", "net.4"]), ()),
    ],
    ids=["saved", "declared", "adapted"],
)
def test_head_that_is_trained_is_not(tmp_path, head, config, declared):
    fit(tmp_path, Pretrained(head, declared), config)


class Averaged(Pretrained):
    """Keeps an average of its network."""

    def __init__(self, frozen):
        super().__init__(new)
        self.average = copy.deepcopy(self.net).requires_grad_(not frozen)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for mean, value in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.lerp_(value, 0.5)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen by its author", "trainable"])
def test_head_of_a_copy_follows_that_of_its_original_where_it_is_trained(tmp_path, frozen):
    layers = [f"{part}.{at}" for part in ("net", "average") for at in (0, 2)]
    fit(tmp_path, Averaged(frozen), LoraConfig(r=2, target_modules=layers, modules_to_save=["net.4"]))
    named = "net" if frozen else "average"
    with pytest.warns(UserWarning, match=rf"'{named}\.4' of Averaged look newly initialized"):
        fit(tmp_path, Averaged(frozen), LoraConfig(r=2, target_modules=layers))


@pytest.mark.parametrize(
    "frozen",
    [r"net\.[02]\.", "", r"net\.0\.", r"net\.2\.", r"net\.[02]\.weight", r".*\.weight", r"net\.[04]\.weight"],
    ids=["the backbone", "all", "its first layer", "its last layer", "its weights", "all weights", "some weights"],
)
def test_forgotten_head_is_named_whatever_its_author_has_frozen_beside_it(tmp_path, frozen):
    module = Pretrained(new)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(re.match(frozen, name) is None)
    with pytest.warns(UserWarning, match=r"^'net\.4' of Pretrained look newly initialized"):
        fit(tmp_path, module)


@pytest.mark.parametrize("backbone", ["net.0", "net.2"])
def test_head_that_its_author_has_frozen_beside_what_he_trains_is_not(tmp_path, backbone):
    module = Pretrained(new)
    module.requires_grad_(False)
    module.get_submodule(backbone).requires_grad_(True)
    fit(tmp_path, module)


class WithNeck(Pretrained):
    """Puts a new layer between a backbone that its author has frozen and a new head."""

    def __init__(self):
        super().__init__(new)
        self.net[:3].requires_grad_(False)
        self.net.insert(4, nn.Linear(32, 32))


def test_head_behind_a_new_layer_that_is_adapted_and_a_frozen_backbone(tmp_path):
    with pytest.warns(UserWarning, match=r"^'net\.5' of WithNeck look newly initialized"):
        fit(tmp_path, WithNeck(), LoraConfig(r=2, target_modules=["net.0", "net.2", "net.4"]))


def test_trained_head_is_not(tmp_path):
    fit(tmp_path, Pretrained(trained))


def test_model_that_is_new_altogether_has_no_forgotten_head(tmp_path):
    fit(tmp_path, Classifier(), LoraConfig(r=2, target_modules=["net.0"]))


def test_adapted_layers_that_are_too_small_to_tell_say_nothing(tmp_path):
    module = Classifier()
    module.net = nn.Sequential(*list(module.net), nn.Linear(3, 32), nn.Linear(32, 3))
    fit(tmp_path, module, LoraConfig(r=2, target_modules=["net.3"]))


def test_head_outside_the_target_is_the_modules_own(tmp_path):
    module = Pretrained(nn.Identity)
    module.head = new()
    module.forward = lambda x: module.head(module.net(x))
    trainer(tmp_path, [lora(LoraConfig(r=2), target="net")], max_epochs=1).fit(module, loader())


def test_resnet_with_a_new_classifier(tmp_path):
    models = pytest.importorskip("torchvision.models")

    class Images(Classifier):
        def __init__(self):
            super().__init__()
            self.net = models.resnet18(num_classes=3)

        def forward(self, x):
            return self.net(x.mean(1)[:, None, None, None].expand(-1, 3, 32, 32))

    with pytest.warns(UserWarning, match=r"'net\.fc' of Images look newly"):
        fit(tmp_path, Images(), LoraConfig(r=2, target_modules=["conv1", "conv2"]))
