"""Networks: every source builds, weights load with an exact account, new heads are declared."""

import math

import pytest
import torch
from safetensors.torch import save_file

from lora_plugins import ConfigError
from lora_plugins.tasks import ImageClassificationTask, ModelConfig, SemanticSegmentationTask, WeightsError
from lora_plugins.tasks.models import CLASSIFIERS, SEGMENTERS, packaged_weights, source_of

from .conftest import HALF, TINY_SEGFORMER, tiny_segformer, tiny_vit

TINY_HF_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def hf_vit(num_classes=3, weights="none", name="vit"):
    return ModelConfig("transformers", name, num_classes, weights, TINY_HF_VIT, HALF, HALF)


def unet(num_classes=3, weights="none", decoder="Unet", **options):
    small = {"encoder_name": "tu-test_resnet", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}
    return ModelConfig("smp", decoder, num_classes, weights, small | options)


CLASSIFICATION = {"timm-vit": (tiny_vit(), "head"), "transformers-vit": (hf_vit(), "classifier")}
SEGMENTATION = {
    "segformer": (tiny_segformer(3), ("decode_head",)),
    "smp-unet": (unet(), ("decoder", "segmentation_head")),
}


def build(config):
    return source_of(config, CLASSIFIERS | SEGMENTERS if config.source != "transformers" else SEGMENTERS).build(config)


@pytest.mark.parametrize(("config", "head"), CLASSIFICATION.values(), ids=CLASSIFICATION)
def test_classifiers_answer_with_one_logit_a_class(config, head):
    task = ImageClassificationTask(config)
    assert task(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    assert task.head_modules == (f"network.{head}",)
    assert task.network.training


@pytest.mark.parametrize(("config", "heads"), SEGMENTATION.values(), ids=SEGMENTATION)
def test_segmenters_answer_at_the_size_of_the_image(config, heads):
    task = SemanticSegmentationTask(config)
    assert task(torch.rand(2, 3, 32, 48)).shape == (2, 3, 32, 48)
    assert task.head_modules == tuple(f"network.{head}" for head in heads)
    assert task.network.training


@pytest.mark.parametrize("task_class", [ImageClassificationTask, SemanticSegmentationTask])
def test_head_modules_are_modules_of_the_task(task_class):
    task = task_class(hf_vit() if task_class is ImageClassificationTask else tiny_segformer())
    assert set(task.head_modules) <= {name for name, _ in task.named_modules()}


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


@pytest.mark.parametrize(
    ("make", "head"),
    [
        pytest.param(tiny_vit, "head", id="timm"),
        pytest.param(tiny_segformer, "decode_head.classifier", id="transformers"),
        pytest.param(unet, "segmentation_head.0", id="smp"),
    ],
)
class TestWeightsFromAFile:
    def written(self, make, path, change=lambda state: None):
        network = build(make(5)).module
        state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        change(state)
        save_file(state, path)
        return state

    def test_all_of_it_with_the_same_classes(self, make, head, tmp_path):
        state = self.written(make, tmp_path / "w.safetensors")
        built = build(make(5, str(tmp_path / "w.safetensors")))
        assert built.new_modules == ()
        assert built.module.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in built.module.state_dict().items())
        assert built.module.training

    def test_all_but_the_head_with_other_classes(self, make, head, tmp_path):
        state = self.written(make, tmp_path / "w.safetensors")
        built = build(make(7, str(tmp_path / "w.safetensors")))
        assert built.new_modules == (head,)
        kept = {k: v for k, v in built.module.state_dict().items() if not k.startswith(f"{head}.")}
        assert all(torch.equal(tensor, state[key]) for key, tensor in kept.items())

    def test_from_a_folder(self, make, head, tmp_path):
        self.written(make, tmp_path / "model.safetensors")
        assert build(make(5, str(tmp_path))).new_modules == ()

    def test_from_the_file_of_a_whole_task(self, make, head, tmp_path):
        def prefix(state):
            for key in list(state):
                state[f"network.{key}"] = state.pop(key)

        self.written(make, tmp_path / "w.safetensors", prefix)
        assert build(make(5, str(tmp_path / "w.safetensors"))).new_modules == ()

    def test_a_file_without_a_head(self, make, head, tmp_path):
        top = head.partition(".")[0]

        def behead(state):
            for key in [key for key in state if key.startswith(f"{top}.")]:
                del state[key]

        self.written(make, tmp_path / "w.safetensors", behead)
        assert build(make(7, str(tmp_path / "w.safetensors"))).new_modules == (top,)

    def test_every_difference_is_listed(self, make, head, tmp_path):
        lost = next(iter(build(make(5)).module.state_dict()))

        def damage(state):
            del state[lost]
            state["surplus.weight"] = torch.zeros(1)

        self.written(make, tmp_path / "w.safetensors", damage)
        with pytest.raises(WeightsError, match="2 differences") as error:
            build(make(7, str(tmp_path / "w.safetensors")))
        assert f"missing in the file: {lost}" in str(error.value)
        assert "not in the network: surplus.weight" in str(error.value)

    def test_half_a_head_is_an_error(self, make, head, tmp_path):
        def damage(state):
            del state[f"{head}.bias"]

        self.written(make, tmp_path / "w.safetensors", damage)
        with pytest.raises(WeightsError, match=f"missing in the file: {head}.bias"):
            build(make(5, str(tmp_path / "w.safetensors")))


