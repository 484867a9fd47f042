"""Every family of segmenters: it builds from a tiny random configuration, trains with LoRA, and predicts."""

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from lora_plugins import ConfigError, LoraConfig
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.tasks import ImageClassificationTask, ModelConfig, SemanticSegmentationTask
from lora_plugins.tasks.models import SEGMENTERS, build_network, default_targets

from .conftest import HALF, noise, tiny_segformer, tiny_vit

FOUR = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 32,
    "patch_size": 8,
}
CONVNEXT = {
    "model_type": "convnext",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
MOBILEVIT = {
    "hidden_sizes": [8, 8, 16],
    "neck_hidden_sizes": [8, 8, 8, 8, 8, 8, 16],
    "num_attention_heads": 2,
    "image_size": 128,  # of 64, the last stage would attend to a single patch
    "aspp_out_channels": 8,
    "initializer_range": 0.2,  # at 0.02, the signal fades on its way through random convolutions
}
TRANSFORMERS = {  # model type: options, side of the images, what is adapted by default, the head's last layer
    "beit": (
        {**FOUR, "out_indices": [1, 2, 3, 4]},
        32,
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        "decode_head.classifier",
    ),
    "data2vec-vision": ({**FOUR, "out_indices": [0, 1, 2, 3]}, 32, None, "decode_head.classifier"),
    "dpt": (
        {
            **FOUR,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16,
        },
        32,
        ["query", "key", "value", "attention.output.dense"],
        "head.head.4",
    ),
    "upernet": (
        {"hidden_size": 16, "backbone_config": CONVNEXT},
        64,
        ["patch_embeddings", "pwconv1", "pwconv2", "downsampling_layer.1"],
        "decode_head.classifier",
    ),
    "mobilevit": (
        MOBILEVIT,
        128,
        ["query", "key", "value", "attention.output.dense"],
        "segmentation_head.classifier.convolution",
    ),
}
TORCHVISION = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50")


def config(name, classes=4, **changes):
    if name in TORCHVISION:
        return ModelConfig("torchvision", name, classes, **({"weights": "none"} | changes))
    return ModelConfig("transformers", name, classes, "none", TRANSFORMERS[name][0], HALF, HALF, **changes)


def pairs(side, count=4):
    return DataLoader(TensorDataset(torch.rand(count, 3, side, side), torch.randint(0, 4, (count, side, side))), 2)


WITHOUT_GRADIENT = {"beit", "data2vec-vision", "dpt", "siglip"}
"""The callback's audit warns, rightly: outputs of the first two are counted such that the last layers of so shallow a
network lead nowhere, the first stage of DPT's neck has a part for an input that it never gets, and SigLIP's pooling
serves no classifier."""


def warned_of(name):
    warning = pytest.mark.filterwarnings("ignore:.*trainable tensors got no gradient:UserWarning")
    return pytest.param(name, marks=[warning] if name in WITHOUT_GRADIENT else [])


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


@pytest.mark.parametrize("name", [name for name, row in TRANSFORMERS.items() if row[2]])
def test_default_targets_are_attention_or_else_dense_layers(name):
    network = build_network(config(name), SEGMENTERS)
    assert default_targets(network.module, network.new_modules) == TRANSFORMERS[name][2]


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
    [("transformers", "beit", {"out_indices": [1]}), ("smp", "UnetPlusPlus", {"encoder_name": "mit_b0"})],
    ids=["transformers", "smp"],
)
def test_what_a_library_refuses_is_said_with_the_options(source, name, options):
    with pytest.raises(ConfigError, match=f"{name}.* cannot be built with the options"):
        SemanticSegmentationTask(ModelConfig(source, name, 4, "none", options, HALF, HALF))


CLASSIFIERS = {
    "vit_tiny_patch16_224": ["qkv", "attn.proj"],
    "swinv2_cr_tiny_224": ["qkv", "attn.proj"],
    "convnext_atto": ["stem.0", "fc1", "fc2", "downsample.1"],
    "resnet18": ["conv1", "conv2", "downsample.0"],
    "efficientnet_lite0": ["conv_stem", "conv_pw", "conv_pwl", "conv_head"],
}


@pytest.mark.parametrize(("name", "targets"), CLASSIFIERS.items(), ids=CLASSIFIERS)
def test_default_targets_of_classifiers(name, targets):
    import timm

    with torch.device("meta"):
        network = timm.create_model(name, num_classes=3)
    heads = [network.pretrained_cfg["classifier"]]
    assert default_targets(network, heads) == targets


def test_targets_of_a_configuration_come_first(trainer):
    task = ImageClassificationTask(tiny_vit())
    callback = LoraCallback(LoraConfig(r=2, target_modules=["fc1"]), target="network")
    assert {layer.name.rpartition(".")[2] for layer in callback.plan(task).layers} == {"fc1"}
    callback = LoraCallback(LoraConfig(r=2), target="network")
    assert {layer.name.rpartition(".")[2] for layer in callback.plan(task).layers} == {"qkv", "proj"}


def test_an_auxiliary_head_of_a_file_is_left_aside(tmp_path):
    from transformers import BeitConfig, BeitForSemanticSegmentation

    whole = BeitForSemanticSegmentation(BeitConfig(**TRANSFORMERS["beit"][0], num_labels=4))
    assert any(key.startswith("auxiliary_head.") for key in whole.state_dict())
    whole.save_pretrained(tmp_path)
    named = ModelConfig("transformers", str(tmp_path), 4, "pretrained", {}, HALF, HALF)
    network = build_network(named, SEGMENTERS)
    assert network.new_modules == ()
    assert torch.equal(network.module.decode_head.classifier.weight, whole.decode_head.classifier.weight)


def test_an_auxiliary_head_is_not_asked_for():
    options = {**TRANSFORMERS["beit"][0], "use_auxiliary_head": True}
    with pytest.raises(ConfigError, match="main head"):
        SemanticSegmentationTask(ModelConfig("transformers", "beit", 4, "none", options, HALF, HALF))


class TestTorchvisionFiles:
    def written(self, path, classes):
        from torchvision.models import get_model

        name = TORCHVISION[1]
        state = get_model(name, weights=None, weights_backbone=None, num_classes=classes).state_dict()
        save_file(state, path)
        return state

    @pytest.mark.parametrize(
        ("classes", "new"),
        [(4, ()), (7, ("classifier.high_classifier", "classifier.low_classifier"))],
        ids=["same classes", "other classes"],
    )
    def test_weights_from_a_file(self, tmp_path, classes, new):
        state = self.written(tmp_path / "w.safetensors", classes)
        network = build_network(config(TORCHVISION[1], weights=str(tmp_path / "w.safetensors")), SEGMENTERS)
        assert network.new_modules == new
        key = "backbone.0.0.weight"
        assert torch.equal(network.module.state_dict()[key], state[key])

    def test_an_unknown_name(self):
        with pytest.raises(ConfigError, match="Did you mean 'deeplabv3_resnet50'"):
            SemanticSegmentationTask(ModelConfig("torchvision", "deeplab_resnet50", 4, "none"))


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

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **small)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    own = getattr(transformers, f"{family}ImageProcessor")()
    own.save_pretrained(tmp_path)
    task, given = ImageClassificationTask(ModelConfig("transformers", str(tmp_path), 3, "pretrained")), []
    task.network.register_forward_pre_hook(lambda _, __, named: given.append(named["pixel_values"]), with_kwargs=True)
    picture = noise(16, 16)
    task(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    expected = own(picture, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(given, [expected])
