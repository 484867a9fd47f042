"""The vision families of transformers, from tiny random configurations."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from torch import Tensor, nn

from benchmarks.exactness.cases import Case, strengthen

SIZE = 64

Options = dict[str, Any]
Inputs = Callable[[], dict[str, Any]]


def _same(value: int) -> Callable[[Any], Any]:
    """One value for each stage."""
    return lambda old: [value] * len(old) if isinstance(old, list | tuple) else value


def _growing(value: int) -> Callable[[Any], Any]:
    """Twice as wide at the second stage and four times from the third one on."""
    return lambda old: [value * 2 ** min(i, 2) for i in range(len(old))] if isinstance(old, list | tuple) else value


TINY: Mapping[str, Callable[[Any], Any]] = {
    "d_model": _same(32),
    "decoder_attention_heads": _same(4),
    "decoder_ffn_dim": _same(32),
    "decoder_hidden_size": _same(32),
    "decoder_layers": _same(2),
    "decoder_num_attention_heads": _same(4),
    "decoder_num_hidden_layers": _same(1),
    "decoder_intermediate_size": _same(32),
    "depths": _same(1),
    "dim": _growing(16),
    "embed_dim": _growing(16),
    "embedding_size": _same(16),
    "encoder_attention_heads": _same(4),
    "encoder_ffn_dim": _same(32),
    "encoder_layers": _same(1),
    "hidden_size": _same(32),
    "hidden_sizes": _growing(16),
    "image_size": _same(SIZE),
    "intermediate_size": _same(64),
    "max_position_embeddings": _same(64),
    "neck_hidden_sizes": _growing(16),
    "num_attention_heads": _same(4),
    "num_heads": lambda old: _growing(1)(old) if isinstance(old, list | tuple) else 4,
    "num_hidden_layers": _same(2),
    "num_key_value_heads": _same(4),
    "num_queries": _same(5),
    "patch_size": lambda old: _same(8)(old) if isinstance(old, int) else old,
    "projection_dim": _same(16),
    "vocab_size": _same(99),
}
"""What a configuration's sizes become, from their defaults; an entry that a configuration lacks is passed over."""


def tiny(config_class: type[transformers.PretrainedConfig], options: Options) -> dict[str, Any]:
    """Returns the arguments of a small configuration; nested ones are shrunk alike.

    What differs from the rule of `TINY` is in the options; a mapping for a nested configuration adds to its own.
    """
    default = config_class()
    values = {
        name: rule(getattr(default, name))
        for name, rule in TINY.items()
        if getattr(default, name, None) is not None and name not in config_class.attribute_map
    }
    for name in config_class.sub_configs:
        nested = getattr(default, name, None)
        if isinstance(nested, transformers.PretrainedConfig):
            values[name] = tiny(type(nested), {}) | {"model_type": nested.model_type}
    for name, value in options.items():
        known = values.get(name)
        extends = isinstance(value, Mapping) and isinstance(known, dict) and "model_type" not in value
        values[name] = {**known, **value} if extends else value
    return values


def image(*shape: int) -> Inputs:
    """An image, or a batch of pictures of any shape."""
    return lambda: {"pixel_values": torch.randn(shape or (1, 3, SIZE, SIZE))}


def videos(frames: int) -> Inputs:
    """A short film under the name that newer models give it."""
    return lambda: {"pixel_values_videos": torch.randn(1, frames, 3, SIZE, SIZE)}


def text() -> dict[str, Tensor]:
    """Eight words."""
    return {"input_ids": torch.arange(3, 11).unsqueeze(0), "attention_mask": torch.ones(1, 8, dtype=torch.long)}


def both() -> dict[str, Any]:
    """An image and a text."""
    return image()() | text()


