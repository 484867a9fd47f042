"""Changes of biases and norms beside A and B: compared with diffusers, and with what is added by hand."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError
from lora_plugins.formats import convert
from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.original_names import original_places
from lora_plugins.formats.peft import PeftFormat
from tests.core.formats.peft_cases import (
    BY_ID,
    LINEAR,
    TENSORS,
    difference,
    edit_config,
    effect,
    read_by_peft,
    read_exactly,
    refused,
    with_peft,
)
from tests.core.formats.peft_cases import TOLERANCE as PEFT_TOLERANCE
from tests.core.formats.pipeline_cases import TOLERANCE, UNET, Part
from tests.core.formats.test_original_names import FLUX, flux


def wan():
    diffusers = pytest.importorskip("diffusers")
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
        image_dim=8,
        added_kv_proj_dim=24,
    )


def wan_output(model):
    latents, words, images = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 3, 8)
    return model(latents.double(), torch.tensor([3]), words.double(), images.double()).sample


WAN = Part("transformer", wan, wan_output, [])


def originals(part):
    """By module of a part, its only original name that is of that module alone; its own name where it has none."""
    model = part.build()
    names = {place.names[0]: name for name, place in original_places(model).items() if len(place.names) == 1}
    return {name: names.get(name, name) for name, _ in model.named_modules() if name}


def norm_names(part):
    """The modules with a weight of one dimension."""
    modules = part.build().named_modules()
    return [name for name, each in modules if getattr(getattr(each, "weight", None), "ndim", 0) == 1]


def of_comfy(part, path, *, norms):
    """Writes what ComfyUI's LoraSave does of a model of Wan, and returns what it adds to biases and norms.

    Args:
        part: The part.
        path: The file.
        norms: Whether norms change, which diffusers leaves out; else their changes are zero, as in most files.
    """
    torch.manual_seed(1)
    names = originals(part)
    file, changes = {}, {}
    for name, module in part.build().named_modules():
        if isinstance(module, nn.Linear):
            start = f"diffusion_model.{names[name]}"
            A, B = torch.randn(2, module.in_features).double(), torch.randn(module.out_features, 2).double()
            if name == "proj_out":  # whose rank is too low for two factors, as in those of lightx2v
                changes[f"{name}.weight"] = f"{start}.diff", module.weight
            else:
                file |= {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B}
            if "self_attn" in start or "ffn" in start:
                file[f"{start}.alpha"] = torch.tensor(1.0)
            changes[f"{name}.bias"] = f"{start}.diff_b", module.bias
    for name in norm_names(part):
        kinds = {"weight": "diff", "bias": "diff_b"}
        for kind, tensor in part.build().get_submodule(name).named_parameters():
            changes[f"{name}.{kind}"] = f"diffusion_model.{names[name]}.{kinds[kind]}", tensor
    for name, (key, tensor) in changes.items():
        moves = norms or not any(name.startswith(f"{norm}.") for norm in norm_names(part))
        file[key] = torch.randn(tensor.shape).double() if moves else torch.zeros_like(tensor)
    save_file(file, path)
    return {name: file[key] for name, (key, _) in changes.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def test_a_file_of_comfy_for_wan_is_what_diffusers_reads(path):
    of_comfy(WAN, path, norms=False)
    mixin = pytest.importorskip("diffusers").loaders.WanLoraLoaderMixin
    theirs = WAN.build()
    mixin.load_lora_into_transformer(mixin.lora_state_dict(str(path)), theirs)
    assert WAN.difference(WAN.build(), theirs) > 1e-3
    WAN.read_exactly(path, theirs)


def test_a_file_of_comfy_adds_to_norms_and_biases(path):
    changes = of_comfy(WAN, path, norms=True)
    assert {"blocks.1.norm2.bias", "blocks.0.attn2.norm_added_k.weight"} < changes.keys()
    model, base = WAN.build(), WAN.build().state_dict()
    lora = LoraModel.load_adapter(model, path)
    for name, change in changes.items():
        assert torch.equal(model.get_parameter(name), base[name] + change), name
    assert {*lora.plans["default"].saved_in_place} == changes.keys()


def test_a_control_adapter_of_flux_is_what_diffusers_reads(path):
    """Those of Black Forest Labs have biases of B, and norms that take the place of the model's."""
    loaders = pytest.importorskip("diffusers.loaders.lora_pipeline")
    with torch.device("meta"):
        model = flux()
    file, seen = {}, set()
    for name, place in original_places(model).items():
        modules = [model.get_submodule(each) for each in place.names]
        if name.endswith("linear1_qkv") or not seen.isdisjoint(place.names):
            continue
        seen |= {*place.names}
        rows = sum(len(module.weight) for module in modules)
        if isinstance(modules[0], nn.Linear):
            factors = {"A.weight": torch.ones(2, 1), "B.weight": torch.randn(rows, 2), "B.bias": torch.randn(rows)}
            file |= {f"{name}.lora_{factor}": tensor for factor, tensor in factors.items()}
        else:
            file[f"{name}.scale"] = torch.randn(rows)
    save_file(file, path)
    converted = loaders.FluxLoraLoaderMixin.lora_state_dict(str(path))
    with pytest.warns(UserWarning, match="no alpha"):
        found = DiffusersFormat().load(path, model, DiffusersFormat.options)
    ours = {f"{name}.lora_B.bias": layer.bias for name, layer in found.layers.items()} | found.values
    assert len(found.values) == 4 * 19 + 2 * 38
    for name, tensor in ours.items():
        assert torch.equal(tensor, converted.pop(f"transformer.{name}")), name
    assert {key.rpartition(".lora_")[2] for key in converted} == {"A.weight", "B.weight"}


