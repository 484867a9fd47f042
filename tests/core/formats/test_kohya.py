"""Files of kohya's scripts and LyCORIS, both ways, against diffusers, which reads them, and LyCORIS, which writes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.formats import convert
from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.kohya import KohyaFormat
from tests.core.formats.peft_cases import moved, refused
from tests.core.formats.pipeline_cases import DIT, TEXT, TOLERANCE, UNET, parts, with_peft

PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te_", "transformer": "lora_transformer_"}


def ours(part, **fields):
    config = LoraConfig(
        **{"r": 2, "alpha": 5.0, "target_modules": part.targets, "rank_pattern": {part.targets[0]: 4}, **fields}
    )
    lora = LoraModel(part.build(), config)
    moved(lora.model)
    return lora


@parts
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_written_and_read(part, variant, tmp_path):
    lora = ours(part, variant=variant)
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    keys = [key for key in load_file(path) if key.endswith(".alpha")]
    assert all(key.startswith(PREFIX[part.name]) and key.count(".") == 1 for key in keys)
    assert part.difference(part.build(), lora.model) > 1e-3
    part.read_exactly(path, lora.model)


def test_what_we_write_is_read_by_diffusers(tmp_path):
    """As a pipeline does that is given a file of the WebUI."""
    diffusers = pytest.importorskip("diffusers")
    lora = ours(UNET)
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    model = UNET.build()
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state_dict, alphas = mixin.lora_state_dict(str(path), unet_config=model.config)
    mixin.load_lora_into_unet(state_dict, alphas, unet=model)
    assert UNET.difference(model, lora.model) <= TOLERANCE


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("trained", [[UNET], [UNET, TEXT]], ids=["unet", "unet and text encoder"])
def test_what_scripts_of_diffusers_convert_is_read(trained, use_dora, tmp_path):
    """Half of the keys of most such files keep names that no program knows, diffusers included (0.42.1)."""
    utils = pytest.importorskip("diffusers.utils")
    get_peft_model_state_dict = pytest.importorskip("peft.utils").get_peft_model_state_dict
    fields = {"lora_alpha": 2, "target_modules": ["to_q", "to_out.0", "q_proj", "out_proj"], "use_dora": use_dora}
    theirs = {part.name: with_peft(part, **fields) for part in trained}
    saved = {
        f"{name}.{key}": tensor.clone()
        for name, model in theirs.items()
        for key, tensor in utils.convert_state_dict_to_diffusers(get_peft_model_state_dict(model)).items()
    }
    converted = utils.convert_state_dict_to_kohya(utils.convert_all_state_dict_to_peft(saved))
    save_file(converted, tmp_path / "adapter.safetensors")
    read = nn.ModuleDict({part.name: part.build() for part in trained})
    LoraModel.load_adapter(read, tmp_path / "adapter.safetensors")
    for part in trained:
        assert part.difference(part.build(), theirs[part.name]) > 1e-3
        assert part.difference(read[part.name], theirs[part.name]) <= TOLERANCE


def with_lycoris(part, **options):
    """The part with a network of LyCORIS on its linear layers and convolutions, and its state dict."""
    lycoris = pytest.importorskip("lycoris")
    model = part.build()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention", "ResnetBlock2D"]})
    network = lycoris.create_lycoris(model, 1.0, linear_dim=4, linear_alpha=3, algo="lora", **options)
    network.apply_to()
    moved(network.double())
    return model, {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("options", "marks"),
    [
        pytest.param({}, ".lora_down.weight", id="plain"),
        pytest.param({"use_tucker": True, "conv_dim": 4, "conv_alpha": 2}, ".lora_mid.weight", id="three factors"),
        pytest.param({"dora_wd": True, "wd_on_output": True}, ".dora_scale", id="dora"),
        pytest.param({"rs_lora": True}, ".alpha", id="rslora"),
    ],
)
def test_what_lycoris_writes_is_read(options, marks, tmp_path):
    theirs, tensors = with_lycoris(UNET, **options)
    assert any(key.endswith(marks) for key in tensors)
    save_file(tensors, tmp_path / "adapter.safetensors")
    assert UNET.difference(UNET.build(), theirs) > 1e-3
    UNET.read_exactly(tmp_path / "adapter.safetensors", theirs)


@pytest.mark.parametrize("mid_type", [torch.bfloat16, torch.float32], ids=str)
def test_three_factors_in_half_precision_are_multiplied_in_single(mid_type, tmp_path):
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3).double()})
    weight = model["conv"].weight.detach().clone()
    up, mid, down = (torch.randn(shape).bfloat16() for shape in ((4, 2, 1, 1), (2, 2, 3, 3), (2, 3, 1, 1)))
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid.to(mid_type), "lora_down.weight": down}
    save_file({f"lora_unet_conv.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "adapter.safetensors")
    LoraModel.load_adapter(model, tmp_path / "adapter.safetensors")
    update = torch.einsum("oayx,abkl,biyx->oikl", up.double(), mid.double(), down.double())
    torch.testing.assert_close(model["conv"].weight.detach(), weight + update, rtol=0, atol=1e-6)


@parts
@pytest.mark.parametrize(
    ("prefix", "end"), [("lycoris_", "_."), ("{own}_", ".")], ids=["LyCORIS 2.2, of a model by itself", "VideoX-Fun"]
)
def test_names_may_have_an_underscore_around_them(part, prefix, end, tmp_path):
    lora = ours(part)
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    own = PREFIX[part.name]
    theirs = {
        key.replace(own, prefix.format(own=own), 1).replace(".", end, 1): each for key, each in load_file(path).items()
    }
    save_file(theirs, path)
    part.read_exactly(path, lora.model)


def test_an_underscore_of_the_layer_itself_is_kept(tmp_path):
    """As LyCORIS 2.2 writes `_conv`, beside a layer that has that name without the underscore."""
    model = nn.ModuleDict({name: nn.Conv2d(3, 4, 1) for name in ("conv", "_conv")})
    tensors = {"lora_up.weight": torch.ones(4, 2, 1, 1), "lora_down.weight": torch.ones(2, 3, 1, 1)}
    path = tmp_path / "adapter.safetensors"
    save_file({f"lycoris__conv_.{key}": tensor for key, tensor in tensors.items()}, path)
    assert [layer.name for layer in LoraModel.load_adapter(model, path).plans["default"].layers] == ["_conv"]


def test_linear_layers_are_convolutions_of_one_pixel_and_the_other_way_round(tmp_path):
    """Releases of one model differ in which of the two its projections are, as kohya's scripts know."""
    lora = ours(UNET, target_modules=["to_q", "proj_in"], rank_pattern={"to_q": 4})
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    tensors = load_file(path)
    assert {tensor.dim() for tensor in tensors.values()} == {0, 2, 4}
    forms = {0: lambda alpha: alpha, 2: lambda factor: factor[..., None, None], 4: lambda factor: factor.flatten(1)}
    save_file({key: forms[tensor.dim()](tensor).contiguous() for key, tensor in tensors.items()}, path)
    UNET.read_exactly(path, lora.model)


