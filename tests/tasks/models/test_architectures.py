"""Every family of networks: it builds from a tiny random configuration, trains with LoRA, and predicts."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import ImageClassificationTask, ModelConfig, SemanticSegmentationTask
from lora_plugins.tasks.models import build_network

from ..conftest import HALF, noise
from .architectures import CONVNEXT, MOBILEVIT, TORCHVISION, TRANSFORMERS, config


def pairs(side, count=4):
    return DataLoader(TensorDataset(torch.rand(count, 3, side, side), torch.randint(0, 4, (count, side, side))), 2)


WITHOUT_GRADIENT = {"beit", "data2vec-vision", "dpt", "siglip"}
"""The callback's audit warns, rightly: outputs of the first two are counted such that the last layers of so shallow a
network lead nowhere, the first stage of DPT's neck has a part for an input that it never gets, and SigLIP's pooling
serves no classifier."""


LARGE = {"deeplabv3_mobilenet_v3_large", "fcn_resnet50", "mobilevit"}
"""They take a second or more; `lraspp_mobilenet_v3_large` is of torchvision as well."""


def warned_of(name):
    warning = pytest.mark.filterwarnings("ignore:.*trainable tensors got no gradient:UserWarning")
    slow = [pytest.mark.slow] if name in LARGE else []
    return pytest.param(name, marks=[warning, *slow] if name in WITHOUT_GRADIENT else slow)


@pytest.mark.parametrize("name", [warned_of(name) for name in (*TRANSFORMERS, *TORCHVISION)])
def test_it_trains_with_the_default_targets(name, trainer):
    """The audit of the callback refuses a run in which a head, an auxiliary one say, gets no gradient."""
    side = TRANSFORMERS[name][1] if name in TRANSFORMERS else 64
    task = SemanticSegmentationTask(config(name))
    assert task.head_modules
    # Updates this small may be lost to rounding, and the merge refused.
    lora = LoraCallback(LoraConfig(r=2), target="network", print_plan=False, merge_on_fit_end=False)
    trainer(callbacks=[lora]).fit(task, pairs(side), pairs(side))
    for head in task.head_modules:
        assert all(p.requires_grad for p in task.get_submodule(head).parameters())
    assert any(parameter.any() for key, parameter in task.named_parameters() if ".lora_B." in key)
    assert task.eval()(torch.rand(1, 3, side, side)).shape == (1, 4, side, side)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
SMALL |= {"image_size": 32, "patch_size": 8}


TRANSFORMERS_CLASSIFIERS = {  # model type: options, the head
    "vit": (SMALL, ["classifier"]),
    "deit": (SMALL, ["classifier"]),  # two classes of models share the type
    "clip": ({"vision_config": SMALL, "text_config": {**SMALL, "vocab_size": 8}}, ["classifier"]),
    "siglip": ({"vision_config": SMALL, "text_config": {**SMALL, "vocab_size": 8}}, ["classifier"]),
    "convnext": ({k: v for k, v in CONVNEXT.items() if k in ("depths", "hidden_sizes")}, ["classifier"]),
    "timm_wrapper": ({"architecture": "test_vit"}, ["timm_model.head"]),  # nothing beside the base
    "hgnet_v2": (  # no part is the base
        {
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "embedding_size": 8,
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 8],
            "stage_mid_channels": [8, 8],
            "stage_out_channels": [8, 16],
            "stage_num_blocks": [1, 1],
            "stage_numb_of_layers": [1, 1],
            "stage_downsample": [False, True],
            "stage_light_block": [False, False],
            "stage_kernel_size": [3, 3],
        },
        ["fc"],
    ),
}


@pytest.mark.parametrize("name", [warned_of(name) for name in TRANSFORMERS_CLASSIFIERS])
def test_classifiers_of_transformers_train(name, trainer):
    options, heads = TRANSFORMERS_CLASSIFIERS[name]
    task = ImageClassificationTask(ModelConfig("transformers", name, 3, "none", options, HALF, HALF))
    assert task.head_modules == tuple(f"network.{head}" for head in heads)
    lora = LoraCallback(LoraConfig(r=2), target="network", print_plan=False, merge_on_fit_end=False)
    side = 160 if name == "timm_wrapper" else 32
    loader = DataLoader(TensorDataset(torch.rand(4, 3, side, side), torch.tensor([0, 1, 2, 0])), 2)
    trainer(callbacks=[lora]).fit(task, loader, loader)
    assert any(parameter.any() for key, parameter in task.named_parameters() if ".lora_B." in key)


def test_the_pictures_side_of_clip(tmp_path):
    """The file of a whole CLIP: what is of texts is left aside, the classifier is new."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    options, _ = TRANSFORMERS_CLASSIFIERS["clip"]
    whole = CLIPModel(CLIPConfig(**options))
    whole.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    task = ImageClassificationTask(ModelConfig("transformers", str(tmp_path), 3, "pretrained"))
    assert task.head_modules == ("network.classifier",)
    for key, tensor in task.network.vision_model.state_dict().items():
        assert torch.equal(tensor, whole.vision_model.state_dict()[key])