def test_a_norm_of_flux_takes_the_place_of_the_model_s(path):
    tensors = {"lora_A.weight": torch.ones(1, 4), "lora_B.weight": torch.ones(16, 1), "lora_B.bias": torch.ones(16)}
    value = torch.randn(8).double()
    file = {f"img_in.{end}": tensor.double() for end, tensor in tensors.items()}
    save_file({**file, "single_blocks.1.norm.key_norm.scale": value}, path)
    model, base = FLUX.build(), FLUX.build()
    with pytest.warns(UserWarning, match="no alpha"):
        LoraModel.load_adapter(model, path)
    assert torch.equal(model.single_transformer_blocks[1].attn.norm_k.weight, value)
    assert torch.equal(model.x_embedder.bias, base.x_embedder.bias + 1)


@pytest.mark.parametrize(
    ("start", "names"),
    [
        ("diffusion_model.", ["head.modulation", "blocks.1.modulation", "blocks.0.self_attn.q"]),
        ("lora_unet_", ["head_modulation", "blocks_1_modulation", "blocks_0_self_attn_q"]),
        ("transformer.", ["scale_shift_table", "blocks.1.scale_shift_table", "blocks.0.attn1.to_q"]),
    ],
    ids=["dots", "underscores", "names of diffusers"],
)
def test_a_modulation_of_wan_is_a_parameter(start, names, path):
    base = WAN.build().state_dict()
    own = ["scale_shift_table", "blocks.1.scale_shift_table"]
    changes = {name: torch.randn_like(base[name]) for name in own}
    file = {f"{start}{key}.diff": changes[name] for key, name in zip(names, own, strict=False)}
    file |= {
        f"{start}{names[2]}.lora_down.weight": torch.ones(1, 24),
        f"{start}{names[2]}.lora_up.weight": torch.ones(24, 1),
    }
    save_file(file, path)
    model = WAN.build()
    lora = LoraModel.load_adapter(model, path, format_options={"component": "transformer"})
    for name, change in changes.items():
        assert torch.equal(model.get_parameter(name), base[name] + change), name
    assert {*lora.plans["default"].saved_in_place} == {*own}


@pytest.mark.parametrize("start", ["unet.conv_in", "lora_unet_conv_in"], ids=["diffusers", "kohya"])
class TestShapesOfWeights:
    """To which ComfyUI enlarges a smaller weight by zeros, as that of `patch_embedding` for control adapters."""

    def tensors(self, start, inputs, shape):
        tensors = {"lora_down.weight": torch.ones(2, inputs, 3, 3), "lora_up.weight": torch.ones(8, 2, 1, 1)}
        tensors |= {"reshape_weight": torch.tensor(shape), "alpha": torch.tensor(2.0)}
        return {f"{start}.{key}": tensor for key, tensor in tensors.items()}

    def test_a_model_of_that_shape(self, start, path):
        save_file(self.tensors(start, 4, [8, 4, 3, 3]), path)
        model, base = UNET.build(), UNET.build().conv_in.weight
        LoraModel.load_adapter(model, path)
        assert torch.allclose(model.conv_in.weight, base + 2)

    @pytest.mark.parametrize(
        ("inputs", "shape", "match"),
        [
            pytest.param(9, [8, 9, 3, 3], r"has A \(2, 9, 3, 3\).*this model needs \(2, 4, 3, 3\)", id="smaller model"),
            pytest.param(4, [8, 9, 3, 3], r"shape \(8, 9, 3, 3\).*these are no A", id="not that of A and B"),
            pytest.param(4, 8, r"these are no A", id="a number"),
        ],
    )
    def test_what_does_not_fit(self, inputs, shape, match, start, path, untouched):
        save_file(self.tensors(start, inputs, shape), path)
        model = UNET.build()
        with untouched(model), pytest.raises(AdapterFileError, match=match):
            LoraModel.load_adapter(model, path)


