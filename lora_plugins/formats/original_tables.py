"""By class of diffusers, the original names of the layers of denoisers, and the layers that are in each, in order.

`*` stands for a number, as of a block.
"""

from collections.abc import Mapping

Table = Mapping[str, tuple[str, ...]]


def _layers_in(modules: Mapping[str, str], layers: Mapping[str, str]) -> Table:
    """Returns the table of modules that all have the same layers, from the original and our names of both."""
    return {
        f"{original}.{layer}": (f"{ours}.{own}",) for original, ours in modules.items() for layer, own in layers.items()
    }


def _pair(original: str, ours: str, layers: tuple[str, str] = ("mlp.0", "mlp.2")) -> Table:
    """Returns the table of a module of two linear layers, such as an embedder of time steps, from its names."""
    return {f"{original}.{layer}": (f"{ours}.linear_{n}",) for n, layer in enumerate(layers, start=1)}


_IN_OUT = ("in_layer", "out_layer")
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_QK_NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}

_FLUX_ATTENTION: Table = {
    "double_blocks.*.img_attn.qkv": tuple(f"transformer_blocks.*.{name}" for name in _QKV),
    "double_blocks.*.img_attn.proj": ("transformer_blocks.*.attn.to_out.0",),
    "double_blocks.*.img_attn.norm.query_norm": ("transformer_blocks.*.attn.norm_q",),
    "double_blocks.*.img_attn.norm.key_norm": ("transformer_blocks.*.attn.norm_k",),
    "double_blocks.*.txt_attn.qkv": tuple(f"transformer_blocks.*.{name}" for name in _ADDED_QKV),
    "double_blocks.*.txt_attn.proj": ("transformer_blocks.*.attn.to_add_out",),
    "double_blocks.*.txt_attn.norm.query_norm": ("transformer_blocks.*.attn.norm_added_q",),
    "double_blocks.*.txt_attn.norm.key_norm": ("transformer_blocks.*.attn.norm_added_k",),
    "single_blocks.*.norm.query_norm": ("single_transformer_blocks.*.attn.norm_q",),
    "single_blocks.*.norm.key_norm": ("single_transformer_blocks.*.attn.norm_k",),
}

_FLUX_BLOCKS: Table = {
    **_FLUX_ATTENTION,
    "double_blocks.*.img_mlp.0": ("transformer_blocks.*.ff.net.0.proj",),
    "double_blocks.*.img_mlp.2": ("transformer_blocks.*.ff.net.2",),
    "double_blocks.*.img_mod.lin": ("transformer_blocks.*.norm1.linear",),
    "double_blocks.*.txt_mlp.0": ("transformer_blocks.*.ff_context.net.0.proj",),
    "double_blocks.*.txt_mlp.2": ("transformer_blocks.*.ff_context.net.2",),
    "double_blocks.*.txt_mod.lin": ("transformer_blocks.*.norm1_context.linear",),
    "single_blocks.*.linear1": tuple(f"single_transformer_blocks.*.{name}" for name in (*_QKV, "proj_mlp")),
    "single_blocks.*.linear1_qkv": tuple(f"single_transformer_blocks.*.{name}" for name in _QKV),
    "single_blocks.*.linear2": ("single_transformer_blocks.*.proj_out",),
    "single_blocks.*.modulation.lin": ("single_transformer_blocks.*.norm.linear",),
}