class TestRefused:
    def edited(self, tmp_path, change):
        path = ours(UNET).save_adapter(tmp_path / "adapter.safetensors", format="kohya")
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return path

    def test_norms_of_the_inputs(self, tmp_path, untouched):
        _, tensors = with_lycoris(UNET, dora_wd=True, wd_on_output=False)
        save_file(tensors, tmp_path / "adapter.safetensors")
        refused(UNET, tmp_path / "adapter.safetensors", untouched, "wd_on_output=False")

    @pytest.mark.parametrize(
        ("key", "method"),
        [
            ("hada_w1_a", "LoHa"),
            ("lokr_w1", "LoKr"),
            ("oft_blocks", "OFT"),
            ("on_input", r"\(IA\)\^3"),
            ("lambda_layer", "T-LoRA"),
        ],
    )
    def test_other_methods(self, key, method, tmp_path, untouched):
        path = self.edited(tmp_path, lambda tensors: tensors.update({f"lora_unet_conv_in.{key}": torch.zeros(1)}))
        refused(UNET, path, untouched, f"is of '{method}', which is another method")

    def test_a_layer_that_the_model_does_not_have(self, tmp_path, untouched):
        def change(tensors):
            for key in list(tensors):
                tensors[key.replace("conv_in", "conv_inn")] = tensors.pop(key)

        refused(UNET, self.edited(tmp_path, change), untouched, "'lora_unet_conv_inn'.*Did you mean 'conv_in'")

    def test_a_key_that_is_left_over(self, tmp_path, untouched):
        path = self.edited(tmp_path, lambda tensors: tensors.update({"lora_unet_conv_in.more": torch.zeros(1)}))
        refused(UNET, path, untouched, r"1 key .* no place: 'lora_unet_conv_in\.more'.* take those keys out")

    @pytest.mark.parametrize(
        ("key", "again"),
        [
            (".lora_down.weight", "_lora.down.weight"),
            (".dora_scale", ".lora_magnitude_vector"),
            (".b_norm", ".diff_b"),
        ],
        ids=["in another spelling", "in another form", "of another program"],
    )
    def test_a_key_that_says_it_again(self, key, again, tmp_path, untouched):
        repeated = {f"lora_unet_conv_in{end}": torch.ones(8, 1, 1, 1) for end in (key, again)}
        path = self.edited(tmp_path, lambda tensors: tensors.update({**repeated, **tensors}))
        names = sorted(repeated)
        refused(
            UNET,
            path,
            untouched,
            f"one tensor .* under several keys.* '{names[0]}', '{names[1]}'.* all but one",
        )

    def test_half_a_layer(self, tmp_path, untouched):
        path = self.edited(tmp_path, lambda tensors: tensors.pop("lora_unet_conv_in.lora_up.weight"))
        refused(UNET, path, untouched, "'lora_unet_conv_in' of the adapter has only A, alpha")

    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_alpha_that_is_no_scaling(self, alpha, tmp_path, untouched):
        path = self.edited(tmp_path, lambda tensors: tensors.update({"lora_unet_conv_in.alpha": torch.tensor(alpha)}))
        refused(UNET, path, untouched, f"The alpha of 'lora_unet_conv_in' is {alpha:g}; it has to be a positive")

    def test_a_name_with_two_meanings(self, tmp_path, untouched):
        model = nn.ModuleDict({"a_b": nn.Linear(3, 3), "a": nn.ModuleDict({"b": nn.Linear(3, 3)})})
        tensors = {"lora_unet_a_b.lora_down.weight": torch.ones(1, 3), "lora_unet_a_b.lora_up.weight": torch.ones(3, 1)}
        save_file(tensors, tmp_path / "adapter.safetensors")
        with untouched(model), pytest.raises(AdapterFileError, match=r"'lora_unet_a_b' can be 'a_b', 'a\.b'"):
            LoraModel.load_adapter(model, tmp_path / "adapter.safetensors")
        lora = LoraModel(model, LoraConfig(target_modules=["a_b", "a.b"]))
        with pytest.raises(AdapterFileError, match="have one name in this format"):
            lora.save_adapter(tmp_path / "new.safetensors", format="kohya", format_options={"component": "unet"})
        assert not (tmp_path / "new.safetensors").exists()

    def test_a_part_that_has_no_name_here(self, tmp_path):
        lora = LoraModel(nn.ModuleDict({"connectors": nn.Sequential(nn.Linear(3, 3))}), LoraConfig(r=2))
        with pytest.raises(AdapterFileError, match=r"'connectors' has no name in this format; there is .*'unet'"):
            lora.save_adapter(tmp_path / "new.safetensors", format="kohya")

    def test_a_folder_to_write(self, tmp_path):
        with pytest.raises(AdapterFileError, match=r"a file, whose name ends in \.safetensors"):
            ours(UNET).save_adapter(tmp_path / "new", format="kohya")


