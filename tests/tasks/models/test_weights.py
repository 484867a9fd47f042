"""Weights load strictly: only a new head may be missing."""

import pytest
import torch
from safetensors.torch import save_file

from lora_plugins import ConfigError
from lora_plugins.tasks import ModelConfig, SemanticSegmentationTask, WeightsError
from lora_plugins.tasks.models import (
    CLASSIFIERS,
    INSTALLED,
    SEGMENTERS,
    build_network,
    packaged_weights,
    source_of,
)

from ..conftest import HALF, TINY_SEGFORMER, tiny_segformer, tiny_vit, unet
from .architectures import TORCHVISION, TRANSFORMERS, config


def build(config):
    return source_of(config, CLASSIFIERS | SEGMENTERS if config.source != "transformers" else SEGMENTERS).build(config)


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


def test_a_file_that_is_no_safetensors_file(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        build(tiny_vit(weights=str(tmp_path / "w.safetensors")))


def test_packaged_weights_are_small(request):
    folder = request.config.rootpath / "tasks" / "weights"
    shipped = ("digits_classifier", "scenes_segformer")
    assert packaged_weights() == (*shipped, *INSTALLED)
    assert all((folder / f"{name}.safetensors").stat().st_size <= 1_000_000 for name in shipped)


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


def test_an_auxiliary_head_of_a_file_is_left_aside(tmp_path):
    from transformers import BeitConfig, BeitForSemanticSegmentation

    whole = BeitForSemanticSegmentation(BeitConfig(**TRANSFORMERS["beit"][0], num_labels=4))
    assert any(key.startswith("auxiliary_head.") for key in whole.state_dict())
    whole.save_pretrained(tmp_path)
    named = ModelConfig("transformers", str(tmp_path), 4, "pretrained", {}, HALF, HALF)
    network = build_network(named, SEGMENTERS)
    assert network.new_modules == ()
    assert torch.equal(network.module.decode_head.classifier.weight, whole.decode_head.classifier.weight)


class TestFilesOfTorchSave:
    @pytest.mark.parametrize(
        "wrapped",
        [
            dict,
            lambda state: {"state_dict": state, "epoch": 3},
            lambda state: {f"module.{k}": v for k, v in state.items()},
        ],
        ids=["plain", "in a checkpoint", "of distributed training"],
    )
    @pytest.mark.parametrize("ending", ["pth", "pkl"])
    def test_are_read(self, tmp_path, wrapped, ending):
        state = build(tiny_vit(5)).module.state_dict()
        torch.save(wrapped(state), tmp_path / f"w.{ending}")
        built = build(tiny_vit(5, str(tmp_path / f"w.{ending}")))
        assert all(torch.equal(tensor, state[key]) for key, tensor in built.module.state_dict().items())

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (torch.nn.Linear(2, 2), "holds no plain tensors"),
            ({"epoch": 3}, "is no state dict"),
            (None, "no plain tensors"),
        ],
        ids=["a module", "something else", "no file of torch.save"],
    )
    def test_what_else_they_hold_is_refused(self, tmp_path, content, message):
        if content is None:
            (tmp_path / "w.pth").write_bytes(b"what is this")
        else:
            torch.save(content, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match=message):
            build(tiny_vit(5, str(tmp_path / "w.pth")))


class TestFilesOfAnEncoder:
    @pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
    def test_a_classifier_of_timm(self, tmp_path, name):
        """Also where the network of features has other names than the classifier."""
        import timm

        classifier = timm.create_model(name)
        save_file(classifier.state_dict(), tmp_path / "w.safetensors")
        small = {"encoder_name": f"tu-{name}", "encoder_depth": 3, "decoder_channels": [8, 8, 8]}
        built = build(ModelConfig("smp", "Unet", 3, str(tmp_path / "w.safetensors"), small))
        features = timm.create_model(name, features_only=True, out_indices=(0, 1))
        features.load_state_dict(
            {
                key: classifier.state_dict()[original]
                for key in features.state_dict()
                for original in classifier.state_dict()
                if original.replace(".", "_") == key.replace(".", "_")
            }
        )
        loaded = built.module.state_dict()
        for key, tensor in features.state_dict().items():
            assert torch.equal(loaded[f"encoder.model.{key}"], tensor), key
        assert set(built.new_modules) == {"decoder", "segmentation_head"}

    def test_an_encoder_of_smp(self, tmp_path):
        made = ModelConfig("smp", "Unet", 3, "none", {"encoder_name": "mobilenet_v2"}, HALF, HALF)
        encoder = build(made).module.encoder.state_dict()
        save_file(encoder, tmp_path / "w.safetensors")
        built = build(
            ModelConfig("smp", "Unet", 3, str(tmp_path / "w.safetensors"), {"encoder_name": "mobilenet_v2"}, HALF, HALF)
        )
        assert all(torch.equal(tensor, encoder[key]) for key, tensor in built.module.encoder.state_dict().items())

    def test_a_file_of_another_encoder_is_refused(self, tmp_path):
        import timm

        save_file(timm.create_model("test_convnext").state_dict(), tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match="missing in the file: encoder"):
            build(unet(3, str(tmp_path / "w.safetensors")))