@pytest.mark.parametrize("ends", [("diff", "diff_b"), ("w_norm", "b_norm")], ids=["diff", "norm"])
def test_a_file_of_lycoris_adds_to_norms(ends, path):
    base = UNET.build().state_dict()
    start = "lora_unet_mid_block_resnets_0"
    changes = {f"{start}_norm1.{end}": torch.randn(16).double() for end in ends}
    factors = {"lora_down.weight": torch.ones(1, 16, 3, 3), "lora_up.weight": torch.ones(16, 1, 1, 1)}
    save_file({**{f"{start}_conv1.{end}": each.double() for end, each in factors.items()}, **changes}, path)
    model = UNET.build()
    LoraModel.load_adapter(model, path)
    for kind, change in zip(("weight", "bias"), changes.values(), strict=True):
        name = f"mid_block.resnets.0.norm1.{kind}"
        assert torch.equal(model.get_parameter(name), base[name] + change)


@pytest.mark.parametrize("end", ["diff", "diff_b"])
def test_a_layer_whose_name_is_the_end_of_another_s(end, path):
    """As `proj_out` of Flux is, whose last bias a file may change beside adapted layers `proj_out` of blocks."""
    case = LINEAR
    change = torch.randn(6, 6)[: 6 if end == "diff" else 1].squeeze(0).double()
    factors = {"lora_down.weight": torch.ones(1, 6), "lora_up.weight": torch.ones(6, 1)}
    file = {f"lycoris_inner_fc.{key}": tensor.double() for key, tensor in factors.items()}
    save_file({**file, f"lycoris_fc.{end}": change}, path)
    model, base = case.build(), case.build().state_dict()
    lora = LoraModel.load_adapter(model, path)
    own = "fc.weight" if end == "diff" else "fc.bias"
    assert lora.plans["default"].saved_in_place == (own,)
    assert torch.equal(model.get_parameter(own), base[own] + change)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # by PEFT 0.21.2, of its own biases of B
class TestPeft:
    @pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # by PEFT, of Conv1D
    @pytest.mark.parametrize("bias", ["none", "all"])
    @pytest.mark.parametrize(
        ("case", "targets"),
        [(LINEAR, ["fc"]), (BY_ID["convolutions"], ["volume", "head"]), (BY_ID["embedding and Conv1D"], ["mixer"])],
        ids=["linear", "convolution", "Conv1D"],
    )
    def test_a_bias_of_b_is_scaled_and_added(self, case, targets, bias, tmp_path):
        theirs = with_peft(case, target_modules=targets, lora_bias=True, bias=bias, use_rslora=True)
        theirs.save_pretrained(tmp_path / "theirs")
        model = read_exactly(case, tmp_path / "theirs", theirs)
        assert effect(case, theirs) > 1e-3
        LoraModel(model).save_adapter(tmp_path / "ours", format="peft")  # as biases of the layers
        assert difference(case, read_by_peft(case, tmp_path / "ours"), theirs) <= PEFT_TOLERANCE

    def test_a_layer_without_a_bias(self, tmp_path, untouched):
        with_peft(LINEAR, lora_bias=True).save_pretrained(tmp_path)
        model = LINEAR.build()
        model.fc = nn.Linear(model.fc.in_features, model.fc.out_features, bias=False).double()
        with untouched(model), pytest.raises(AdapterFileError, match="the bias of 'fc', and the model has none there"):
            LoraModel.load_adapter(model, tmp_path)
        model.fc.bias = nn.Parameter(torch.zeros(len(model.fc.weight)).double())  # as it is told
        LoraModel.load_adapter(model, tmp_path)
        assert model.fc.bias.any()

    @pytest.mark.parametrize("said", [True, False])
    def test_the_config_says_whether_there_is_one(self, said, tmp_path, untouched):
        with_peft(LINEAR, lora_bias=not said).save_pretrained(tmp_path)
        edit_config(tmp_path, lora_bias=said)
        match = f"has {'no' if said else 'a'} bias of B in the tensors, and the config says lora_bias = {said}"
        refused(LINEAR, tmp_path, untouched, match)

    def test_with_the_name_of_the_adapter(self, tmp_path):
        theirs = with_peft(LINEAR, lora_bias=True)
        theirs.save_pretrained(tmp_path)
        tensors = {
            key.replace("lora_B.bias", "lora_B.default.bias"): t for key, t in load_file(tmp_path / TENSORS).items()
        }
        save_file(tensors, tmp_path / TENSORS)
        read_exactly(LINEAR, tmp_path, theirs)


