"""Tiny configurations of the transformers, and their parts of diffusers, and what they are called with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import arange, ones, rand, randint, randn, tensor, zeros

# fmt: off
MODELS: Mapping[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "AceStepConditionEncoder": (
        {"hidden_size": 32, "intermediate_size": 64, "text_hidden_dim": 32, "timbre_hidden_dim": 8,
            "num_lyric_encoder_hidden_layers": 2, "num_timbre_encoder_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
        lambda: {"text_hidden_states": randn(1, 12, 32), "text_attention_mask": ones(1, 12, dtype=torch.bool),
            "lyric_hidden_states": randn(1, 20, 32), "lyric_attention_mask": ones(1, 20, dtype=torch.bool),
            "refer_audio_acoustic_hidden_states_packed": randn(1, 20, 8), "refer_audio_order_mask": tensor([0])},
    ),
    "AceStepTransformer1DModel": (
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "in_channels": 24, "audio_acoustic_hidden_dim": 8,
            "rope_theta": 10000.0, "sliding_window": 16},
        lambda: {"hidden_states": randn(2, 8, 8), "timestep": rand(2), "timestep_r": rand(2),
            "encoder_hidden_states": randn(2, 10, 32), "context_latents": randn(2, 8, 16)},
    ),
    "AllegroTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "cross_attention_dim": 16,
            "sample_width": 8, "sample_height": 8, "sample_frames": 8, "caption_channels": 8},
        lambda: {"hidden_states": randn(2, 4, 2, 8, 8), "encoder_hidden_states": randn(2, 16, 8), "timestep":
            tensor([44, 239])},
    ),
    "AnyFlowTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        lambda: {"hidden_states": randn(1, 2, 4, 16, 16), "timestep": rand(1, 2), "r_timestep": rand(1, 2),
            "encoder_hidden_states": randn(1, 12, 16)},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 32, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32, "pos_embed_max_size":
            256},
        lambda: {"hidden_states": randn(2, 4, 32, 32), "encoder_hidden_states": randn(2, 256, 32), "timestep":
            tensor([44, 239])},
    ),
    "BriaFiboTransformer2DModel": (
        {"in_channels": 48, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads":
            2, "joint_attention_dim": 64, "text_encoder_dim": 32, "axes_dims_rope": [0, 4, 4]},
        lambda: {"hidden_states": randn(1, 256, 48), "encoder_hidden_states": randn(1, 32, 64), "img_ids":
            randn(256, 3), "txt_ids": randn(32, 3), "timestep": rand(1), "text_encoder_layers": [randn(1, 32, 32),
            randn(1, 32, 32)]},
    ),
    "BriaTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads":
            2, "joint_attention_dim": 32, "axes_dims_rope": [0, 4, 4]},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 48, 32), "img_ids": randn(16,
            3), "txt_ids": randn(48, 3), "timestep": rand(1)},
    ),
    "ChromaTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads":
            2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 8], "approximator_num_channels": 8,
            "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 48, 32), "img_ids": randn(16,
            3), "txt_ids": randn(48, 3), "timestep": rand(1)},
    ),
    "ChronoEditTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32,
            "num_layers": 2, "rope_max_seq_len": 64},
        lambda: {"hidden_states": randn(1, 16, 2, 8, 8), "timestep": tensor([44]), "encoder_hidden_states": randn(1,
            12, 32)},
    ),
    "CogVideoXTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim":
            2, "text_embed_dim": 8, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
            "max_text_seq_length": 8},
        lambda: {"hidden_states": randn(2, 1, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep":
            tensor([44, 239])},
    ),
    "CogView3PlusTransformer2DModel": (
        {"in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "out_channels": 4,
            "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 2, "pos_embed_max_size": 8, "sample_size":
            8},
        lambda: {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "original_size":
            tensor([[64, 64], [64, 64]]), "target_size": tensor([[64, 64], [64, 64]]), "crop_coords": tensor([[0,
            0], [0, 0]]), "timestep": tensor([44, 239])},
    ),
    "CogView4Transformer2DModel": (
        {"in_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 4, "out_channels": 4,
            "text_embed_dim": 8, "time_embed_dim": 8, "condition_dim": 4},
        lambda: {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep":
            tensor([44, 239]), "original_size": tensor([[64, 64], [64, 64]]), "target_size": tensor([[64, 64], [64,
            64]]), "crop_coords": tensor([[0, 0], [0, 0]])},
    ),
    "ConsisIDTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim":
            2, "text_embed_dim": 8, "num_layers": 1, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
            "max_text_seq_length": 8, "cross_attn_interval": 1, "is_train_face": True, "cross_attn_dim_head": 1,
            "cross_attn_num_heads": 1, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5, "LFE_dim_head": 8,
            "LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1,
            "LFE_num_scale": 1},
        lambda: {"hidden_states": randn(2, 1, 4, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep":
            tensor([44, 239]), "id_vit_hidden": [randn(2, 2, 2)], "id_cond": randn(2, 2)},
    ),
    "Cosmos3OmniTransformer": (
        {"head_dim": 6, "hidden_act": "relu2", "hidden_size": 12, "intermediate_size": 24, "latent_channel": 2,
            "latent_patch_size": 1, "num_attention_heads": 2, "num_hidden_layers": 2, "num_key_value_heads": 1,
            "patch_latent_dim": 2, "qk_norm_for_text": False, "rope_axes_dim": [1, 1, 1], "rope_theta": 100000000.0,
            "vocab_size": 32},
        lambda: {"input_ids": tensor([1, 2]), "text_indexes": tensor([0, 1]), "position_ids": randint(1, (3, 3)),
            "und_len": 2, "sequence_length": 3, "vision_tokens": [randn(1, 2, 1, 1, 1)], "vision_token_shapes": [(1,
            1, 1)], "vision_sequence_indexes": tensor([2]), "vision_mse_loss_indexes": tensor([2]),
            "vision_timesteps": rand(1), "vision_noisy_frame_indexes": [tensor([0])]},
    ),
    "DiTTransformer2DModel": (
        {"out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1,
            "num_embeds_ada_norm": 8, "sample_size": 8},
        lambda: {"hidden_states": randn(4, 4, 8, 8), "timestep": tensor([44, 239, 933, 760]), "class_labels":
            tensor([0, 3, 1, 0])},
    ),
    "EasyAnimateTransformer3DModel": (
        {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "mmdit_layers": 2, "num_layers": 2,
            "out_channels": 4, "patch_size": 2, "text_embed_dim": 16, "time_embed_dim": 8},
        lambda: {"hidden_states": randn(2, 4, 2, 16, 16), "timestep": tensor([44, 239]), "encoder_hidden_states":
            randn(2, 16, 16)},
    ),
    "ErnieImageTransformer2DModel": (
        {"hidden_size": 16, "num_attention_heads": 1, "num_layers": 1, "ffn_hidden_size": 16, "in_channels": 16,
            "out_channels": 16, "text_in_dim": 16, "rope_axes_dim": (8, 4, 4)},
        lambda: {"hidden_states": randn(1, 16, 16, 16), "timestep": rand(1), "text_bth": randn(1, 16, 16),
            "text_lens": tensor([16])},
    ),
    "Flux2Transformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads":
            2, "joint_attention_dim": 32, "axes_dims_rope": [4, 4, 4, 4]},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 48, 32), "img_ids": randint(4,
            (1, 16, 4)), "txt_ids": randint(48, (1, 48, 4)), "timestep": rand(1), "guidance": rand(1)},
    ),
    "Flux3Transformer2DModel": (
        {"in_channels": 4, "cond_in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_channels": 16, "axes_dims_rope": (4, 4,
            4, 4)},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 12, 32), "timestep": rand(1),
            "img_ids": randint(4, (16, 4)), "txt_ids": randint(4, (12, 4))},
    ),
    "FluxTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads":
            2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 48, 32), "pooled_projections":
            randn(1, 32), "img_ids": randn(16, 3), "txt_ids": randn(48, 3), "timestep": rand(1)},
    ),
    "GlmImageTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
            "text_embed_dim": 32, "time_embed_dim": 16, "condition_dim": 8, "prior_vq_quantizer_codebook_size": 64},
        lambda: {"hidden_states": randn(1, 4, 8, 8), "encoder_hidden_states": randn(1, 12, 32), "prior_token_id":
            tensor([44]), "prior_token_drop": tensor([False]), "timestep": tensor([44]), "target_size":
            tensor([[16.0, 16.0]]), "crop_coords": zeros(1, 2)},
    ),
    "HeliosTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "ffn_dim": 32, "num_layers": 2, "rope_dim": (4, 4, 4)},
        lambda: {"hidden_states": randn(1, 4, 2, 16, 16), "timestep": tensor([44]), "encoder_hidden_states":
            randn(1, 12, 16), "indices_hidden_states": arange(2.0).unsqueeze(0), "indices_latents_history_short":
            arange(1.0).unsqueeze(0), "indices_latents_history_mid": arange(1.0).unsqueeze(0),
            "indices_latents_history_long": arange(4.0).unsqueeze(0), "latents_history_short": randn(1, 4, 1, 16,
            16), "latents_history_mid": randn(1, 4, 1, 16, 16), "latents_history_long": randn(1, 4, 4, 16, 16)},
    ),
    "HiDreamImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
            "attention_head_dim": 8, "num_attention_heads": 4, "caption_channels": [8, 4], "text_emb_dim": 8,
            "num_routed_experts": 2, "axes_dims_rope": (4, 2, 2), "max_resolution": (32, 32), "llama_layers": (0,
            1), "force_inference_output": True},
        lambda: {"hidden_states": randn(2, 4, 32, 32), "encoder_hidden_states_t5": randn(2, 8, 8),
            "encoder_hidden_states_llama3": randn(2, 2, 8, 4), "pooled_embeds": randn(2, 8), "timesteps":
            tensor([44, 239])},
    ),
    "HunyuanDiT2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
            "num_attention_heads": 2, "cross_attention_dim": 8, "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4, "hidden_size": 16, "text_len": 4, "text_len_t5": 4},
        lambda: {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 4, 8), "text_embedding_mask":
            ones(2, 4), "encoder_hidden_states_t5": randn(2, 4, 8), "text_embedding_mask_t5": ones(2, 4),
            "timestep": rand(2), "image_meta_size": randn(2, 6), "style": tensor([0, 0]), "image_rotary_emb":
            [randn(1, 8), randn(1, 8)]},
    ),
    "HunyuanImageTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 32, "text_embed_2_dim": 32,
            "rope_axes_dim": (4, 4)},
        lambda: {"hidden_states": randn(1, 4, 4, 4), "timestep": rand(1), "encoder_hidden_states": randn(1, 12, 32),
            "encoder_attention_mask": ones(1, 12, dtype=torch.long), "encoder_hidden_states_2": randn(1, 6, 32),
            "encoder_attention_mask_2": ones(1, 6, dtype=torch.long)},
    ),
    "HunyuanVideo15Transformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
            "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 16, "text_embed_2_dim": 8,
            "image_embed_dim": 12, "rope_axes_dim": (2, 2, 4), "target_size": 16, "task_type": "t2v"},
        lambda: {"hidden_states": randn(1, 4, 1, 8, 8), "timestep": rand(1), "encoder_hidden_states": randn(1, 6,
            16), "encoder_hidden_states_2": randn(1, 4, 8), "encoder_attention_mask": ones(1, 6),
            "encoder_attention_mask_2": ones(1, 4), "image_embeds": randn(1, 3, 12)},
    ),
    "HunyuanVideoFramepackTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4), "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        lambda: {"hidden_states": randn(1, 4, 3, 4, 4), "timestep": tensor([44]), "encoder_hidden_states": randn(1,
            12, 16), "pooled_projections": randn(1, 8), "encoder_attention_mask": ones(1, 12), "guidance":
            tensor([44]), "image_embeds": randn(1, 12, 16), "indices_latents": arange(3.0), "latents_clean":
            randn(1, 4, 2, 4, 4), "indices_latents_clean": arange(2.0), "latents_history_2x": randn(1, 4, 2, 4, 4),
            "indices_latents_history_2x": arange(2.0), "latents_history_4x": randn(1, 4, 8, 4, 4),
            "indices_latents_history_4x": arange(8.0)},
    ),
    "HunyuanVideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
            "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16,
            "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        lambda: {"hidden_states": randn(1, 4, 1, 16, 16), "timestep": rand(1), "encoder_hidden_states": randn(1, 12,
            16), "pooled_projections": randn(1, 8), "encoder_attention_mask": ones(1, 12), "guidance": rand(1)},
    ),
    "Ideogram4Transformer2DModel": (
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "intermediate_size":
            32, "adaln_dim": 16, "llm_features_dim": 24, "rope_theta": 10000, "mrope_section": (2, 1, 1)},
        lambda: {"hidden_states": randn(1, 8, 16), "encoder_hidden_states": randn(1, 8, 24), "timestep": rand(1),
            "position_ids": randint(65538, (1, 8, 3)), "segment_ids": tensor([[1, 1, 1, 1, 1, 1, 1, 1]]),
            "indicator": tensor([[3, 3, 3, 3, 2, 2, 2, 2]])},
    ),
    "JoyImageEditPlusTransformer3DModel": (
        {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda: {"hidden_states": randn(1, 2, 16, 1, 2, 2), "encoder_hidden_states": randn(1, 12, 16), "timestep":
            rand(1), "shape_list": [[(1, 1, 1), (1, 1, 1)]]},
    ),
    "JoyImageEditTransformer3DModel": (
        {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2, "rope_dim_list": [4, 6, 6]},
        lambda: {"hidden_states": randn(1, 16, 1, 4, 4), "encoder_hidden_states": randn(1, 12, 16), "timestep":
            rand(1)},
    ),
    "Krea2Transformer2DModel": (
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 16,
            "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
            "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2)},
        lambda: {"hidden_states": randn(1, 4, 16), "encoder_hidden_states": randn(1, 4, 3, 16), "timestep": rand(1),
            "position_ids": randn(8, 3), "encoder_attention_mask": tensor([[True, True, True, False]])},
    ),
    "LTX2VideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads":
            2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8, "num_layers": 2, "caption_channels":
            16, "rope_double_precision": False},
        lambda: {"hidden_states": randn(2, 512, 4), "audio_hidden_states": randn(2, 9, 4), "encoder_hidden_states":
            randn(2, 16, 16), "audio_encoder_hidden_states": randn(2, 16, 16), "timestep": rand(2),
            "encoder_attention_mask": ones(2, 16, dtype=torch.bool), "num_frames": 2, "height": 16, "width": 16,
            "audio_num_frames": 9, "fps": 25.0},
    ),
    "LTXVideoTransformer3DModel": (
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
            "cross_attention_dim": 16, "num_layers": 1, "caption_channels": 16},
        lambda: {"hidden_states": randn(2, 512, 4), "encoder_hidden_states": randn(2, 16, 16), "timestep":
            tensor([44, 239]), "encoder_attention_mask": ones(2, 16, dtype=torch.bool), "num_frames": 2, "height":
            16, "width": 16},
    ),
    "LatteTransformer3DModel": (
        {"sample_size": 8, "patch_size": 2, "attention_head_dim": 4, "num_attention_heads": 2, "caption_channels":
            8, "in_channels": 4, "cross_attention_dim": 8, "out_channels": 8, "attention_bias": True,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False},
        lambda: {"hidden_states": randn(2, 4, 1, 8, 8), "encoder_hidden_states": randn(2, 8, 8), "timestep":
            tensor([44, 239]), "enable_temporal_attentions": True},
    ),
    "LongCatAudioDiTTransformer": (
        {"dit_dim": 64, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8, "text_conv": False},
        lambda: {"hidden_states": randn(1, 16, 8), "encoder_hidden_states": randn(1, 10, 32),
            "encoder_attention_mask": ones(1, 10, dtype=torch.bool), "attention_mask": ones(1, 16,
            dtype=torch.bool), "timestep": rand(1)},
    ),
    "LongCatImageTransformer2DModel": (
        {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads":
            2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": [4, 4, 8]},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 48, 32), "img_ids": randn(16,
            3), "txt_ids": randn(48, 3), "timestep": rand(1), "guidance": rand(1)},
    ),
    "Lumina2Transformer2DModel": (
        {"sample_size": 16, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 2, "axes_dim_rope": (4, 2, 2), "axes_lens":
            (128, 128, 128), "cap_feat_dim": 32},
        lambda: {"hidden_states": randn(2, 4, 16, 16), "encoder_hidden_states": randn(2, 16, 32), "timestep":
            rand(2), "encoder_attention_mask": ones(2, 16, dtype=torch.bool)},
    ),
    "LuminaNextDiT2DModel": (
        {"sample_size": 16, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 3, "num_kv_heads": 1,
            "multiple_of": 16, "learn_sigma": False, "cross_attention_dim": 32},
        lambda: {"hidden_states": randn(2, 4, 16, 16), "encoder_hidden_states": randn(2, 16, 32), "timestep":
            rand(2), "encoder_mask": ones(2, 16), "image_rotary_emb": randn(384, 384, 4), "cross_attention_kwargs":
            {}},
    ),
    "MiniMaxH3Transformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 24, "num_layers": 2, "ffn_dim": 32,
            "in_channels": 4, "audio_in_channels": 6, "text_dim": 8, "freq_dim": 8, "time_embed_hidden_dim": 24,
            "time_embed_dim": 16, "rope_freq_dim": 2},
        lambda: {"hidden_states": randn(2, 8, 16), "audio_hidden_states": randn(2, 6, 6), "encoder_hidden_states":
            randn(2, 4, 8), "timestep": rand(2), "timestep_indices": randint(2, (18,)), "token_tags": randint(3,
            (18,)), "position_ids": randn(18, 3), "video_indices": tensor([10, 11, 12, 13, 14, 15, 16, 17]),
            "audio_indices": tensor([4, 5, 6, 7, 8, 9]), "text_indices": tensor([0, 1, 2, 3])},
    ),
    "MiniMaxMusic3Transformer1DModel": (
        {"in_channels": 8, "condition_dim": 16, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8,
            "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
        lambda: {"hidden_states": randn(1, 8, 24), "encoder_hidden_states": randn(1, 24, 16), "timestep": rand(1)},
    ),
    "MochiTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16,
            "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4, "max_sequence_length": 16},
        lambda: {"hidden_states": randn(2, 4, 2, 16, 16), "encoder_hidden_states": randn(2, 16, 16), "timestep":
            tensor([44, 239]), "encoder_attention_mask": ones(2, 16, dtype=torch.bool)},
    ),
    "NucleusMoEImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
            "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4), "moe_enabled": False, "capacity_factors": [8.0,
            8.0]},
        lambda: {"hidden_states": randn(1, 16, 16), "encoder_hidden_states": randn(1, 8, 16),
            "encoder_hidden_states_mask": tensor([[1, 1, 1, 1, 1, 1, 1, 1]]), "timestep": rand(1), "img_shapes":
            [(1, 4, 4)]},
    ),
    "OmniGenTransformer2DModel": (
        {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32,
            "num_layers": 20, "pad_token_id": 0, "vocab_size": 1000, "time_step_dim": 4, "rope_scaling":
            {"long_factor": [1, 2], "short_factor": [1, 2]}},
        lambda: {"hidden_states": randn(2, 4, 8, 8), "timestep": rand(2), "input_ids": randint(10, (2, 24)),
            "input_img_latents": [randn(1, 4, 8, 8)], "input_image_sizes": {0: [[0, 16]]}, "attention_mask": ones(2,
            41, 41), "position_ids": randint(41, (2, 41))},
    ),
    "OvisImageTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)},
        lambda: {"hidden_states": randn(1, 16, 4), "encoder_hidden_states": randn(1, 48, 32), "img_ids": randn(16,
            3), "txt_ids": randn(48, 3), "timestep": rand(1)},
    ),
    "PRXTransformer2DModel": (
        {"context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": [8, 8]},
        lambda: {"hidden_states": randn(1, 16, 8, 8), "encoder_hidden_states": randn(1, 6, 16), "timestep":
            rand(1)},
    ),
    "PixArtTransformer2DModel": (
        {"sample_size": 8, "num_layers": 1, "attention_head_dim": 2, "num_attention_heads": 2,
            "cross_attention_dim": 8, "num_embeds_ada_norm": 8, "use_additional_conditions": False},
        lambda: {"hidden_states": randn(4, 4, 8, 8), "timestep": tensor([44, 239, 933, 760]),
            "encoder_hidden_states": randn(4, 8, 8), "added_cond_kwargs": {"aspect_ratio": None, "resolution":
            None}},
    ),
    "PriorTransformer": (
        {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "embedding_dim": 8, "num_embeddings":
            7},
        lambda: {"hidden_states": randn(4, 8), "timestep": 2, "proj_embedding": randn(4, 8),
            "encoder_hidden_states": randn(4, 7, 8)},
    ),
    "QwenImageTransformer2DModel": (
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
            "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
        lambda: {"hidden_states": randn(1, 16, 16), "encoder_hidden_states": randn(1, 8, 16),
            "encoder_hidden_states_mask": tensor([[1, 1, 1, 1, 1, 1, 1, 1]]), "timestep": rand(1), "img_shapes":
            [(1, 4, 4)]},
    ),
    "ReduxImageEncoder": ({"redux_dim": 8, "txt_in_features": 12}, lambda: {"x": randn(1, 4, 8)}),
    "SD3Transformer2DModel": (
        {"sample_size": 32, "patch_size": 1, "in_channels": 4, "num_layers": 4, "attention_head_dim": 8,
            "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
            "pooled_projection_dim": 64, "out_channels": 4, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: {"hidden_states": randn(2, 4, 32, 32), "encoder_hidden_states": randn(2, 154, 32),
            "pooled_projections": randn(2, 64), "timestep": tensor([44, 239])},
    ),
    "SanaTransformer2DModel": (
        {"in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2,
            "num_cross_attention_heads": 2, "cross_attention_head_dim": 4, "cross_attention_dim": 8,
            "caption_channels": 8},
        lambda: {"hidden_states": randn(2, 4, 32, 32), "encoder_hidden_states": randn(2, 8, 8), "timestep":
            tensor([44, 239])},
    ),
    "SanaVideoTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16, "sample_size": 8,
            "rope_max_seq_len": 32},
        lambda: {"hidden_states": randn(1, 16, 2, 16, 16), "encoder_hidden_states": randn(1, 12, 16), "timestep":
            tensor([44])},
    ),
    "SkyReelsV2Transformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        lambda: {"hidden_states": randn(1, 4, 2, 16, 16), "encoder_hidden_states": randn(1, 12, 16), "timestep":
            tensor([44])},
    ),
    "StableAudio3DiTModel": (
        {"io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 16, "global_cond_dim": 12,
            "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2, "num_memory_tokens": 3,
            "use_differential_attention": False},
        lambda: {"hidden_states": randn(2, 8, 16), "timestep": rand(2), "encoder_hidden_states": randn(2, 4, 16),
            "global_hidden_states": randn(2, 12)},
    ),
    "StableAudioDiTModel": (
        {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
            "num_key_value_attention_heads": 2, "out_channels": 4, "cross_attention_dim": 16, "time_proj_dim": 8,
            "global_states_input_dim": 8, "cross_attention_input_dim": 16},
        lambda: {"hidden_states": randn(1, 4, 8), "timestep": rand(1), "encoder_hidden_states": randn(1, 4, 16),
            "global_hidden_states": randn(1, 1, 8)},
    ),
    "T5FilmDecoder": (
        {"input_dims": 8, "targets_length": 4, "max_decoder_noise_time": 100.0, "d_model": 16, "num_layers": 1,
            "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda: {"encodings_and_masks": [(randn(2, 4, 16), ones(2, 4))], "decoder_input_tokens": randn(2, 4, 8),
            "decoder_noise_time": rand(2)},
    ),
    "Transformer2DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 8, "norm_num_groups": 4,
            "cross_attention_dim": 8},
        lambda: {"hidden_states": randn(1, 8, 8, 8), "encoder_hidden_states": randn(1, 4, 8)},
    ),
    "TransformerTemporalModel": (
        {"num_attention_heads": 8, "attention_head_dim": 4, "in_channels": 4, "norm_num_groups": 1},
        lambda: {"hidden_states": randn(2, 4, 32, 32), "timestep": tensor([44, 239])},
    ),
    "WanAnimateTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "latent_channels": 4,
            "out_channels": 4, "text_dim": 16, "ffn_dim": 32, "num_layers": 2, "image_dim": 16, "rope_max_seq_len":
            32, "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16}, "motion_encoder_size": 16,
            "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2},
        lambda: {"hidden_states": randn(1, 12, 21, 16, 16), "timestep": tensor([44]), "encoder_hidden_states":
            randn(1, 12, 16), "encoder_hidden_states_image": randn(1, 12, 16), "pose_hidden_states": randn(1, 4, 20,
            16, 16), "face_pixel_values": randn(1, 3, 77, 16, 16)},
    ),
    "WanTransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
            "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        lambda: {"hidden_states": randn(1, 4, 2, 16, 16), "encoder_hidden_states": randn(1, 12, 16), "timestep":
            tensor([44])},
    ),
    "WanVACETransformer3DModel": (
        {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "ffn_dim": 32, "num_layers": 4,
            "rope_max_seq_len": 32, "vace_layers": [0, 2], "vace_in_channels": 48},
        lambda: {"hidden_states": randn(1, 16, 2, 16, 16), "encoder_hidden_states": randn(1, 12, 32),
            "control_hidden_states": randn(1, 48, 2, 16, 16), "timestep": tensor([44])},
    ),
    "ZImageTransformer2DModel": (
        {"dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 1, "n_kv_heads": 2, "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]},
        lambda: {"x": [randn(16, 1, 16, 16)], "cap_feats": [randn(16, 16)], "t": rand(1)},
    ),
}
# fmt: on
"""By class: the arguments that make it, and those of its forward."""
