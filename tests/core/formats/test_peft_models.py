"""Adapters of PEFT on models of timm, torchvision and transformers, both ways, and with names of transformers 4."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_plugins import LoraConfig, LoraModel
from tests.core.formats.peft_cases import TOLERANCE, moved
from tests.core.libraries import create_model, of_library

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks transformers for it
]


def vit_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config)


def segformer_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    return transformers.SegformerForSemanticSegmentation(config)


def swin_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return transformers.SwinForImageClassification(config)


@dataclass(frozen=True)
class Model:
    """One model, and what is adapted of it, in words that mean the same to PEFT and to us."""

    id: str
    build: Callable[[], Any]
    size: int
    fields: dict[str, Any] = field(default_factory=dict)

    def made(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.build().double().eval()

    def run(self, model):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(4)
            output = model(torch.randn(1, 3, self.size, self.size).double())
            return getattr(output, "logits", output)


MODELS = [
    Model(
        "timm vit",
        lambda: create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3),
        32,
        {"target_modules": ["qkv", "proj", "fc1"], "modules_to_save": ["head"]},
    ),
    Model(
        "timm convnext",
        lambda: create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1), ls_init_value=1.0),
        32,
        {"target_modules": ["fc1", "fc2"], "bias": "lora_only"},
    ),
    Model(
        "torchvision resnet18",
        lambda: of_library("torchvision.models", "resnet18")(num_classes=3),
        64,
        {"target_modules": ["conv1", "conv2"], "modules_to_save": ["fc", "bn1"]},
    ),
    Model(
        "torchvision resnet18 of a detector",  # whose frozen normalization has buffers called bias
        lambda: of_library("torchvision.models", "resnet18")(
            num_classes=3, norm_layer=of_library("torchvision.ops", "FrozenBatchNorm2d")
        ),
        64,
        {"target_modules": ["conv1", "conv2"], "modules_to_save": ["bn1"], "bias": "all"},
    ),
    Model(
        "torchvision vit",
        lambda: of_library("torchvision.models", "VisionTransformer")(
            image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3
        ),
        32,
        {"target_modules": ["mlp.0", "mlp.3"], "rank_pattern": {"mlp.0": 4}, "modules_to_save": ["head"]},
    ),
    Model(
        "transformers vit",
        vit_of_transformers,
        32,
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "use_rslora": True},
    ),
    Model(
        "transformers segformer",
        segformer_of_transformers,
        64,
        {"target_modules": ["q_proj", "v_proj", "fc1"], "modules_to_save": ["classifier"], "bias": "all"},
    ),
]
models = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)


def with_peft(model):
    peft = pytest.importorskip("peft")
    return moved(peft.get_peft_model(model.made(), peft.LoraConfig(r=2, lora_alpha=3, **model.fields))).eval()


@models
def test_what_peft_writes_is_read(model, tmp_path):
    theirs = with_peft(model)
    theirs.save_pretrained(tmp_path)
    ours = model.made()
    LoraModel.load_adapter(ours, tmp_path)
    expected = model.run(theirs)
    assert float((model.run(model.made()) - expected).abs().max()) > 1e-3
    assert float((model.run(ours) - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@models
def test_what_we_write_is_read_by_peft(model, tmp_path):
    peft = pytest.importorskip("peft")
    lora = LoraModel(model.made(), LoraConfig(r=2, alpha=3.0, **model.fields))
    moved(lora.model)
    lora.save_adapter(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(model.made(), str(tmp_path)).eval()
    expected = model.run(lora.model)
    assert float((model.run(theirs) - expected).abs().max() / expected.abs().max()) <= TOLERANCE


FORMER = {
    "transformers vit": (
        {
            "vit.layers": "vit.encoder.layer",
            "attention.q_proj": "attention.attention.query",
            "attention.v_proj": "attention.attention.value",
        },
        ["query", "value"],
    ),
    "transformers segformer": (
        {
            **{f"segformer.stages.{at}.blocks.0": f"segformer.encoder.block.{at}.0" for at in range(4)},
            **{f"segformer.stages.{at}.layer_norm": f"segformer.encoder.layer_norm.{at}" for at in range(4)},
            **{
                f"segformer.stages.{at}.patch_embeddings": f"segformer.encoder.patch_embeddings.{at}" for at in range(4)
            },
            "attention.q_proj": "attention.self.query",
            "attention.v_proj": "attention.self.value",
            "attention.k_proj": "attention.self.key",
            "attention.o_proj": "attention.output.dense",
            "attention.sequence_reduction.sequence_reduction": "attention.self.sr",
            "attention.sequence_reduction.layer_norm": "attention.self.layer_norm",
            "layernorm_before": "layer_norm_1",
            "layernorm_after": "layer_norm_2",
            "mlp.fc1": "mlp.dense1",
            "mlp.fc2": "mlp.dense2",
        },
        ["query", "value", "dense1"],
    ),
}
"""By model: how transformers 4 called its modules, and what the adapter's config targeted."""


@pytest.mark.parametrize("model", [m for m in MODELS if m.id in FORMER], ids=lambda model: model.id)
def test_an_adapter_of_transformers_4_is_read(model, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = with_peft(model)
    theirs.save_pretrained(tmp_path)
    names, targets = FORMER[model.id]
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    for new, old in names.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    save_file(tensors, file)
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": targets}))
    ours = model.made()
    LoraModel.load_adapter(ours, tmp_path)
    expected = model.run(theirs)
    assert float((model.run(ours) - expected).abs().max() / expected.abs().max()) <= TOLERANCE
    with pytest.raises(ValueError, match="No modules were targeted"):  # which is why it is worth it
        peft.PeftModel.from_pretrained(model.made(), str(tmp_path))


def test_a_tensor_that_transformers_has_moved_to_another_module_is_read(tmp_path):
    """As PEFT 0.19 and older write it with the biases of a model, for its name."""
    swin = Model("swin", swin_of_transformers, 32, {"target_modules": ["q_proj"], "bias": "all"})
    theirs = with_peft(swin)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, end = load_file(file), "relative_position_bias_table"
    for name, parameter in theirs.base_model.model.named_parameters():
        if name.endswith(end):
            parameter.data += torch.rand_like(parameter)
            path, _, _ = name.partition(".relative_position_bias.")
            tensors[f"base_model.model.{path}.self.{end}"] = parameter.detach().clone()
    save_file(tensors, file)
    ours = swin.made()
    LoraModel.load_adapter(ours, tmp_path)
    expected = swin.run(theirs)
    assert float((swin.run(ours) - expected).abs().max() / expected.abs().max()) <= TOLERANCE
