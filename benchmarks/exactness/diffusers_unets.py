"""Tiny configurations of the UNets, ControlNets and adapters of diffusers, and what they are called with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import ones, rand, randint, randn, tensor

# fmt: off
MODELS: Mapping[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "ControlNetModel": (
        {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16),
            "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4,
            "conditioning_embedding_out_channels": (8, 8)},
        lambda: {"sample": randn(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": randn(1, 4, 8),
            "controlnet_cond": randn(1, 3, 16, 16)},
    ),
    "ControlNetUnionModel": (
        {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16),
            "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4,
            "conditioning_embedding_out_channels": (8, 8), "num_trans_channel": 8, "num_proj_channel": 8,
            "num_trans_head": 2, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 32},
        lambda: {"sample": randn(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": randn(1, 4, 8),
            "controlnet_cond": [randn(1, 3, 16, 16)], "control_type": tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]]),
            "control_type_idx": [1], "added_cond_kwargs": {"text_embeds": randn(1, 8), "time_ids": rand(1, 6)}},
    ),
    "CosmosControlNetModel": (
        {"n_controlnet_blocks": 2, "in_channels": 18, "model_channels": 32, "num_attention_heads": 2,
            "attention_head_dim": 16, "mlp_ratio": 2, "text_embed_dim": 32, "adaln_lora_dim": 4, "max_size": (4, 32,
            32), "img_context_dim_in": 32, "img_context_dim_out": 32},
        lambda: {"controls_latents": randn(1, 16, 1, 16, 16), "latents": randn(1, 16, 1, 16, 16), "timestep":
            rand(1), "encoder_hidden_states": (randn(1, 12, 32), randn(1, 4, 32)), "condition_mask": randn(1, 1, 1,
            16, 16), "conditioning_scale": 1.0, "padding_mask": ones(1, 1, 16, 16)},
    ),
    "FluxControlNetModel": (
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4,
            4, 8)},
        lambda: {"hidden_states": randn(1, 16, 16), "controlnet_cond": randn(1, 16, 16), "encoder_hidden_states":
            randn(1, 6, 32), "pooled_projections": randn(1, 32), "timestep": rand(1), "img_ids": randn(16, 3),
            "txt_ids": randn(6, 3)},
    ),
    "HunyuanDiT2DControlNetModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "transformer_num_layers": 4, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "controlnet_cond": randn(1, 4, 8, 8), "timestep": rand(1),
            "encoder_hidden_states": randn(1, 4, 8), "text_embedding_mask": ones(1, 4), "encoder_hidden_states_t5":
            randn(1, 4, 8), "text_embedding_mask_t5": ones(1, 4), "image_meta_size": rand(1, 6), "style":
            tensor([0])},
    ),
    "I2VGenXLUNet": (
        {"sample_size": 8, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types":
            ("UpBlock3D", "CrossAttnUpBlock3D"), "block_out_channels": (4, 8), "layers_per_block": 1,
            "norm_num_groups": 2, "cross_attention_dim": 8, "attention_head_dim": 4, "num_attention_heads": 2},
        lambda: {"sample": randn(1, 4, 2, 8, 8), "timestep": 5, "fps": tensor([8]), "image_latents": randn(1, 4, 2,
            8, 8), "image_embeddings": randn(1, 8), "encoder_hidden_states": randn(1, 4, 8)},
    ),
    "Kandinsky3UNet": (
        {"time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4, "block_out_channels": (32, 64),
            "cross_attention_dim": 4, "encoder_hid_dim": 16},
        lambda: {"sample": randn(1, 4, 8, 8), "timestep": 5, "encoder_hidden_states": randn(1, 6, 16),
            "encoder_attention_mask": ones(1, 6, dtype=torch.bool)},
    ),
    "QwenImageControlNetModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3,
            "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
        lambda: {"hidden_states": randn(1, 16, 16), "controlnet_cond": randn(1, 16, 16), "encoder_hidden_states":
            randn(1, 6, 16), "timestep": rand(1), "img_shapes": [(1, 4, 4)]},
    ),
    "SD3ControlNetModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
            "pooled_projection_dim": 16, "out_channels": 4},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "controlnet_cond": randn(1, 4, 8, 8), "encoder_hidden_states":
            randn(1, 6, 16), "pooled_projections": randn(1, 16), "timestep": rand(1)},
    ),
    "SanaControlNetModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
            "caption_channels": 8, "sample_size": 8},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "controlnet_cond": randn(1, 4, 8, 8), "encoder_hidden_states":
            randn(1, 4, 8), "timestep": tensor([5])},
    ),
    "SparseControlNetModel": (
        {"conditioning_channels": 3, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4,
            "conditioning_embedding_out_channels": (8, 8), "use_simplified_condition_embedding": False},
        lambda: {"sample": randn(1, 4, 2, 8, 8), "timestep": 5, "encoder_hidden_states": randn(2, 4, 8),
            "controlnet_cond": randn(1, 3, 2, 16, 16), "conditioning_mask": ones(1, 1, 2, 16, 16)},
    ),
    "StableCascadeUNet": (
        {"in_channels": 4, "out_channels": 4, "conditioning_dim": 16, "block_out_channels": (16, 16),
            "num_attention_heads": (-1, 2), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1), "up_blocks_repeat_mappers": (1, 2), "block_types_per_layer":
            (("SDCascadeResBlock", "SDCascadeTimestepBlock"), ("SDCascadeResBlock", "SDCascadeTimestepBlock",
            "SDCascadeAttnBlock")), "clip_text_pooled_in_channels": 16, "dropout": (0.1, 0.1), "switch_level":
            (False,)},
        lambda: {"sample": randn(1, 4, 16, 16), "timestep_ratio": rand(1), "clip_text_pooled": randn(1, 1, 16)},
    ),
    "T2IAdapter": (
        {"channels": (8, 16), "downscale_factor": 4, "adapter_type": "full_adapter_xl", "num_res_blocks": 1},
        lambda: {"x": randn(1, 3, 32, 32)},
    ),
    "UNet1DModel": (
        {"block_out_channels": (8, 8, 16, 16), "in_channels": 14, "out_channels": 14, "time_embedding_type":
            "positional", "use_timestep_embedding": True, "flip_sin_to_cos": False, "freq_shift": 1.0,
            "out_block_type": "OutConv1DBlock", "mid_block_type": "MidResTemporalBlock1D", "down_block_types":
            ("DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D", "DownResnetBlock1D"), "up_block_types":
            ("UpResnetBlock1D", "UpResnetBlock1D", "UpResnetBlock1D"), "act_fn": "swish"},
        lambda: {"sample": randn(4, 14, 16), "timestep": tensor([10, 10, 10, 10])},
    ),
    "UNet2DConditionModel": (
        {"block_out_channels": (4, 8), "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock2D",
            "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8,
            "attention_head_dim": 2, "layers_per_block": 1, "sample_size": 16},
        lambda: {"sample": randn(4, 4, 16, 16), "timestep": tensor([10]), "encoder_hidden_states": randn(4, 4, 8)},
    ),
    "UNet2DModel": (
        {"block_out_channels": (4, 8), "norm_num_groups": 2, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 3, "sample_size": 32},
        lambda: {"sample": randn(4, 3, 32, 32), "timestep": tensor([10])},
    ),
    "UNet3DConditionModel": (
        {"block_out_channels": (4, 8), "norm_num_groups": 4, "down_block_types": ("CrossAttnDownBlock3D",
            "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 8,
            "attention_head_dim": 2, "layers_per_block": 1, "sample_size": 16},
        lambda: {"sample": randn(4, 4, 4, 16, 16), "timestep": tensor([10]), "encoder_hidden_states": randn(4, 4,
            8)},
    ),
    "UNetControlNetXSModel": (
        {"sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types":
            ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (4, 8), "cross_attention_dim": 8,
            "num_attention_heads": 2, "norm_num_groups": 4, "upcast_attention": False, "ctrl_block_out_channels":
            [2, 4], "ctrl_max_norm_num_groups": 2, "ctrl_conditioning_embedding_out_channels": (2, 2)},
        lambda: {"sample": randn(4, 4, 16, 16), "timestep": tensor([10]), "encoder_hidden_states": randn(4, 4, 8),
            "controlnet_cond": randn(4, 3, 32, 32), "conditioning_scale": 1},
    ),
    "UNetMotionModel": (
        {"block_out_channels": (16, 32), "norm_num_groups": 16, "down_block_types": ("CrossAttnDownBlockMotion",
            "DownBlockMotion"), "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 16, "num_attention_heads": 2, "layers_per_block": 1, "sample_size": 16},
        lambda: {"sample": randn(4, 4, 4, 16, 16), "timestep": tensor([10]), "encoder_hidden_states": randn(16, 4,
            16)},
    ),
    "UNetSpatioTemporalConditionModel": (
        {"block_out_channels": (32, 64), "down_block_types": ("CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal"), "up_block_types": ("UpBlockSpatioTemporal",
            "CrossAttnUpBlockSpatioTemporal"), "cross_attention_dim": 32, "num_attention_heads": 8, "in_channels":
            4, "sample_size": 32, "projection_class_embeddings_input_dim": 96, "addition_time_embed_dim": 32},
        lambda: {"sample": randn(2, 2, 4, 32, 32), "timestep": tensor([10]), "encoder_hidden_states": randn(2, 1,
            32), "added_time_ids": rand(2, 3)},
    ),
    "UVit2DModel": (
        {"hidden_size": 16, "cond_embed_dim": 8, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 8, "vocab_size": 30, "codebook_size": 20, "in_channels": 16,
            "block_out_channels": 16, "num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "sample_size": 8},
        lambda: {"input_ids": randint(20, (1, 4, 4)), "encoder_hidden_states": randn(1, 4, 8), "pooled_text_emb":
            randn(1, 8), "micro_conds": rand(1, 5)},
    ),
}
# fmt: on
"""By class: the arguments that make it, and those of its forward."""
