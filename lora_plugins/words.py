"""Words of PEFT and of other libraries, and what to write here instead.

There is one word for a thing: what is called otherwise here is an error that says how.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

from lora_plugins.errors import near

_NOT_HERE = "That method is not here; a plugin can bring it."

FIELDS: Mapping[str, str] = {
    "lora_alpha": "It is 'alpha' here.",
    **dict.fromkeys(("rank", "lora_rank", "lora_r", "lora_dim"), "It is 'r' here."),
    "lora_dropout": "It is 'dropout' here.",
    "init_lora_weights": "It is 'init' here, the name of a start: 'kaiming' for True, 'none' for False, 'gaussian', "
    "'pissa' (with init_options={'niter': 16} for 'pissa_niter_16'), 'olora', 'orthogonal', 'eva', 'lora_ga', 'loftq'.",
    "use_dora": "Write variant='dora'.",
    **dict.fromkeys(("load_in_4bit", "bnb_4bit_quant_type"), "Write quantize='nf4'."),
    "load_in_8bit": "Write quantize='int8'.",
    "bnb_4bit_use_double_quant": "Write quantize_options={'double_quant': True}, which is the default.",
    "quantization_config": "Write quantize='nf4' or 'int8'; a model that bitsandbytes has quantized needs neither.",
    "loftq_config": "Write init='loftq' and its init_options.",
    "eva_config": "Write init='eva' and its init_options; the data go to LoraModel(..., init_data=...).",
    "lora_ga_config": "Write init='lora_ga' and its init_options; the data go to LoraModel(..., init_data=...).",
    "lora_bias": "Write bias='lora_only', which trains the biases of the adapted layers themselves.",
    "target_parameters": "Name the layer of the parameter in 'target_modules'.",
    "fan_in_fan_out": "Leave it out: the type of the layer tells.",
    "inference_mode": "Leave it out; LoraModel.set_adapter(name, trainable=False) stops training.",
    "runtime_config": "Leave it out.",
    "task_type": "Name a new head in 'modules_to_save'; PEFT adds it by itself for some task types.",
    **dict.fromkeys(
        ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        "Leave it out: the model itself is adapted, whatever it is for.",
    ),
    **dict.fromkeys(
        ("trainable_token_indices", "layer_replication", "ensure_weight_tying"),
        "There is nothing like it here.",
    ),
    **dict.fromkeys(("megatron_config", "megatron_core"), "Megatron's layers are not served here."),
    **dict.fromkeys(
        (
            "corda_config",
            "velora_config",
            "alora_invocation_tokens",
            "use_qalora",
            "qalora_group_size",
            "monteclora_config",
            "use_bdlora",
            "arrow_config",
            "kasa_config",
        ),
        _NOT_HERE,
    ),
}
"""What to write here, by the name of a field in another library's LoraConfig."""

MEMBERS: Mapping[str, str] = {
    "from_pretrained": "Call LoraModel.load_adapter(model, path).",
    "save_pretrained": "Call save_adapter(path), or save_adapter(path, format='peft') for PEFT to read it.",
    "active_adapter": "It is 'active_adapters' here.",
    "peft_config": "It is 'adapters' here.",
    "get_nb_trainable_parameters": "Call print_trainable_parameters(), or sum over model.parameters().",
    **dict.fromkeys(
        ("base_model", "get_base_model"), "The model is your own object; disable_adapter() shows its base."
    ),
    **dict.fromkeys(
        ("disable_adapter_layers", "enable_adapter_layers", "disable_lora", "enable_lora", "disable_adapters"),
        "Write: with lora.disable_adapter(): ...",
    ),
    **dict.fromkeys(
        ("get_layer_status", "get_model_status", "targeted_module_names"),
        "See 'plans', 'adapters' and 'active_adapters'.",
    ),
    "inject_adapter": "Call add_adapter(name, config).",
    "set_requires_grad": "Call set_adapter(name, trainable=True).",
    "modules_to_save": "It is a field of LoraConfig, and of 'adapters'.",
    "prepare_model_for_gradient_checkpointing": "Leave it out, and checkpoint with use_reentrant=False.",
    "create_or_update_model_card": "Call push_to_hub(repository), which writes a model card.",
    "set_adapters": "Call set_adapter([name, ...], weights=[...]).",
    "delete_adapters": "Call delete_adapter(name) for each.",
    "fuse_lora": "Call merge_adapter().",
    "unfuse_lora": "Call unmerge_adapter().",
    "load_lora_weights": "Call LoraModel.load_adapter(model, path).",
    "save_lora_weights": "Call save_adapter(path, format='diffusers').",
}
"""What to write here, by the name of a method or attribute of another library's adapted model."""

