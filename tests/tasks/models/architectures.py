"""Tiny random configurations of every family of networks."""

from lora_plugins.tasks import ModelConfig

from ..conftest import HALF

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
        ["projection", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
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
        ["projection", "query", "key", "value", "dense"],
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
        [
            "conv_stem.convolution",
            "expand_1x1.convolution",
            "reduce_1x1.convolution",
            "conv_kxk.convolution",
            "conv_1x1.convolution",
            *["query", "key", "value", "dense"],
            "conv_projection.convolution",
            "fusion.convolution",
        ],
        "segmentation_head.classifier.convolution",
    ),
}


TORCHVISION = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large", "fcn_resnet50")


def config(name, classes=4, **changes):
    if name in TORCHVISION:
        return ModelConfig("torchvision", name, classes, **({"weights": "none"} | changes))
    return ModelConfig("transformers", name, classes, "none", TRANSFORMERS[name][0], HALF, HALF, **changes)