def wan():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1
    )


def unet_3d():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet3DConditionModel(
        block_out_channels=(4,),
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=4,
        layers_per_block=1,
    )


def qwen_image():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.QwenImageTransformer2DModel(
        num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=4, axes_dims_rope=(4, 2, 2)
    )


def z_image():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.ZImageTransformer2DModel(
        dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=4, axes_dims=[4, 2, 2]
    )


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("build", [qwen_image, z_image])
def test_names_that_a_transformer_has_in_scripts_too_get_their_prefix(build, alone, tmp_path):
    """By which diffusers reads them, and musubi-tuner."""
    loaders = pytest.importorskip("diffusers").loaders.lora_pipeline
    model = build()
    mixin = getattr(loaders, type(model).__name__.replace("Transformer2DModel", "LoraLoaderMixin"))
    lora = LoraModel(
        model if alone else nn.ModuleDict({"transformer": model}),
        LoraConfig(r=2, alpha=3.0, init="none", target_modules=["to_q", "to_out.0"]),
    )
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    tensors, converted = load_file(path), mixin.lora_state_dict(str(path))
    names = [layer.name.removeprefix("transformer.") for layer in lora.plans["default"].layers]
    assert len(converted) == 2 * len(names)
    for name in names:
        A, B = (converted[f"transformer.{name}.lora_{factor}.weight"] for factor in "AB")
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        torch.testing.assert_close(B @ A, 3 / 2 * up @ down)