@pytest.mark.parametrize(
    ("source", "name", "options"),
    [
        pytest.param("transformers", "beit", {"out_indices": [1]}, id="transformers"),
        pytest.param("smp", "UnetPlusPlus", {"encoder_name": "mit_b0"}, id="smp"),
        pytest.param("timm", "test_vit", {"num_heads": 3}, id="timm, which asserts"),
        pytest.param("timm", "test_vit", {"patch_size": 0}, id="timm, which divides by zero"),
        pytest.param("timm", "test_vit", {"act_layer": "foo"}, id="timm, without such a layer"),
        pytest.param("timm", "test_vit", {"embed_dim": -64}, id="timm, with an error of torch"),
    ],
)
def test_what_a_library_refuses_is_said_with_the_options(source, name, options):
    task = ImageClassificationTask if source == "timm" else SemanticSegmentationTask
    with pytest.raises(ConfigError, match=f"{source}'s {name} cannot be built with the options"):
        task(ModelConfig(source, name, 4, "none", options, HALF, HALF))


def save_vit(folder):
    from transformers import ViTConfig, ViTForImageClassification

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=3, **small)).save_pretrained(folder)


@pytest.mark.parametrize("weights", ["none", "pretrained"])
def test_an_option_that_transformers_refuses_is_said_with_any_weights(weights, tmp_path):
    save_vit(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be built with the options \{'hidden_act': 'foo'\}: KeyError: .*foo"):
        ImageClassificationTask(
            ModelConfig("transformers", str(tmp_path), 3, weights, {"hidden_act": "foo"}, HALF, HALF)
        )


class NotThereError(FileNotFoundError, ValueError):
    """As the hub's LocalEntryNotFoundError before its version 1."""


def test_weights_that_cannot_be_fetched_are_told_as_that(monkeypatch):
    def fail(*arguments, **options):
        raise NotThereError("no network")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(ConfigError, match=r"could not be fetched \(no network\)"):
        ImageClassificationTask(ModelConfig("timm", "test_vit", 4, "pretrained"))


def test_an_auxiliary_head_is_not_asked_for():
    options = {**TRANSFORMERS["beit"][0], "use_auxiliary_head": True}
    with pytest.raises(ConfigError, match="main head"):
        SemanticSegmentationTask(ModelConfig("transformers", "beit", 4, "none", options, HALF, HALF))


def test_a_local_folder_of_timm(tmp_path):
    """The folder that timm writes for the hub, by its own loader."""
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_vit", num_classes=5)
    save_for_hf(model, tmp_path, model_config={"num_classes": 5}, safe_serialization=True)
    from lora_plugins.tasks.models import CLASSIFIERS as SOURCES

    same = build_network(ModelConfig("timm", f"local-dir:{tmp_path}", 5, "pretrained"), SOURCES)
    other = build_network(ModelConfig("timm", f"local-dir:{tmp_path}", 3, "pretrained"), SOURCES)
    assert (same.new_modules, other.new_modules) == ((), ("head",))
    for key, tensor in model.state_dict().items():
        assert torch.equal(same.module.state_dict()[key], tensor)


def test_preprocessing_is_that_of_the_folder(tmp_path):
    """MobileViT wants blue first, and no normalization; its processor says so, and which size."""
    from transformers import MobileViTConfig, MobileViTForSemanticSegmentation, MobileViTImageProcessor

    MobileViTForSemanticSegmentation(MobileViTConfig(**MOBILEVIT, num_labels=4)).save_pretrained(tmp_path)
    MobileViTImageProcessor(
        size={"shortest_edge": 70}, crop_size={"height": 64, "width": 64}, do_flip_channel_order=True, resample=3
    ).save_pretrained(tmp_path)
    task = SemanticSegmentationTask(ModelConfig("transformers", str(tmp_path), 4, "pretrained")).eval()
    assert (task.image_size, task.interpolation) == ((64, 64), "bicubic")
    assert (task.mean.unique(), task.std.unique()) == (0, 1)
    image = torch.rand(1, 3, 64, 64)
    expected = task.network(pixel_values=image.flip(1)).logits
    assert torch.equal(task.raw_logits(image), expected)


@pytest.mark.parametrize("family", ["ViT", "Segformer", "MobileViT", "EfficientNet"])
def test_a_network_is_given_what_the_processor_of_its_folder_gives(family, tmp_path):
    import transformers

    save_vit(tmp_path)
    own = getattr(transformers, f"{family}ImageProcessor")()
    own.save_pretrained(tmp_path)
    task, given = ImageClassificationTask(ModelConfig("transformers", str(tmp_path), 3, "pretrained")), []
    task.network.register_forward_pre_hook(lambda _, __, named: given.append(named["pixel_values"]), with_kwargs=True)
    picture = noise(16, 16)
    task(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    expected = own(picture, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, [expected])