_FLUX: Table = {
    **_FLUX_BLOCKS,
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **_pair("time_in", "time_text_embed.timestep_embedder", _IN_OUT),
    **_pair("vector_in", "time_text_embed.text_embedder", _IN_OUT),
    **_pair("guidance_in", "time_text_embed.guidance_embedder", _IN_OUT),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""Names of Flux, and the layers of diffusers' transformer that are in each, in order.

`linear1_qkv` is what ComfyUI calls the first rows of `linear1`.
"""

_STABLE_DIFFUSION_3: Table = {
    "joint_blocks.*.x_block.attn.qkv": tuple(f"transformer_blocks.*.{name}" for name in _QKV),
    "joint_blocks.*.x_block.attn.proj": ("transformer_blocks.*.attn.to_out.0",),
    "joint_blocks.*.x_block.attn2.qkv": tuple(f"transformer_blocks.*.attn2.to_{name}" for name in "qkv"),
    "joint_blocks.*.x_block.attn2.proj": ("transformer_blocks.*.attn2.to_out.0",),
    **_layers_in(
        {
            "joint_blocks.*.x_block.attn": "transformer_blocks.*.attn",
            "joint_blocks.*.x_block.attn2": "transformer_blocks.*.attn2",
        },
        {"ln_q": "norm_q", "ln_k": "norm_k"},
    ),
    "joint_blocks.*.context_block.attn.ln_q": ("transformer_blocks.*.attn.norm_added_q",),
    "joint_blocks.*.context_block.attn.ln_k": ("transformer_blocks.*.attn.norm_added_k",),
    "joint_blocks.*.x_block.mlp.fc1": ("transformer_blocks.*.ff.net.0.proj",),
    "joint_blocks.*.x_block.mlp.fc2": ("transformer_blocks.*.ff.net.2",),
    "joint_blocks.*.x_block.adaLN_modulation.1": ("transformer_blocks.*.norm1.linear",),
    "joint_blocks.*.context_block.attn.qkv": tuple(f"transformer_blocks.*.{name}" for name in _ADDED_QKV),
    "joint_blocks.*.context_block.attn.proj": ("transformer_blocks.*.attn.to_add_out",),
    "joint_blocks.*.context_block.mlp.fc1": ("transformer_blocks.*.ff_context.net.0.proj",),
    "joint_blocks.*.context_block.mlp.fc2": ("transformer_blocks.*.ff_context.net.2",),
    "joint_blocks.*.context_block.adaLN_modulation.1": ("transformer_blocks.*.norm1_context.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    **_pair("t_embedder", "time_text_embed.timestep_embedder"),
    **_pair("y_embedder", "time_text_embed.text_embedder"),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""Names of Stable Diffusion 3, and the layers of diffusers' transformer that are in each, in order."""

_CHROMA: Table = {
    **_FLUX,
    **_pair("distilled_guidance_layer.layers.*", "distilled_guidance_layer.layers.*", _IN_OUT),
}

_FLUX_2: Table = {
    **_FLUX_ATTENTION,
    "double_blocks.*.img_mlp.0": ("transformer_blocks.*.ff.linear_in",),
    "double_blocks.*.img_mlp.2": ("transformer_blocks.*.ff.linear_out",),
    "double_blocks.*.txt_mlp.0": ("transformer_blocks.*.ff_context.linear_in",),
    "double_blocks.*.txt_mlp.2": ("transformer_blocks.*.ff_context.linear_out",),
    "single_blocks.*.linear1": ("single_transformer_blocks.*.attn.to_qkv_mlp_proj",),
    "single_blocks.*.linear2": ("single_transformer_blocks.*.attn.to_out",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    **_pair("time_in", "time_guidance_embed.timestep_embedder", _IN_OUT),
    **_pair("guidance_in", "time_guidance_embed.guidance_embedder", _IN_OUT),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}

_FLUX_3: Table = _layers_in(
    {
        "content_mode_blocks.image.*": "mode_blocks.image.*",
        "content_mode_blocks.image_cond.*": "mode_blocks.image_cond.*",
        "single_blocks.*": "single_transformer_blocks.*",
        "txt_mode_blocks.*": "txt_mode_blocks.*",
    },
    {
        "q_proj": "attn.to_q",
        "k_proj": "attn.to_k",
        "v_proj": "attn.to_v",
        "attn_out": "attn.to_out.0",
        "mlp_in": "ff.linear_in",
        "mlp_out": "ff.linear_out",
    },
)

_REFINER, _REFINER_BLOCK = "context_embedder", "context_embedder.token_refiner.refiner_blocks.*"

_HUNYUAN: Table = {
    "double_blocks.*.img_attn_qkv": tuple(f"transformer_blocks.*.{name}" for name in _QKV),
    "double_blocks.*.img_attn_proj": ("transformer_blocks.*.attn.to_out.0",),
    "double_blocks.*.img_mlp.fc1": ("transformer_blocks.*.ff.net.0.proj",),
    "double_blocks.*.img_mlp.fc2": ("transformer_blocks.*.ff.net.2",),
    "double_blocks.*.img_mod.linear": ("transformer_blocks.*.norm1.linear",),
    "double_blocks.*.txt_attn_qkv": tuple(f"transformer_blocks.*.{name}" for name in _ADDED_QKV),
    "double_blocks.*.txt_attn_proj": ("transformer_blocks.*.attn.to_add_out",),
    "double_blocks.*.txt_mlp.fc1": ("transformer_blocks.*.ff_context.net.0.proj",),
    "double_blocks.*.txt_mlp.fc2": ("transformer_blocks.*.ff_context.net.2",),
    "double_blocks.*.txt_mod.linear": ("transformer_blocks.*.norm1_context.linear",),
    "single_blocks.*.modulation.linear": ("single_transformer_blocks.*.norm.linear",),
    **_layers_in(
        {"double_blocks.*": "transformer_blocks.*.attn"},
        {
            "img_attn_q_norm": "norm_q",
            "img_attn_k_norm": "norm_k",
            "txt_attn_q_norm": "norm_added_q",
            "txt_attn_k_norm": "norm_added_k",
        },
    ),
    **_layers_in({"single_blocks.*": "single_transformer_blocks.*.attn"}, _QK_NORMS),
    "single_blocks.*.linear1": _FLUX_BLOCKS["single_blocks.*.linear1"],
    "single_blocks.*.linear2": _FLUX_BLOCKS["single_blocks.*.linear2"],
    "txt_in.input_embedder": (f"{_REFINER}.proj_in",),
    **_pair("txt_in.t_embedder", f"{_REFINER}.time_text_embed.timestep_embedder"),
    **_pair("txt_in.c_embedder", f"{_REFINER}.time_text_embed.text_embedder", ("linear_1", "linear_2")),
    "txt_in.individual_token_refiner.blocks.*.self_attn_qkv": tuple(f"{_REFINER_BLOCK}.{name}" for name in _QKV),
    "txt_in.individual_token_refiner.blocks.*.self_attn_proj": (f"{_REFINER_BLOCK}.attn.to_out.0",),
    "txt_in.individual_token_refiner.blocks.*.mlp.fc1": (f"{_REFINER_BLOCK}.ff.net.0.proj",),
    "txt_in.individual_token_refiner.blocks.*.mlp.fc2": (f"{_REFINER_BLOCK}.ff.net.2",),
    "txt_in.individual_token_refiner.blocks.*.adaLN_modulation.1": (f"{_REFINER_BLOCK}.norm_out.linear",),
    "txt_in.individual_token_refiner.blocks.*.norm1": (f"{_REFINER_BLOCK}.norm1",),
    "txt_in.individual_token_refiner.blocks.*.norm2": (f"{_REFINER_BLOCK}.norm2",),
    "img_in.proj": ("x_embedder.proj",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
"""What all of Hunyuan's models have."""

_HUNYUAN_IN_COMFYUI: Table = {
    **_FLUX_BLOCKS,
    **_pair("txt_in.t_embedder", f"{_REFINER}.time_text_embed.timestep_embedder", _IN_OUT),
    **_pair("txt_in.c_embedder", f"{_REFINER}.time_text_embed.text_embedder", _IN_OUT),
    "txt_in.individual_token_refiner.blocks.*.self_attn.qkv": tuple(f"{_REFINER_BLOCK}.{name}" for name in _QKV),
    "txt_in.individual_token_refiner.blocks.*.self_attn.proj": (f"{_REFINER_BLOCK}.attn.to_out.0",),
    "txt_in.individual_token_refiner.blocks.*.mlp.0": (f"{_REFINER_BLOCK}.ff.net.0.proj",),
    "txt_in.individual_token_refiner.blocks.*.mlp.2": (f"{_REFINER_BLOCK}.ff.net.2",),
}
"""What ComfyUI calls otherwise, the blocks as it does Flux's."""

_HUNYUAN_VIDEO: Table = {
    **_HUNYUAN,
    **_pair("time_in", "time_text_embed.timestep_embedder"),
    **_pair("guidance_in", "time_text_embed.guidance_embedder"),
    **_pair("vector_in", "time_text_embed.text_embedder", _IN_OUT),
}

_HUNYUAN_VIDEO_IN_COMFYUI: Table = {
    **_HUNYUAN_IN_COMFYUI,
    **_pair("time_in", "time_text_embed.timestep_embedder", _IN_OUT),
    **_pair("guidance_in", "time_text_embed.guidance_embedder", _IN_OUT),
}

_BYT5: Table = {
    "byt5_in.layernorm": ("context_embedder_2.norm",),
    "byt5_in.fc1": ("context_embedder_2.linear_1",),
    "byt5_in.fc2": ("context_embedder_2.linear_2",),
    "byt5_in.fc3": ("context_embedder_2.linear_3",),
}

_HUNYUAN_VIDEO_1_5: Table = {
    **_layers_in(
        {"double_blocks.*": "transformer_blocks.*.attn"},
        {
            **{f"img_attn_{name}": f"to_{name}" for name in "qkv"},
            **{f"txt_attn_{name}": f"add_{name}_proj" for name in "qkv"},
        },
    ),
    **_HUNYUAN,
    **_BYT5,
    **_pair("time_in", "time_embed.timestep_embedder"),
    **_pair("time_r_in", "time_embed.timestep_embedder_r"),
    "vision_in.proj.0": ("image_embedder.norm_in",),
    **_pair("vision_in.proj", "image_embedder", ("1", "3")),
    "vision_in.proj.4": ("image_embedder.norm_out",),
}

_HUNYUAN_VIDEO_1_5_IN_COMFYUI: Table = {
    **_HUNYUAN_IN_COMFYUI,
    **_pair("time_in", "time_embed.timestep_embedder", _IN_OUT),
    **_pair("time_r_in", "time_embed.timestep_embedder_r", _IN_OUT),
}

_HUNYUAN_IMAGE: Table = {
    **_HUNYUAN,
    **_BYT5,
    **_pair("time_in", "time_guidance_embed.timestep_embedder"),
    **_pair("time_r_in", "time_guidance_embed.timestep_embedder_r"),
    **_pair("guidance_in", "time_guidance_embed.guidance_embedder"),
}

_HUNYUAN_IMAGE_IN_COMFYUI: Table = {
    **_HUNYUAN_IN_COMFYUI,
    **_pair("time_in", "time_guidance_embed.timestep_embedder", _IN_OUT),
    **_pair("time_r_in", "time_guidance_embed.timestep_embedder_r", _IN_OUT),
    **_pair("guidance_in", "time_guidance_embed.guidance_embedder", _IN_OUT),
}

_WAN_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
    "norm_k_img": "norm_added_k",
}

_WAN: Table = {
    **_layers_in(
        {
            "blocks.*.self_attn": "blocks.*.attn1",
            "blocks.*.cross_attn": "blocks.*.attn2",
            "vace_blocks.*.self_attn": "vace_blocks.*.attn1",
            "vace_blocks.*.cross_attn": "vace_blocks.*.attn2",
        },
        _WAN_ATTENTION,
    ),
    **_layers_in(
        {"blocks.*": "blocks.*", "vace_blocks.*": "vace_blocks.*"},
        {
            "ffn.0": "ffn.net.0.proj",
            "ffn.2": "ffn.net.2",
            "norm3": "norm2",
            "before_proj": "proj_in",
            "after_proj": "proj_out",
        },
    ),
    **_pair("text_embedding", "condition_embedder.text_embedder", ("0", "2")),
    **_pair("time_embedding", "condition_embedder.time_embedder", ("0", "2")),
    "time_projection.1": ("condition_embedder.time_proj",),
    "img_emb.proj.0": ("condition_embedder.image_embedder.norm1",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "img_emb.proj.4": ("condition_embedder.image_embedder.norm2",),
    "head.head": ("proj_out",),
    "blocks.*.modulation": ("blocks.*.scale_shift_table",),
    "vace_blocks.*.modulation": ("vace_blocks.*.scale_shift_table",),
    "head.modulation": ("scale_shift_table",),
}
"""Names of Wan; what it calls modulations are parameters of blocks."""

_LUMINA_BLOCKS = ("layers", "noise_refiner", "context_refiner")

_LUMINA_2: Table = {
    **{f"{blocks}.*.attention.qkv": tuple(f"{blocks}.*.{name}" for name in _QKV) for blocks in _LUMINA_BLOCKS},
    **_layers_in(
        {f"{blocks}.*": f"{blocks}.*" for blocks in _LUMINA_BLOCKS},
        {
            "attention.q_norm": "attn.norm_q",
            "attention.k_norm": "attn.norm_k",
            "attention.out": "attn.to_out.0",
            "feed_forward.w1": "feed_forward.linear_1",
            "feed_forward.w2": "feed_forward.linear_2",
            "feed_forward.w3": "feed_forward.linear_3",
            "adaLN_modulation.1": "norm1.linear",
            "attention_norm2": "norm2",
        },
    ),
    "layers.*.attention_norm1": ("layers.*.norm1.norm",),
    "noise_refiner.*.attention_norm1": ("noise_refiner.*.norm1.norm",),
    "context_refiner.*.attention_norm1": ("context_refiner.*.norm1",),
    "cap_embedder.0": ("time_caption_embed.caption_embedder.0",),
    "cap_embedder.1": ("time_caption_embed.caption_embedder.1",),
    **_pair("t_embedder", "time_caption_embed.timestep_embedder"),
    **_pair("final_layer", "norm_out", ("adaLN_modulation.1", "linear")),
}

_Z_IMAGE: Table = {
    **{
        f"{blocks}.*.attention.qkv": tuple(f"{blocks}.*.attention.to_{name}" for name in "qkv")
        for blocks in _LUMINA_BLOCKS
    },
    **_layers_in(
        {f"{blocks}.*.attention": f"{blocks}.*.attention" for blocks in _LUMINA_BLOCKS},
        {"out": "to_out.0", **_QK_NORMS},
    ),
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}


def _modulations(names: Mapping[str, str]) -> Table:
    """Returns the layers of modulations by a time step, which are called the same in both."""
    inner = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    return _layers_in(names, {layer: layer for layer in inner})


def _norms(*attentions: str) -> Table:
    """Returns the norms of queries and keys in attentions, whose own names are the same in both."""
    names = {f"transformer_blocks.*.{attention}": f"transformer_blocks.*.{attention}" for attention in attentions}
    return _layers_in(names, _QK_NORMS)


_LTX: Table = {
    "patchify_proj": ("proj_in",),
    **_modulations({"adaln_single": "time_embed"}),
    **_norms("attn1", "attn2"),
}

_LTX_2: Table = {
    **_LTX,
    **_norms("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    "audio_patchify_proj": ("audio_proj_in",),
    **_modulations(
        {
            "audio_adaln_single": "audio_time_embed",
            "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
            "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
            "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
            "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
            "prompt_adaln_single": "prompt_adaln",
            "audio_prompt_adaln_single": "audio_prompt_adaln",
        }
    ),
}

_LTX_2_CONNECTORS: Table = {
    "aggregate_embed": ("text_proj_in",),
    "audio_aggregate_embed": ("audio_text_proj_in",),
    "video_aggregate_embed": ("video_text_proj_in",),
}

_COSMOS: Table = {
    **_layers_in(
        {
            "blocks.*.self_attn": "transformer_blocks.*.attn1",
            "blocks.*.cross_attn": "transformer_blocks.*.attn2",
        },
        {
            "q_proj": "to_q",
            "k_proj": "to_k",
            "v_proj": "to_v",
            "output_proj": "to_out.0",
            **_QK_NORMS,
        },
    ),
    **_pair("blocks.*.adaln_modulation_self_attn", "transformer_blocks.*.norm1", ("1", "2")),
    **_pair("blocks.*.adaln_modulation_cross_attn", "transformer_blocks.*.norm2", ("1", "2")),
    **_pair("blocks.*.adaln_modulation_mlp", "transformer_blocks.*.norm3", ("1", "2")),
    "blocks.*.mlp.layer1": ("transformer_blocks.*.ff.net.0.proj",),
    "blocks.*.mlp.layer2": ("transformer_blocks.*.ff.net.2",),
    **_pair("final_layer.adaln_modulation", "norm_out", ("1", "2")),
    "final_layer.linear": ("proj_out",),
    "t_embedding_norm": ("time_embed.norm",),
    **_pair("t_embedder.1", "time_embed.t_embedder", ("linear_1", "linear_2")),
    "x_embedder.proj.1": ("patch_embed.proj",),
}
"""Names of Cosmos Predict 2, and of Anima, which is made of it."""

_COSMOS_IN_NET: Table = {**_COSMOS, **{f"net.{name}": ours for name, ours in _COSMOS.items()}}
"""The same, and within what their authors put around the transformer."""

_KREA_2: Table = {
    **_layers_in(
        {
            "blocks.*": "transformer_blocks.*",
            "txtfusion.layerwise_blocks.*": "text_fusion.layerwise_blocks.*",
            "txtfusion.refiner_blocks.*": "text_fusion.refiner_blocks.*",
        },
        {
            "attn.wq": "attn.to_q",
            "attn.wk": "attn.to_k",
            "attn.wv": "attn.to_v",
            "attn.wo": "attn.to_out.0",
            "attn.gate": "attn.to_gate",
            "mlp.gate": "ff.gate",
            "mlp.up": "ff.up",
            "mlp.down": "ff.down",
            "attn.qknorm.qnorm": "attn.norm_q",
            "attn.qknorm.knorm": "attn.norm_k",
            "prenorm": "norm1",
            "postnorm": "norm2",
        },
    ),
    "first": ("img_in",),
    "last.linear": ("final_layer.linear",),
    "last.norm": ("final_layer.norm",),
    "txtmlp.0": ("txt_in.norm",),
    **_pair("tmlp", "time_embed", ("0", "2")),
    "tproj.1": ("time_mod_proj",),
    **_pair("txtmlp", "txt_in", ("1", "3")),
    "txtfusion.projector": ("text_fusion.projector",),
}

_IDEOGRAM_4: Table = {
    "layers.*.attention.qkv": tuple(f"layers.*.attention.to_{name}" for name in "qkv"),
    "layers.*.attention.o": ("layers.*.attention.to_out.0",),
}

_PIXART_BLOCKS: Table = {
    "blocks.*.attn.qkv": tuple(f"transformer_blocks.*.attn1.to_{name}" for name in "qkv"),
    "blocks.*.cross_attn.kv_linear": tuple(f"transformer_blocks.*.attn2.to_{name}" for name in "kv"),
    **_layers_in(
        {"blocks.*": "transformer_blocks.*"},
        {"attn.proj": "attn1.to_out.0", "cross_attn.q_linear": "attn2.to_q", "cross_attn.proj": "attn2.to_out.0"},
    ),
    **_pair("y_embedder.y_proj", "caption_projection", ("fc1", "fc2")),
    "final_layer.linear": ("proj_out",),
}
"""What PixArt and Sana have."""

_PIXART: Table = {
    **_PIXART_BLOCKS,
    **_layers_in({"blocks.*": "transformer_blocks.*"}, {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}),
    **_pair("t_embedder", "adaln_single.emb.timestep_embedder"),
    **_pair("csize_embedder", "adaln_single.emb.resolution_embedder"),
    **_pair("ar_embedder", "adaln_single.emb.aspect_ratio_embedder"),
    "t_block.1": ("adaln_single.linear",),
    "x_embedder.proj": ("pos_embed.proj",),
}

_SANA: Table = {
    **_PIXART_BLOCKS,
    **_layers_in(
        {"blocks.*.attn": "transformer_blocks.*.attn1", "blocks.*.cross_attn": "transformer_blocks.*.attn2"}, _QK_NORMS
    ),
    **_layers_in(
        {"blocks.*.mlp": "transformer_blocks.*.ff"},
        {
            "inverted_conv.conv": "conv_inverted",
            "depth_conv.conv": "conv_depth",
            "point_conv.conv": "conv_point",
            "t_conv": "conv_temp",
        },
    ),
    **_pair("t_embedder", "time_embed.emb.timestep_embedder"),
    "t_block.1": ("time_embed.linear",),
    "x_embedder.proj": ("patch_embed.proj",),
    "attention_y_norm": ("caption_norm",),
}

_SANA_VIDEO: Table = {**_SANA, "x_embedder.proj": ("patch_embedding",)}

_MINIMAX_H3_BLOCKS = {"blocks.*": "transformer_blocks.*", "token_refiner.blocks.*": "token_refiner.refiner_blocks.*"}

_MINIMAX_H3: Table = {
    **{
        f"{original}.attn.qkv_proj": tuple(f"{ours}.{name}" for name in _QKV)
        for original, ours in _MINIMAX_H3_BLOCKS.items()
    },
    **_layers_in(
        _MINIMAX_H3_BLOCKS,
        {
            "attn.q_norm": "attn.norm_q",
            "attn.k_norm": "attn.norm_k",
            "attn.out_proj": "attn.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "norm1": "norm1",
            "norm2": "norm2",
        },
    ),
    "video_patch_proj": ("proj_in",),
    "audio_patch_proj": ("audio_proj_in",),
    "condition_proj": ("context_embedder",),
    **_pair("time_embedder", "time_embedder", ("proj_in", "proj_out")),
    "blocks.*.adaln_proj.linear": ("transformer_blocks.*.adaln_proj.linear",),
    "final_layer.norm": ("norm_out.norm",),
    "final_layer.adaln_proj.linear": ("norm_out.linear",),
    "final_layer.video_out": ("proj_out",),
    "final_layer.audio_out": ("audio_proj_out",),
}

_MOCHI: Table = {
    **{
        f"blocks.*.attn.qkv_{stream}": tuple(f"transformer_blocks.*.{name.replace('attn', 'attn1')}" for name in parts)
        for stream, parts in (("x", _QKV), ("y", _ADDED_QKV))
    },
    **_layers_in(
        {"blocks.*": "transformer_blocks.*"},
        {
            "attn.q_norm_x": "attn1.norm_q",
            "attn.k_norm_x": "attn1.norm_k",
            "attn.q_norm_y": "attn1.norm_added_q",
            "attn.k_norm_y": "attn1.norm_added_k",
            "attn.proj_x": "attn1.to_out.0",
            "attn.proj_y": "attn1.to_add_out",
            "mlp_x.w1": "ff.net.0.proj",
            "mlp_x.w2": "ff.net.2",
            "mlp_y.w1": "ff_context.net.0.proj",
            "mlp_y.w2": "ff_context.net.2",
            "mod_x": "norm1.linear",
            "mod_y": "norm1_context.linear",
        },
    ),
    **_pair("t_embedder", "time_embed.timestep_embedder"),
    **_layers_in({"t5_y_embedder": "time_embed.pooler"}, {name: name for name in ("to_kv", "to_q", "to_out")}),
    "t5_yproj": ("time_embed.caption_proj",),
    "x_embedder.proj": ("patch_embed.proj",),
    "final_layer.mod": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
    "blocks.47.mod_y": ("transformer_blocks.47.norm1_context.linear_1",),  # of the last block
}

_AURA_FLOW: Table = {
    **_layers_in(
        {
            "double_layers.*.mlpX": "joint_transformer_blocks.*.ff",
            "double_layers.*.mlpC": "joint_transformer_blocks.*.ff_context",
            "single_layers.*.mlp": "single_transformer_blocks.*.ff",
        },
        {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"},
    ),
    **_layers_in(
        {"double_layers.*.attn": "joint_transformer_blocks.*.attn"},
        {
            **{f"w2{part}": f"to_{part}" for part in "qkv"},
            **{f"w1{part}": f"add_{part}_proj" for part in "qkv"},
            "w2o": "to_out.0",
            "w1o": "to_add_out",
        },
    ),
    **_layers_in(
        {"single_layers.*.attn": "single_transformer_blocks.*.attn"},
        {**{f"w1{part}": f"to_{part}" for part in "qkv"}, "w1o": "to_out.0"},
    ),
    "double_layers.*.modX.1": ("joint_transformer_blocks.*.norm1.linear",),
    "double_layers.*.modC.1": ("joint_transformer_blocks.*.norm1_context.linear",),
    "single_layers.*.modCX.1": ("single_transformer_blocks.*.norm1.linear",),
    **_pair("t_embedder", "time_step_proj"),
    "cond_seq_linear": ("context_embedder",),
    "init_x_linear": ("pos_embed.proj",),
    "modF.1": ("norm_out.linear",),
    "final_linear": ("proj_out",),
}
"""Names of AuraFlow, and of Pony V7, which is made of it."""

_CASCADE_ATTENTION = {
    **{f"attn.to_{part}": f"to_{part}" for part in "qkv"},
    **{f"attn.in_proj.{n}": f"to_{part}" for n, part in enumerate("qkv")},
    "attn.out_proj": "to_out.0",
}
"""Layers of Stable Cascade's attentions as ComfyUI calls them, as OneTrainer does, and in diffusers."""

_STABLE_CASCADE: Table = _layers_in(
    {name: name for name in ("down_blocks.*.*.attention", "up_blocks.*.*.attention")}, _CASCADE_ATTENTION
)

TRANSFORMERS: Mapping[str, Table] = {
    "AnyFlowTransformer3DModel": _WAN,
    "AuraFlowTransformer2DModel": _AURA_FLOW,
    "ChromaTransformer2DModel": _CHROMA,
    "ChronoEditTransformer3DModel": _WAN,
    "CosmosTransformer3DModel": _COSMOS_IN_NET,
    "Flux2Transformer2DModel": _FLUX_2,
    "Flux3Transformer2DModel": _FLUX_3,
    "FluxTransformer2DModel": _FLUX,
    "HeliosTransformer3DModel": _WAN,
    "HiDreamImageTransformer2DModel": {},
    "HunyuanImageTransformer2DModel": _HUNYUAN_IMAGE,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN_VIDEO_1_5,
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN_VIDEO,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO,
    "Ideogram4Transformer2DModel": _IDEOGRAM_4,
    "Krea2Transformer2DModel": _KREA_2,
    "LTX2TextConnectors": _LTX_2_CONNECTORS,
    "LTX2VideoTransformer3DModel": _LTX_2,
    "LTXVideoTransformer3DModel": _LTX,
    "Lumina2Transformer2DModel": _LUMINA_2,
    "MiniMaxH3Transformer3DModel": _MINIMAX_H3,
    "MochiTransformer3DModel": _MOCHI,
    "PixArtTransformer2DModel": _PIXART,
    "QwenImageTransformer2DModel": {},
    "SD3Transformer2DModel": _STABLE_DIFFUSION_3,
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA_VIDEO,
    "SkyReelsV2Transformer3DModel": _WAN,
    "StableCascadeUNet": _STABLE_CASCADE,
    "WanAnimateTransformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "ZImageTransformer2DModel": _Z_IMAGE,
}
"""The tables by class of diffusers; layers that are not in one have their own names in both."""

IN_COMFYUI: Mapping[str, Table] = {
    "HunyuanImageTransformer2DModel": _HUNYUAN_IMAGE_IN_COMFYUI,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN_VIDEO_1_5_IN_COMFYUI,
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN_VIDEO_IN_COMFYUI,
    "HunyuanVideoTransformer3DModel": _HUNYUAN_VIDEO_IN_COMFYUI,
}
"""The tables of names that only ComfyUI has, where it changed the original ones."""