_NO_CONFIG_OF_PEFT = "This is no configuration of PEFT's: write LoraModel(model, config) in place of get_peft_model."
READ_OF_CONFIGS: Mapping[str, str] = {
    **FIELDS,
    **dict.fromkeys(("base_model_name_or_path", "peft_type", "task_type", "is_prompt_learning"), _NO_CONFIG_OF_PEFT),
    "save_pretrained": "It is saved with its adapter: lora.save_adapter(path).",
    "from_pretrained": "It is loaded with its adapter: LoraModel.load_adapter(model, path).",
}
"""What to write here, by the name of an attribute of another library's configurations."""

FUNCTIONS: Mapping[str, str] = {
    **dict.fromkeys(("get_peft_model", "inject_adapter_in_model", "PeftMixedModel"), "Write LoraModel(model, config)."),
    **dict.fromkeys(
        ("PeftModel", "PeftModelForFeatureExtraction"),
        "Write LoraModel(model, config), or LoraModel.load_adapter(model, path) for what is saved.",
    ),
    **dict.fromkeys(
        ("PeftConfig", "AutoPeftModel", "AutoPeftModelForFeatureExtraction"),
        "Write LoraModel.load_adapter(model, path).",
    ),
    "get_peft_model_state_dict": "Write lora.pack(name).",
    "set_peft_model_state_dict": "Write LoraModel.load_packed(...); for values of an adapter that is there, "
    "model.load_state_dict(values, strict=False).",
    "TaskType": "Leave it out, and name a new head in 'modules_to_save'.",
    "prepare_model_for_kbit_training": "Write LoraConfig(quantize='nf4'), and leave it out. It also turned gradient "
    "checkpointing on: model.gradient_checkpointing_enable({'use_reentrant': False}).",
    **dict.fromkeys(("get_layer_status", "get_model_status"), "See 'plans' and 'active_adapters' of a LoraModel."),
    "hotswap_adapter": "Write lora.swap_adapter(name, path).",
    **dict.fromkeys(("LoftQConfig", "EvaConfig", "LoraGAConfig"), "Write init='...' and its init_options."),
    **dict.fromkeys(
        ("initialize_lora_eva_weights", "get_eva_state_dict", "preprocess_loraga"),
        "Write LoraModel(model, config, init_data=InitData(batches)), with init='eva' or 'lora_ga'.",
    ),
    "replace_lora_weights_loftq": "Write init='loftq' with quantize='nf4', on the float model.",
    "create_loraplus_optimizer": "Give LoraCallback its loraplus_lr_ratio. Without a Trainer, write "
    "parameter_groups(module, lr=..., loraplus_lr_ratio=16), which is beside it.",
    "create_lorafa_optimizer": "There is nothing like it here: A and B are both trained.",
    "rescale_adapter_scale": "Write lora.set_adapter(names, weights=[...]).",
    "load_peft_weights": "Write LoraModel.load_adapter(model, path).",
    "prepare_model_for_compiled_hotswap": "Leave it out, and begin with an adapter of the highest rank (its "
    "target_rank): lora.swap_adapter(name, path) compiles nothing again.",
    **dict.fromkeys(
        ("LoraRuntimeConfig", "disable_input_dtype_casting", "cast_mixed_precision_params"),
        "Leave it out: A and B are float32 at least, and the products in the type of autocast.",
    ),
}
"""By the name of a function or class of PEFT, what to write here."""