@pytest.mark.parametrize(("name", "build"), [("transformer", wan), ("unet", unet_3d)])
@pytest.mark.parametrize("alone", [True, False])
def test_names_that_others_do_not_know_are_said(name, build, alone, tmp_path):
    model = build()
    parts = model if alone else nn.ModuleDict({name: model})
    lora = LoraModel(parts, LoraConfig(r=2, target_modules=["attn1.to_q"]))
    with pytest.warns(UserWarning, match=rf"layers of {type(model).__name__} .* write format='diffusers'"):
        path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    lora.unload()
    LoraModel.load_adapter(parts, path)


def test_nor_is_it_said_where_the_denoiser_is_not_adapted(tmp_path):
    model = nn.ModuleDict({"transformer": wan(), "text_encoder": TEXT.build()})
    path = LoraModel(model, LoraConfig(r=2, target_modules=["q_proj"])).save_adapter(
        tmp_path / "adapter.safetensors", format="kohya"
    )
    assert all(key.startswith("lora_te_") for key in load_file(path))


def test_an_alpha_that_single_precision_rounds_is_written_in_full(tmp_path):
    path = ours(UNET, alpha=0.1).save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    layers = LoraModel.load_adapter(UNET.build(), path).plans["default"].layers
    assert {layer.alpha for layer in layers} == {0.1}


@pytest.mark.parametrize("without", [".alpha", "conv_in.alpha"], ids=["of all layers", "of one layer"])
def test_alphas_need_not_be_there(without, tmp_path):
    lora = ours(UNET, alpha=2.0, rank_pattern={})
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    save_file({key: tensor for key, tensor in load_file(path).items() if not key.endswith(without)}, path)
    UNET.read_exactly(path, lora.model)


def test_names_of_transformers_4_are_written_and_those_of_5_read_too(tmp_path):
    lora = ours(TEXT)
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    tensors = load_file(path)
    assert all(key.startswith("lora_te_text_model_encoder_layers_0_") for key in tensors)
    theirs, options = lora.save_adapter(tmp_path / "theirs", format="diffusers"), dict.fromkeys(KohyaFormat.options)
    convert(theirs, DiffusersFormat(), {**options, "patterns": None}, path, KohyaFormat(), options)
    assert load_file(path).keys() == tensors.keys()
    save_file({key.replace("text_model_", ""): tensor for key, tensor in tensors.items()}, path)
    TEXT.read_exactly(path, lora.model)