class TestStates:
    """Of an adapter that changes biases and norms, beside others."""

    @pytest.fixture
    def lora(self, path):
        of_comfy(WAN, path, norms=True)
        return LoraModel.load_adapter(WAN.build(), path)

    def test_the_base_comes_back(self, lora):
        base = WAN.build().state_dict()
        expected = WAN.run(lora.model)
        lora.merge_adapter()
        assert torch.allclose(WAN.run(lora.model), expected, rtol=TOLERANCE, atol=TOLERANCE)
        lora.unmerge_adapter()
        assert torch.equal(WAN.run(lora.model), expected)
        with lora.disable_adapter():
            assert torch.equal(WAN.run(lora.model), WAN.run(WAN.build()))
        unloaded = lora.unload().state_dict()
        assert unloaded.keys() == base.keys()
        assert all(torch.equal(unloaded[name], base[name]) for name in base)

    def test_merged_for_good(self, lora):
        expected = WAN.run(lora.model)
        merged = lora.merge_and_unload()
        assert torch.allclose(WAN.run(merged), expected, rtol=TOLERANCE, atol=TOLERANCE)

    def test_saved_as_ours_it_is_the_same(self, lora, tmp_path):
        lora.save_adapter(tmp_path / "ours")
        again = WAN.build()
        LoraModel.load_adapter(again, tmp_path / "ours")
        assert torch.equal(WAN.run(again), WAN.run(lora.model))

    def test_a_second_one_adds_to_the_base(self, lora, path):
        expected = WAN.run(lora.model)
        base = lora.model.get_parameter("blocks.0.norm2.bias").detach().clone()
        changes = of_comfy(WAN, path, norms=True)
        LoraModel.load_adapter(lora.model, path, adapter_name="second")
        lora.set_adapter("second")
        assert torch.equal(WAN.run(lora.model), expected)
        assert torch.equal(lora.model.get_parameter("blocks.0.norm2.bias"), base)
        with pytest.raises(StateError, match="'default' and 'second' cannot be active together"):
            lora.set_adapter(["default", "second"])
        lora.swap_adapter("second", path)
        assert torch.equal(lora.model.get_parameter("blocks.0.norm2.bias"), base)
        assert changes["blocks.0.norm2.bias"].any()

    def test_one_without_them_acts_beside_it(self, lora):
        lora.add_adapter("plain", LoraConfig(r=2, target_modules=["to_q"], init="none"))
        alone = WAN.run(lora.model)
        lora.set_adapter(["default", "plain"])
        assert not torch.equal(WAN.run(lora.model), alone)
        with pytest.raises(StateError, match=r"own value of .*cannot be weighted\. Give it the weight 1"):
            lora.set_adapter(["default", "plain"], weights=[0.5, 1.0])

    def test_without_the_base_it_is_not_converted(self, lora, path, tmp_path):
        formats = DiffusersFormat(), DiffusersFormat.options, tmp_path / "new", PeftFormat(), PeftFormat.options
        file = {key.replace("diffusion_model.", "transformer."): each for key, each in load_file(path).items()}
        save_file(file, path)
        with pytest.raises(ConfigError, match=r"adds to values of the base.*--model MODULE:NAME --weights FILE"):
            convert(path, *formats)


