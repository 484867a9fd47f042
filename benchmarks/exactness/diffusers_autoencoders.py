"""Tiny configurations of the autoencoders of diffusers, and what they are called with."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import ones, randn

# fmt: off
MODELS: Mapping[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "AsymmetricAutoencoderKL": (
        {"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"], "down_block_out_channels": [2, 4],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "up_block_out_channels": [2, 4],
            "norm_num_groups": 2},
        lambda: {"sample": randn(4, 3, 32, 32), "mask": ones(4, 1, 32, 32)},
    ),
    "AutoencoderDC": (
        {"latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales":
            ((), (5,)), "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": [1, 1],
            "downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        lambda: {"sample": randn(4, 3, 32, 32)},
    ),
    "AutoencoderKL": (
        {"block_out_channels": [2, 4], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "norm_num_groups": 2},
        lambda: {"sample": randn(4, 3, 32, 32)},
    ),
    "AutoencoderKLCogVideoX": (
        {"block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2},
        lambda: {"sample": randn(4, 3, 8, 16, 16)},
    ),
    "AutoencoderKLCosmos": (
        {"latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8,
            8), "attention_resolutions": (8,), "resolution": 64, "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4},
        lambda: {"sample": randn(2, 3, 9, 32, 32)},
    ),
    "AutoencoderKLFlux2": (
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (4, 8), "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 2},
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "AutoencoderKLHunyuanImage": (
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64),
            "layers_per_block": 1, "spatial_compression_ratio": 2, "sample_size": 16},
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "AutoencoderKLHunyuanVideo": (
        {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4},
        lambda: {"sample": randn(2, 3, 9, 16, 16)},
    ),
    "AutoencoderKLHunyuanVideo15": (
        {"latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1, "spatial_compression_ratio":
            4, "temporal_compression_ratio": 2, "downsample_match_channel": False, "upsample_match_channel": False},
        lambda: {"sample": randn(1, 3, 3, 16, 16)},
    ),
    "AutoencoderKLKVAE": (
        {"channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2),
            "sample_size": 32},
        lambda: {"sample": randn(2, 3, 32, 32)},
    ),
    "AutoencoderKLKVAEVideo": (
        {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
        lambda: {"sample": randn(2, 3, 3, 16, 16)},
    ),
    "AutoencoderKLLTX2Audio": (
        {"latent_channels": 4, "base_channels": 16, "resolution": 16, "mel_bins": 16},
        lambda: {"sample": randn(2, 2, 8, 16)},
    ),
    "AutoencoderKLLTX2Video": (
        {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (16, 32, 64),
            "layers_per_block": (1, 1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1), "patch_size": 1,
            "decoder_causal": False, "decoder_spatial_padding_mode": "zeros"},
        lambda: {"sample": randn(2, 3, 9, 16, 16)},
    ),
    "AutoencoderKLLTXVideo": (
        {"latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (16, 32, 64),
            "layers_per_block": (1, 1, 1, 1), "decoder_layers_per_block": (1, 1, 1, 1),
            "decoder_spatio_temporal_scaling": (True, True, True), "decoder_inject_noise": (True, True, True,
            False), "upsample_residual": (True, True, True), "upsample_factor": (2, 2, 2), "timestep_conditioning":
            True, "patch_size": 1},
        lambda: {"sample": randn(2, 3, 9, 16, 16), "temb": randn(2)},
    ),
    "AutoencoderKLMagvit": (
        {"latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 8},
        lambda: {"sample": randn(2, 3, 9, 16, 16)},
    ),
    "AutoencoderKLMiniMaxH3": (
        {"latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "spatial_downsample_factors":
            (2, 2), "temporal_downsample_factors": (2, 2), "norm_num_groups": 8, "decoder_num_layers": 2,
            "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 8, "decoder_num_register_tokens": 2,
            "decoder_ffn_mult": 2, "latents_mean": (0.0, 0.0, 0.0, 0.0), "latents_std": (1.0, 1.0, 1.0, 1.0)},
        lambda: {"sample": randn(2, 3, 22, 8, 8)},
    ),
    "AutoencoderKLMiniMaxH3Audio": (
        {"encoder_dim": 4, "encoder_rates": (2, 2), "latent_dim": 32, "latent_channels": 8, "num_attention_heads":
            2, "decoder_dim": 16, "decoder_rates": (2, 2), "decoder_kernel_sizes": (4, 4), "resblock_kernel_sizes":
            (3, 7), "resblock_dilation_sizes": ((1, 3), (1, 3)), "latents_mean": [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0,
            0.0], "latents_std": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]},
        lambda: {"sample": randn(2, 1, 32)},
    ),
    "AutoencoderKLMochi": (
        {"latent_channels": 4, "encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32,
            32, 32, 32), "layers_per_block": (1, 1, 1, 1, 1)},
        lambda: {"sample": randn(2, 3, 7, 16, 16)},
    ),
    "AutoencoderKLQwenImage": (
        {"base_dim": 12, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]},
        lambda: {"sample": randn(1, 3, 1, 16, 16)},
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "layers_per_block": 2},
        lambda: {"sample": randn(3, 3, 32, 32), "num_frames": 3},
    ),
    "AutoencoderKLWan": (
        {"base_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        lambda: {"sample": randn(2, 3, 9, 16, 16)},
    ),
    "AutoencoderOobleck": (
        {"encoder_hidden_size": 12, "decoder_channels": 12, "decoder_input_channels": 6, "downsampling_ratios": [2,
            4], "channel_multiples": [1, 2]},
        lambda: {"sample": randn(4, 2, 24), "sample_posterior": False},
    ),
    "AutoencoderSAME": (
        {"patch_size": 4, "encoder_channels": 16, "encoder_c_mults": [1, 2], "encoder_strides": [2, 2],
            "encoder_transformer_depths": [1, 1], "latent_dim": 8, "use_differential_attention": False, "dim_heads":
            8, "ff_mult": 2},
        lambda: {"sample": randn(2, 2, 128)},
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": [32, 32], "decoder_block_out_channels": [32, 32], "num_encoder_blocks": [1,
            1], "num_decoder_blocks": [1, 1]},
        lambda: {"sample": randn(4, 3, 32, 32)},
    ),
    "ConsistencyDecoderVAE": (
        {"encoder_block_out_channels": [2, 4], "encoder_down_block_types": ["DownEncoderBlock2D",
            "DownEncoderBlock2D"], "decoder_block_out_channels": [2, 4], "decoder_down_block_types":
            ["ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"], "decoder_layers_per_block": 1,
            "decoder_norm_num_groups": 2, "encoder_norm_num_groups": 2, "decoder_up_block_types":
            ["ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"]},
        lambda: {"sample": randn(4, 3, 32, 32)},
    ),
    "Cosmos3AVAEAudioTokenizer": (
        {"sampling_rate": 16, "hop_size": 4, "enc_dim": 4, "enc_num_blocks": 1, "enc_n_fft": 8, "enc_hop_length": 2,
            "enc_latent_dim": 8, "enc_c_mults": (1,), "enc_strides": (2,), "vocoder_input_dim": 4, "dec_dim": 4,
            "dec_c_mults": (1, 2), "dec_strides": (2, 2)},
        lambda: {"sample": randn(2, 2, 16)},
    ),
    "LongCatAudioDiTVae": (
        {"channels": 16, "c_mults": [1, 2], "strides": [2], "latent_dim": 8, "encoder_latent_dim": 16,
            "downsampling_ratio": 2},
        lambda: {"sample": randn(1, 1, 32)},
    ),
    "VQModel": (
        {"block_out_channels": [8, 16], "norm_num_groups": 8, "down_block_types": ["DownEncoderBlock2D",
            "DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"]},
        lambda: {"sample": randn(4, 3, 32, 32)},
    ),
}
# fmt: on
"""By class: the arguments that make it, and those of its forward."""