def test_a_changed_shape_inside_the_backbone_is_an_error(tmp_path):
    save_file(build(tiny_segformer()).module.state_dict(), tmp_path / "w.safetensors")
    wider = tiny_segformer(4, str(tmp_path / "w.safetensors"), mlp_ratios=[4, 2, 2, 2])
    with pytest.raises(WeightsError, match=r"another shape: segformer.*fc1.weight is \[16, 8\] in the file"):
        build(wider)


def test_weights_of_a_hub_folder_with_older_names(tmp_path):
    """transformers writes the names of the hub, which differ from those of its modules."""
    module = build(tiny_segformer()).module
    module.save_pretrained(tmp_path, max_shard_size="1GB")
    by_path = build(tiny_segformer(4, str(tmp_path)))
    by_name = build(ModelConfig("transformers", str(tmp_path), 4, "pretrained", {}, HALF, HALF))
    for built in (by_path, by_name):
        assert built.new_modules == ()
        for key, tensor in built.module.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[key])


def test_a_backbone_file_of_another_task_gives_a_new_head(tmp_path):
    """Like nvidia/mit-b0: a classifier of the same backbone, whose head is no part of ours."""
    from transformers import SegformerConfig, SegformerForImageClassification

    classifier = SegformerForImageClassification(SegformerConfig(**TINY_SEGFORMER, num_labels=9))
    save_file(classifier.state_dict(), tmp_path / "w.safetensors")
    assert build(tiny_segformer(4, str(tmp_path / "w.safetensors"))).new_modules == ("decode_head",)


ERRORS = {
    "source": (lambda: ModelConfig("tim", "resnet18", 3, "none"), r"'tim'. Did you mean 'timm'"),
    "timm name": (lambda: ModelConfig("timm", "resnet5o", 3, "none"), "Did you mean 'resnet50'"),
    "timm option": (lambda: tiny_vit(bogus=1), "bogus"),
    "model type": (lambda: ModelConfig("transformers", "vitt", 3, "none"), "Did you mean 'vit"),
    "model type of another task": (lambda: ModelConfig("transformers", "dpt", 3, "none"), "'dpt'. Did you mean"),
    "type without weights": (lambda: hf_vit(weights="pretrained"), "no weights of its own"),
    "weights": (lambda: tiny_vit(weights="pretraind"), "Did you mean 'pretrained'"),
    "packaged": (lambda: tiny_vit(weights="package:digit_classifier"), "Did you mean 'digits_classifier'"),
    "normalization": (lambda: ModelConfig("transformers", "vit", 3, "none", TINY_HF_VIT), "set `mean` and `std`"),
}


@pytest.mark.parametrize(("config", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_names_of_classifiers(config, message):
    with pytest.raises((ConfigError, WeightsError), match=message):
        ImageClassificationTask(config())


SEGMENTATION_ERRORS = {
    "decoder": (lambda: unet(decoder="UNet"), "Did you mean 'Unet'"),
    "timm encoder": (lambda: unet(encoder_name="tu-resnet5o"), "Did you mean 'resnet50'"),
    "own encoder": (lambda: unet(encoder_name="resnet19"), "Did you mean 'resnet18'"),
    "no encoder": (lambda: ModelConfig("smp", "Unet", 3, "none"), "needs an encoder"),
    "option": (lambda: unet(encoder_name="resnet18", decoder_chanels=[8]), "Did you mean 'decoder_channels'"),
    "option of a timm encoder": (lambda: unet(bogus=1), "bogus"),
    "option of segformer": (lambda: tiny_segformer(hiddensizes=[8]), "Did you mean 'hidden_sizes'"),
}


@pytest.mark.parametrize(("config", "message"), SEGMENTATION_ERRORS.values(), ids=SEGMENTATION_ERRORS)
def test_wrong_names_of_segmenters(config, message):
    with pytest.raises(ConfigError, match=message):
        SemanticSegmentationTask(config())


def test_a_file_that_is_no_safetensors_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        build(tiny_vit(weights=str(tmp_path / "w.safetensors")))


@pytest.mark.parametrize(
    "values",
    [{"num_classes": 0}, {"mean": HALF}, {"mean": HALF, "std": (0.5,)}, {"mean": HALF, "std": (0.5, 0.5, 0.0)}],
    ids=["no class", "mean alone", "lengths", "zero std"],
)
def test_numbers_that_do_not_go_together(values):
    with pytest.raises(ConfigError):
        ModelConfig(**({"source": "timm", "name": "resnet18", "num_classes": 2, "weights": "none"} | values))


def test_packaged_weights_are_small(request):
    folder = request.config.rootpath / "tasks" / "weights"
    assert packaged_weights() == ("digits_classifier", "scenes_segformer")
    assert all((folder / f"{name}.safetensors").stat().st_size <= 1_000_000 for name in packaged_weights())