ARGUMENTS: Mapping[str, str] = {
    "model_id": "It is 'path' here.",
    "peft_config": "It is 'config' here.",
    "save_directory": "It is 'path' here.",
    "repo_id": "It is 'repository' here.",
    "commit_message": "It is 'message' here.",
    "selected_adapters": "It is 'adapter_name' here, one for each call.",
    "adapter_name": "Where several may be named, it is 'adapter_names' here.",
    "adapter_names": "Say which act with set_adapter(names) before; where one is named, it is 'adapter_name' here.",
    "safe_merge": "Leave it out: a merge is always checked, and 'max_error' says what it may lose.",
    "inference_mode": "It is 'trainable' here: set_adapter(name, trainable=False).",
    "is_trainable": "Leave it out: what is loaded can be trained; set_adapter(name, trainable=False) stops it.",
    "torch_device": "Leave it out: an adapter is where its layer is.",
    "key_mapping": "Leave it out: former names of transformers are known. Others are told by the error.",
    "revision": "It is a part of the path: hf://owner/name@revision.",
    "subfolder": "It is a part of the path: hf://owner/name/folder.",
    **dict.fromkeys(("token", "use_auth_token"), "Log in first: `hf auth login`."),
    "svd_rank": "It is 'rank' here.",
    "path_initial_model_for_weight_conversion": "Leave it out: format='peft' writes an adapter of the untouched base.",
    **dict.fromkeys(
        (
            "progressbar",
            "autocast_adapter_dtype",
            "ephemeral_gpu_offload",
            "low_cpu_mem_usage",
            "safe_serialization",
            "save_embedding_layers",
            "is_main_process",
            "svd_clamp",
            "svd_full_matrices",
            "svd_driver",
            "max_shard_size",
        ),
        "Leave it out.",
    ),
}
"""What to write here, by the name of an argument of another library's methods."""


STORAGES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "4bit",
            "4-bit",
            "4bits",
            "4",
            "int4",
            "fp4",
            "q4",
            "qlora",
            "bnb_4bit",
            "load_in_4bit",
            "bitsandbytes",
            "bnb",
        ),
        "4 bits are 'nf4' here.",
    ),
    **dict.fromkeys(
        ("8bit", "8-bit", "8bits", "8", "uint8", "fp8", "float8", "q8", "load_in_8bit"),
        "8 bits are 'int8' here.",
    ),
    **dict.fromkeys(("none", "no", "false", "float", "float32"), "Leave it out, or write None, for a float base."),
}
"""By what others call a way of storing a base, in small letters, what to write here."""


INITS: Mapping[str, str] = {
    **dict.fromkeys(("true", "default", "lora", "zero", "zeros"), "It is 'kaiming' here."),
    **dict.fromkeys(("false", "random"), "It is 'none' here."),
    **dict.fromkeys(("normal", "diffusers"), "It is 'gaussian' here."),
    **{f"pissa_niter_{n}": f"Write init='pissa', init_options={{'niter': {n}}}." for n in (1, 2, 4, 8, 16, 32, 64)},
    "dora": "Write variant='dora'.",
    "rslora": "Write use_rslora=True.",
    **dict.fromkeys(("corda", "mica"), _NOT_HERE),
}
"""By what others call a start of A and B, in small letters, what to write here."""

VARIANTS: Mapping[str, str] = {
    "rslora": "Write use_rslora=True.",
    "qlora": "Write quantize='nf4'.",
    "lora+": "Give LoraCallback its loraplus_lr_ratio.",
    **{init: f"Write init={init!r}." for init in ("pissa", "olora", "loftq", "eva", "lora_ga", "orthogonal")},
    **dict.fromkeys(("adalora", "alora", "boft", "ia3", "kasa", "loha", "lokr", "oft", "qalora", "vera"), _NOT_HERE),
}
"""By what others call a variant, in small letters, what to write here."""


def said_of(name: str, words: Mapping[str, str], known: Iterable[str]) -> str:
    """Returns what a table here says to write instead of a name that does not exist, or else the near matches of it."""
    return words[name] if name in words else near(name, known)


def said_of_member(name: str, owner: object) -> str:
    """Returns what to write instead of an attribute that an object or class lacks; empty for a private one."""
    public = [each for each in dir(owner) if not each.startswith("_")]
    return "" if name.startswith("_") else said_of(name, MEMBERS, public)


class Told(type):
    """A class that names what to write instead of an attribute that others have."""

    if not TYPE_CHECKING:  # a type checker shall go on to find what does not exist

        def __getattr__(cls, name: str) -> NoReturn:
            raise AttributeError(f"{cls.__name__} has no attribute {name!r}. {said_of_member(name, cls)}".rstrip())
