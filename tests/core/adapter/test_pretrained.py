"""`save_pretrained` of an adapted model says that the adapter would be dropped, and what to call."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel, TargetError

TARGETS = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"], init="none")
WARNING = r"save_pretrained writes base and adapter apart.*save_adapter\(path\).*merge_and_unload\(\)"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def vit(transformers):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture
def quiet():
    """Fails where anything warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def logits(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)).logits


def test_the_adapter_is_dropped_by_from_pretrained_and_that_is_told(vit, transformers, tmp_path):
    LoraModel(vit, TARGETS)
    with pytest.warns(UserWarning, match=WARNING) as told:
        vit.save_pretrained(tmp_path)
    assert told[0].filename == __file__
    assert not torch.allclose(
        logits(transformers.AutoModelForImageClassification.from_pretrained(tmp_path)), logits(vit)
    )


@pytest.mark.parametrize(
    "advice",
    [
        pytest.param(
            "Where the Trainer of transformers calls it, train with LoraTrainer in its place", id="transformers"
        ),
        pytest.param(r"in a fit of Lightning, LoraCallback\(config, save_adapter_to=folder\) does", id="Lightning"),
    ],
)
def test_the_warning_says_what_saves_the_adapter_under_each_trainer(vit, tmp_path, advice):
    LoraModel(vit, TARGETS)
    with pytest.warns(UserWarning, match=advice):
        vit.save_pretrained(tmp_path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda lora: lora.merge_and_unload(), id="merged for good"),
        pytest.param(lambda lora: lora.merge_adapter(), id="merged"),
        pytest.param(lambda lora: lora.unload(), id="unloaded"),
        pytest.param(lambda lora: lora.delete_adapter("default"), id="deleted"),
        pytest.param(lambda lora: lora.set_adapter([]), id="none active"),
    ],
)
def test_what_from_pretrained_gives_back_is_saved_as_ever(vit, transformers, tmp_path, leave):
    leave(LoraModel(vit, TARGETS))
    vit.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForImageClassification.from_pretrained(tmp_path)), logits(vit))


@pytest.mark.usefixtures("quiet")
def test_the_base_is_saved_as_ever_in_a_block(vit, transformers, tmp_path):
    lora = LoraModel(vit, TARGETS)
    with lora.disable_adapter():
        vit.save_pretrained(tmp_path)
        assert torch.equal(logits(transformers.AutoModelForImageClassification.from_pretrained(tmp_path)), logits(vit))


def test_a_state_dict_that_is_given_counts(vit, transformers, tmp_path):
    plain = LoraModel(copy.deepcopy(vit), TARGETS).merge_and_unload()
    LoraModel(vit, TARGETS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vit.save_pretrained(tmp_path, state_dict=plain.state_dict())
    assert torch.equal(logits(transformers.AutoModelForImageClassification.from_pretrained(tmp_path)), logits(plain))
    with pytest.warns(UserWarning, match=WARNING):
        vit.save_pretrained(tmp_path, state_dict=vit.state_dict())


def test_a_part_and_a_model_in_another_warn_too(vit, tmp_path):
    module = nn.ModuleDict({"net": vit, "other": nn.Linear(4, 4)})
    LoraModel(module, TARGETS)
    for part in (module["net"], module["net"].vit):
        with pytest.warns(UserWarning, match=f"{type(part).__name__}.{WARNING}"):
            part.save_pretrained(tmp_path)


@pytest.mark.usefixtures("quiet")
def test_a_part_without_adapted_layers_does_not_warn(vit, tmp_path):
    module = nn.ModuleDict({"net": vit, "other": nn.Linear(4, 4)})
    LoraModel(module, LoraConfig(target_modules=["other"]))
    vit.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_warns_by_itself(vit, tmp_path, again):
    lora = LoraModel(vit, TARGETS)
    other = again(vit)
    lora.unload()
    with pytest.warns(UserWarning, match=WARNING):
        other.save_pretrained(tmp_path)
    LoraModel(other).merge_and_unload()
    other.save_pretrained(tmp_path)
    vit.save_pretrained(tmp_path)


def test_nothing_is_left_behind(vit):
    before = [set(vars(module)) for module in vit.modules()]
    with pytest.raises(TargetError):
        LoraModel(vit, LoraConfig(target_modules=["nowhere"]))
    lora = LoraModel(vit, TARGETS)
    lora.add_adapter("b", LoraConfig(target_modules=["v_proj"]))
    lora.unload()
    assert [set(vars(module)) for module in vit.modules()] == before


class Saved(nn.Module):
    """A model of a library that nobody knows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def save_pretrained(self, path, *, shards=1):
        """Returns what it was called with."""
        return path, shards


def test_any_model_with_such_a_method_warns_and_saves_as_it_does():
    model = Saved()
    LoraModel(model, LoraConfig(target_modules=["layer"]))
    with pytest.warns(UserWarning, match=WARNING):
        assert model.save_pretrained("there", shards=2) == ("there", 2)
    assert [*inspect.signature(model.save_pretrained).parameters] == ["path", "shards"]


def test_a_method_of_the_instance_stays():
    model = Saved()
    own = model.save_pretrained = lambda path: path
    LoraModel(model, LoraConfig(target_modules=["layer"])).unload()
    assert model.save_pretrained is own


def test_diffusers_and_segmentation_models(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    smp = pytest.importorskip("segmentation_models_pytorch")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    for name, model in {"unet": unet, "smp": smp.Unet("resnet18", encoder_weights=None)}.items():
        LoraModel(model, LoraConfig(target_modules=["conv1"]))
        with pytest.warns(UserWarning, match=WARNING):
            model.save_pretrained(tmp_path / name)