def patches() -> dict[str, Any]:
    """Flattened patches of two pictures of different shape."""
    shapes = torch.tensor([[8, 8], [4, 8]])
    mask = (torch.arange(64) < shapes.prod(1, keepdim=True)).long()
    return {"pixel_values": torch.randn(2, 64, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}


def points() -> dict[str, Any]:
    """An image and a prompt of two points."""
    prompt = torch.tensor([[[[10.0, 20.0], [40.0, 30.0]]]])
    return image()() | {"input_points": prompt, "input_labels": torch.ones(1, 1, 2, dtype=torch.long)}


def mllama() -> dict[str, Any]:
    """A picture of four tiles."""
    return {
        "pixel_values": torch.randn(1, 1, 4, 3, SIZE, SIZE),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": torch.ones(1, 1, 4, dtype=torch.long),
    }


def omdet() -> dict[str, Any]:
    """An image, two classes and a task, as text."""
    words = {f"{kind}_{name}": value for kind in ("classes", "tasks") for name, value in text().items()}
    words["classes_input_ids"] = words["classes_input_ids"].repeat(2, 1)
    words["classes_attention_mask"] = words["classes_attention_mask"].repeat(2, 1)
    return image()() | words | {"classes_structure": torch.tensor([2])}


_P8: Options = {"patch_size": 8}
_LAST_THREE: Options = {"out_features": ["stage2", "stage3", "stage4"]}
_FOUR: Options = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
_DEPTH: Options = {"neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}
_RESNET: Options = {
    "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
_DETR: Options = {"backbone_config": _RESNET, "use_timm_backbone": False}
_RTDETR: Options = {
    "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32, 32], "d_model": 32, "encode_proj_layers": [2],
    "num_denoising": 0,
}  # fmt: skip
_HGNET: Options = {
    "embedding_size": 16, "stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 32, 32],
    "stage_mid_channels": [8, 8, 16, 16], "stage_out_channels": [16, 32, 32, 48], "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [2, 2, 2, 2], "hidden_sizes": [16, 32, 32, 48],
}  # fmt: skip
_SWIN: Options = {"patch_size": 4, "window_size": 2, "depths": [2, 1, 1, 1]}
_MASK_FORMER: Options = {
    "backbone_config": _SWIN | {"out_indices": [1, 2, 3, 4]},
    "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32,
    "encoder_feedforward_dim": 32, "dim_feedforward": 32, "conv_dim": 32, "mask_dim": 32,
}  # fmt: skip
_DINO_FOUR: Options = {
    "model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIZE,
    "patch_size": 8, "out_indices": [1, 2, 3, 4], "apply_layernorm": True, "reshape_hidden_states": False,
}  # fmt: skip
_DEPTH_PRO: Options = {
    "patch_size": 32, "fusion_hidden_size": 16, "intermediate_hook_ids": [1, 0], "intermediate_feature_dims": [16, 16],
    "scaled_images_feature_dims": [32, 32, 16], "use_fov_model": True,
    **{f"{part}_model_config": {"image_size": 32, "patch_size": 8} for part in ("image", "patch", "fov")},
}  # fmt: skip
_SAM: Options = {
    "vision_config": {
        "output_channels": 32, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 16,
        "mlp_dim": 64,
    },
    "prompt_encoder_config": {"hidden_size": 32, "patch_size": 8, "image_embedding_size": 8},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32, "vit_dim": 32},
}  # fmt: skip
_SAM2: Options = {
    "vision_config": {
        "backbone_config": {
            "model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64],
            "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [16, 32, 48, 64],
            "num_attention_heads_per_stage": [1, 2, 2, 2], "window_size_per_stage": [4, 4, 4, 4],
            "global_attention_blocks": [3],
        },
        "backbone_channel_list": [64, 48, 32, 16], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    },
    "prompt_encoder_config": {"hidden_size": 32, "patch_size": 16},
    "mask_decoder_config": {"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 32},
}  # fmt: skip
_OMDET: Options = {
    "backbone_config": _SWIN
    | _LAST_THREE
    | {
        "model_type": "swin",
        "embed_dim": 16,
        "image_size": SIZE,
        "num_heads": [1, 2, 4, 4],
    },
    "apply_layernorm_after_vision_backbone": False,
    "text_config": {"hidden_size": 48},
    "text_projection_in_dim": 48,
    "text_projection_out_dim": 48,
    "task_encoder_hidden_dim": 32,
    "class_embed_dim": 48,
    "d_model": 32,
    "vision_features_channels": [32, 32, 32],
    "encoder_in_channels": [32, 64, 128],
    "encoder_attention_heads": 4,
    "encoder_dim_feedforward": 32,
    "decoder_hidden_dim": 32,
    "decoder_num_heads": 4,
    "decoder_num_layers": 2,
    "decoder_dim_feedforward": 32,
}

MODELS: Mapping[str, tuple[Options, Inputs]] = {
    "AlignVisionModel": ({"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}, image()),
    "AltCLIPVisionModel": ({}, image()),
    "Aimv2VisionModel": ({}, image()),
    "BeitForSemanticSegmentation": (_FOUR, image()),
    "BitForImageClassification": ({"num_groups": 4}, image()),
    "Blip2VisionModel": ({}, image()),
    "BlipVisionModel": ({}, image()),
    "CHMv2ForDepthEstimation": (
        {"backbone_config": _FOUR | {"return_class_token": True, "reshape_hidden_states": True}, "patch_size": 8}
        | _DEPTH,
        image(),
    ),
    "CLIPForImageClassification": ({}, image()),
    "CLIPModel": ({}, both),
    "CLIPSegModel": ({"vision_config": _P8}, both),
    "CLIPSegForImageSegmentation": ({"extract_layers": [0, 1], "reduce_dim": 16, "vision_config": _P8}, both),
    "ChineseCLIPVisionModel": ({}, image()),
    "ConditionalDetrForObjectDetection": (_DETR, image()),
    "ConvNextForImageClassification": ({}, image()),
    "ConvNextV2ForImageClassification": ({}, image()),
    "CvtForImageClassification": ({}, image()),
    "DFineForObjectDetection": (
        {"backbone_config": _HGNET | _LAST_THREE, "encoder_in_channels": [32, 32, 48]} | _RTDETR,
        image(),
    ),
    "DINOv3ConvNextModel": ({}, image()),
    "DINOv3ViTModel": ({}, image()),
    "DabDetrForObjectDetection": (_DETR, image()),
    "Data2VecVisionForSemanticSegmentation": (_FOUR, image()),
    "DeformableDetrForObjectDetection": (_DETR, image()),
    "DeiTForImageClassificationWithTeacher": ({}, image()),
    "DeiTForMaskedImageModeling": ({}, image()),
    "DepthAnythingForDepthEstimation": (
        {"backbone_config": _DINO_FOUR, "reassemble_hidden_size": 32} | _DEPTH,
        image(),
    ),
    "DepthProForDepthEstimation": (_DEPTH_PRO, image(1, 3, 128, 128)),
    "DetrForObjectDetection": (_DETR, image()),
    "DetrForSegmentation": (_DETR | {"encoder_attention_heads": 8, "d_model": 64}, image()),
    "Dinov2ForImageClassification": ({}, image()),
    "Dinov2WithRegistersForImageClassification": ({}, image()),
    "DonutSwinForImageClassification": (_SWIN, image()),
    "DPTForDepthEstimation": ({"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]} | _DEPTH, image()),
    "DPTForSemanticSegmentation": ({"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]} | _DEPTH, image()),
    "EfficientLoFTRForKeypointMatching": (
        {
            "hidden_size": 32,
            "out_features": [16, 16, 24, 32],
            "stage_num_blocks": [1, 1, 1, 1],
            "num_attention_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
        },
        image(1, 2, 3, 64, 64),
    ),
    "EfficientNetForImageClassification": (
        {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320},
        image(),
    ),
    "EomtForUniversalSegmentation": ({"num_upscale_blocks": 1, "num_blocks": 1}, image()),
    "EomtDinov3ForUniversalSegmentation": ({"num_upscale_blocks": 1, "num_blocks": 1}, image()),
    "FocalNetForImageClassification": ({}, image()),
    "FocalNetForMaskedImageModeling": ({}, image()),
    "GLPNForDepthEstimation": ({}, image()),
    "GitVisionModel": ({}, image()),
    "GroundingDinoForObjectDetection": (
        {"backbone_config": _SWIN | _LAST_THREE, "num_feature_levels": 3, "encoder_layers": 1},
        both,
    ),
    "GroupViTVisionModel": ({}, image()),
    "HGNetV2ForImageClassification": (_HGNET, image()),
    "HieraForImageClassification": ({}, image()),
    "IJepaForImageClassification": ({}, image()),
    "Idefics3VisionTransformer": ({}, image()),
    "ImageGPTForImageClassification": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        lambda: {"input_ids": torch.arange(16).reshape(1, 16)},
    ),
    "InstructBlipVisionModel": ({}, image()),
    "InternVLVisionModel": ({}, image()),
    "JanusVisionModel": ({}, image()),
    "LevitForImageClassification": (
        {"hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "patch_size": 16, "image_size": 128},
        image(1, 3, 128, 128),
    ),
    "LightGlueForKeypointMatching": ({}, image(1, 2, 3, 64, 64)),
    "Llama4VisionModel": (
        {"vision_output_dim": 32, "projector_input_dim": 64, "projector_output_dim": 64, "intermediate_size": 128},
        image(),
    ),
    "LwDetrForObjectDetection": (
        {
            "backbone_config": {
                "num_hidden_layers": 4,
                "window_block_indices": [0, 2],
                "out_indices": [2, 4],
                "pretrain_image_size": 64,
            },
            "projector_scale_factors": [1.0],
            "decoder_self_attention_heads": 4,
            "decoder_cross_attention_heads": 4,
            "group_detr": 1,
            "projector_out_channels": 32,
        },
        image(),
    ),
    "MLCDVisionModel": ({}, image()),
    "Mask2FormerForUniversalSegmentation": (_MASK_FORMER, image()),
    "MaskFormerForInstanceSegmentation": ({}, image()),
    "MaskFormerSwinBackbone": ({}, image()),
    "MetaClip2VisionModel": ({}, image()),
    "MllamaVisionModel": (
        {"num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 96, "intermediate_layers_indices": [0, 1]},
        mllama,
    ),
    "MobileNetV1ForImageClassification": ({"depth_multiplier": 0.25}, image()),
    "MobileNetV2ForSemanticSegmentation": ({"depth_multiplier": 0.35}, image()),
    "MobileViTForSemanticSegmentation": (
        {"patch_size": 2, "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 32], "hidden_sizes": [16, 16, 16]},
        image(1, 3, 128, 128),
    ),
    "MobileViTV2ForSemanticSegmentation": ({"patch_size": 2, "width_multiplier": 0.5}, image(1, 3, 128, 128)),
    "OmDetTurboForObjectDetection": (_OMDET, omdet),
    "OneFormerForUniversalSegmentation": (
        _MASK_FORMER | {"text_encoder_width": 32, "text_encoder_vocab_size": 99, "task_seq_len": 8},
        lambda: image()() | {"task_inputs": torch.arange(8).reshape(1, 8)},
    ),
    "OwlViTForObjectDetection": (
        {"projection_dim": 32, "vision_config": _P8, "text_config": {"hidden_size": 32}},
        both,
    ),
    "Owlv2ForObjectDetection": ({"projection_dim": 32, "vision_config": _P8, "text_config": {"hidden_size": 32}}, both),
    "PPLCNetForImageClassification": ({}, image()),
    "PerceiverForImageClassificationConvProcessing": (
        {
            "d_model": 322,
            "num_latents": 8,
            "d_latents": 32,
            "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 1,
        },
        lambda: {"inputs": torch.randn(1, 3, 224, 224)},
    ),
    "Pix2StructVisionModel": ({}, lambda: {"flattened_patches": torch.randn(1, 16, 770).abs()}),
    "PixioModel": ({}, image()),
    "PixtralVisionModel": ({}, image()),
    "PoolFormerForImageClassification": ({}, image()),
    "PromptDepthAnythingForDepthEstimation": (
        {"backbone_config": _DINO_FOUR, "reassemble_hidden_size": 32} | _DEPTH,
        lambda: image()() | {"prompt_depth": torch.rand(1, 1, 16, 16)},
    ),
    "PvtForImageClassification": ({}, image()),
    "PvtV2ForImageClassification": ({}, image()),
    "RTDetrForObjectDetection": (
        {"backbone_config": _LAST_THREE, "encoder_in_channels": [32, 64, 64]} | _RTDETR,
        image(),
    ),
    "RTDetrV2ForObjectDetection": (
        {"backbone_config": _LAST_THREE, "encoder_in_channels": [32, 64, 64]} | _RTDETR,
        image(),
    ),
    "RegNetForImageClassification": ({}, image()),
    "ResNetForImageClassification": ({}, image()),
    "RfDetrForInstanceSegmentation": ({}, image()),
    "Sam2Model": (_SAM2, points),
    "Sam3VisionModel": ({}, image()),
    "SamHQModel": (_SAM, points),
    "SamModel": (_SAM, points),
    "SegformerForSemanticSegmentation": ({}, image()),
    "Siglip2VisionModel": ({"num_patches": 64}, patches),
    "SiglipForImageClassification": ({}, image()),
    "SiglipModel": ({}, both),
    "SmolVLMVisionTransformer": ({}, image()),
    "SuperGlueForKeypointMatching": (
        {
            "hidden_size": 32,
            "keypoint_detector_config": {"descriptor_decoder_dim": 32, "max_keypoints": 16},
            "keypoint_encoder_sizes": [8, 16, 32],
            "gnn_layers_types": ["self", "cross"],
        },
        image(1, 2, 3, 64, 64),
    ),
    "SuperPointForKeypointDetection": ({}, image()),
    "SwiftFormerForImageClassification": ({}, image()),
    "Swin2SRForImageSuperResolution": (
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 16, "patch_size": 1},
        image(1, 3, 16, 16),
    ),
    "SwinForImageClassification": (_SWIN, image()),
    "SwinForMaskedImageModeling": (_SWIN, image()),
    "Swinv2ForImageClassification": (_SWIN, image()),
    "TableTransformerForObjectDetection": (_DETR, image()),
    "TextNetForImageClassification": ({"hidden_sizes": [16, 16, 16, 32, 32], "stem_out_channels": 16}, image()),
    "TimesformerForVideoClassification": ({}, image(1, 8, 3, 64, 64)),
    "Tipsv2VisionModel": ({}, image()),
    "UperNetForSemanticSegmentation": (
        {"backbone_config": _RESNET, "auxiliary_channels": 16, "auxiliary_in_channels": 32},
        image(),
    ),
    "VJEPA2ForVideoClassification": (
        {
            "crop_size": 64,
            "frames_per_clip": 4,
            "num_pooler_layers": 1,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 2,
            "mlp_ratio": 2,
        },
        videos(4),
    ),
    "ViTForImageClassification": ({}, image()),
    "ViTForMaskedImageModeling": ({}, image()),
    "ViTMAEForPreTraining": ({}, image()),
    "ViTMSNForImageClassification": ({}, image()),
    "VideoMAEForVideoClassification": ({}, image(1, 16, 3, 64, 64)),
    "VitDetModel": ({}, image()),
    "VitMatteForImageMatting": (
        {
            "backbone_config": {"num_channels": 4, "patch_size": 16, "out_features": ["stage2"]},
            "hidden_size": 32,
            "convstream_hidden_sizes": [8, 16, 16],
            "fusion_hidden_sizes": [32, 16, 16, 16],
        },
        image(1, 4, 64, 64),
    ),
    "VitPoseForPoseEstimation": ({}, image()),
    "VivitForVideoClassification": ({}, image(1, 32, 3, 64, 64)),
    "XCLIPVisionModel": ({"num_frames": 2, "mit_hidden_size": 32}, image(2, 3, 64, 64)),
    "YolosForObjectDetection": ({}, image()),
    "ZoeDepthForDepthEstimation": (
        {
            "backbone_config": _FOUR | {"reshape_hidden_states": False},
            "bottleneck_features": 32,
            "bin_embedding_dim": 16,
            "num_relative_features": 8,
            "num_attractors": [4, 4, 2, 1],
        }
        | _DEPTH
        | {"fusion_hidden_size": 32},
        image(),
    ),
}
"""Class of transformers: options of its configuration besides `TINY`, and its inputs."""


def transformers_cases() -> list[Case]:
    """Returns all cases."""
    return [
        Case("transformers", name, partial(_build, name, options), partial(_run, inputs))
        for name, (options, inputs) in MODELS.items()
    ]


def _build(name: str, options: Options) -> nn.Module:
    model_class = getattr(transformers, name)
    model: nn.Module = model_class(model_class.config_class(**tiny(model_class.config_class, options)))
    strengthen(model)
    return model


def _run(inputs: Inputs, model: nn.Module) -> Any:
    for name in ("language_cache_class", "language_cache_prompt"):
        if hasattr(model, name):  # OmDet-Turbo keeps the embeddings of known texts, whatever becomes of its weights
            getattr(model, name).cache.clear()
    return model(**inputs())