class TestRefusals:
    @pytest.mark.parametrize(
        ("key", "tensor", "match"),
        [
            pytest.param(
                "conv_in.diff_b", torch.ones(3), r"'conv_in\.bias' has a change \(3,\), and is \(8,\)", id="shape"
            ),
            pytest.param("conv_in.diff", torch.ones(8, 4, 3, 3), "conv_in", id="a weight that is adapted"),
            pytest.param("nowhere.diff_b", torch.ones(8), r"not in this model: 'nowhere\.bias'", id="no layer"),
            pytest.param(
                "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.diff_b",
                torch.ones(16),
                r"the bias of 'mid_block.*to_q', and the model has none there",
                id="no bias",
            ),
            pytest.param("conv_in.diff_b", torch.tensor(1.0), r"the bias of 'conv_in' is \(\)", id="a number"),
            pytest.param("conv_in.diff_b", torch.ones(8, dtype=torch.int64), "torch.int64", id="whole numbers"),
            pytest.param("conv_in.lora_B.bias", torch.ones(7), r"'conv_in' has .*bias_B \(7,\)", id="a bias of B"),
            pytest.param("conv_out.lora_B.bias", torch.ones(4), "'conv_out' .* has only bias_B", id="without A and B"),
        ],
    )
    def test_what_does_not_fit(self, key, tensor, match, path, untouched):
        factors = {"lora_A.weight": torch.ones(1, 4, 3, 3), "lora_B.weight": torch.ones(8, 1, 1, 1)}
        save_file({**{f"unet.conv_in.{end}": each for end, each in factors.items()}, f"unet.{key}": tensor}, path)
        model = UNET.build()
        with untouched(model), pytest.raises(AdapterFileError, match=match):
            LoraModel.load_adapter(model, path)

    def test_a_weight_and_a_bias_of_different_outputs(self, path, untouched):
        name = "diffusion_model.double_blocks.0.img_attn.qkv"
        save_file({f"{name}.diff": torch.ones(48, 16), f"{name}.diff_b": torch.ones(16)}, path)
        model = FLUX.build()
        with untouched(model), pytest.raises(AdapterFileError, match=r"img_attn\.qkv' of the adapter has 0 outputs"):
            LoraModel.load_adapter(model, path)

    @pytest.mark.parametrize(("kind", "ending"), [("weight", "diff"), ("bias", "diff_b")])
    def test_two_changes_of_one_tensor(self, kind, ending, path, untouched):
        """The second is called as one of a parameter that is no module's."""
        factors = {"conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "conv_in.lora_B.weight": torch.ones(8, 1, 1, 1)}
        twice = {f"conv_norm_out.{ending}": torch.ones(8), f"conv_norm_out.{kind}.diff": torch.full((8,), 2.0)}
        save_file({f"unet.{key}": tensor for key, tensor in (factors | twice).items()}, path)
        model = UNET.build()
        match = rf"two changes of 'conv_norm_out\.{kind}'"
        with untouched(model), pytest.raises(AdapterFileError, match=match):
            LoraModel.load_adapter(model, path)

    def test_changes_alone(self, path, untouched):
        save_file({"unet.conv_in.diff_b": torch.ones(8)}, path)
        model = UNET.build()
        match = r"no layers with an A and a B, and only tensors in full: 'conv_in\.bias'"
        with untouched(model), pytest.raises(AdapterFileError, match=match):
            LoraModel.load_adapter(model, path)

    @pytest.mark.parametrize("tensor", [torch.tensor(2.0), torch.ones(8)], ids=["a number", "one for each output"])
    def test_a_scale_of_the_webui(self, tensor, path, untouched):
        """There it is a number that stands for alpha / r, and never a normalization."""
        factors = {"lora_down.weight": torch.ones(1, 4, 3, 3), "lora_up.weight": torch.ones(8, 1, 1, 1)}
        file = {f"lora_unet_conv_in.{end}": each for end, each in factors.items()}
        save_file({**file, "lora_unet_conv_in.scale": tensor}, path)
        model = UNET.build()
        with untouched(model), pytest.raises(AdapterFileError, match=r"no place: 'lora_unet_conv_in\.scale'"):
            LoraModel.load_adapter(model, path)


def test_a_change_is_rounded_once(path):
    save_file(
        {
            "unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3),
            "unet.conv_in.lora_B.weight": torch.zeros(8, 1, 1, 1),
            "unet.conv_in.alpha": torch.tensor(3.0),
            "unet.conv_in.lora_B.bias": torch.rand(8).half(),
        },
        path,
    )
    model = UNET.build().bfloat16()
    base = model.conv_in.bias.detach().clone()
    LoraModel.load_adapter(model, path)
    expected = base.double() + 3 * load_file(path)["unet.conv_in.lora_B.bias"].double()
    assert torch.equal(model.conv_in.bias, expected.bfloat16())