@pytest.mark.parametrize(
    ("parts", "targets", "starts"),
    [
        (["text_encoder"], "all", {"lora_te_"}),
        (["text_encoder", "text_encoder_2"], "all", {"lora_te1_", "lora_te2_"}),
        (["text_encoder", "text_encoder_2"], ["text_encoder.fc"], {"lora_te1_"}),
        (["text_encoder_2", "text_encoder_3"], "all", {"lora_te2_", "lora_te3_"}),
    ],
    ids=["the only one", "the first of two", "the first alone, of two", "others"],
)
def test_text_encoders_are_numbered_where_there_are_several(parts, targets, starts, tmp_path):
    model = nn.ModuleDict({part: nn.ModuleDict({"fc": nn.Linear(3, 3)}) for part in parts})
    lora = LoraModel(model, LoraConfig(r=2, init="none", target_modules=targets))
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    assert {key.partition("fc")[0] for key in load_file(path)} == starts
    x, expected = torch.randn(2, 3), {part: model[part]["fc"].weight.detach().clone() for part in parts}
    lora.unload()
    LoraModel.load_adapter(model, path)
    for part in parts:
        torch.testing.assert_close(model[part]["fc"](x), x @ expected[part].T + model[part]["fc"].bias)


def test_the_t5_of_flux_is_the_third_text_encoder(tmp_path):
    """To kohya's scripts, which leave out what they do not know without a word."""
    transformers = pytest.importorskip("transformers")
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)
    )
    model = nn.ModuleDict({"text_encoder": TEXT.build(), "text_encoder_2": t5})
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["SelfAttention.q", "q_proj"]))
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    assert {key.partition("_encoder_")[0] for key in load_file(path)} == {"lora_te1_text_model", "lora_te3"}
    lora.unload()
    adapted = {layer.name.partition(".")[0] for layer in LoraModel.load_adapter(model, path).plans["default"].layers}
    assert adapted == {"text_encoder", "text_encoder_2"}


def test_a_transformer_is_called_so_whatever_its_names_are(tmp_path):
    """`lora_unet` is in front of those of all denoisers."""
    tensors = {
        f"{start}.{key}": torch.ones(1, 1)
        for start in ("lora_unet_blocks_0_self_attn_q", "lora_te_q")
        for key in ("lora_down.weight", "lora_up.weight")
    }
    tensors["lora_unet_blocks_0_self_attn_q.lora_down.weight"] = torch.ones(1, 24)
    tensors["lora_unet_blocks_0_self_attn_q.lora_up.weight"] = torch.ones(24, 1)
    save_file(tensors, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterFileError, match=r"'text_encoder', 'transformer'.*'component': 'transformer'"):
        LoraModel.load_adapter(wan(), tmp_path / "adapter.safetensors")
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q": nn.Linear(24, 24)})})])}
    )
    for each, part in ((wan(), "transformer"), (wan(), "transformer_2"), (model, "transformer"), (wan(), "unet")):
        LoraModel.load_adapter(each, tmp_path / "adapter.safetensors", format_options={"component": part})


@pytest.mark.parametrize("other", ["transformer_2", "transformer_ref"])
def test_a_file_goes_into_another_transformer_where_there_is_no_first_one(other, tmp_path):
    shapes = {"lora_down.weight": (1, 24), "lora_up.weight": (24, 1)}
    tensors = {f"lora_unet_blocks_0_self_attn_q.{key}": torch.ones(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter.safetensors")
    lora = LoraModel.load_adapter(nn.ModuleDict({other: wan()}), tmp_path / "adapter.safetensors")
    assert [layer.name for layer in lora.plans["default"].layers] == [f"{other}.blocks.0.attn1.to_q"]


@pytest.mark.parametrize("target", ["peft", "diffusers", "lora_plugins"])
def test_on_to_another_format(target, tmp_path):
    lora = ours(DIT)
    path = lora.save_adapter(tmp_path / "adapter.safetensors", format="kohya")
    second, third = DIT.build(), DIT.build()
    LoraModel.load_adapter(second, path).save_adapter(tmp_path / "other", format=target)
    LoraModel.load_adapter(third, tmp_path / "other")
    assert DIT.difference(third, lora.model) <= TOLERANCE
