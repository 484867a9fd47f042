"""Layers that bitsandbytes and torchao quantized are adapted in place, or refused by name while planning."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from lora_plugins import InitData, LoraConfig, LoraModel, MergeError, TargetError
from lora_plugins.inplace import detached_weight, put_marks, quantizer_marks
from tests.core.inplace.test_stored import kept

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def floating():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64, bias=False), nn.GELU(), nn.Linear(64, 3))


def with_bitsandbytes(make):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    model = floating()
    for at in (0, 2):
        layer = model[at]
        new = make(modules)(layer.in_features, layer.out_features, bias=layer.bias is not None)
        new.load_state_dict(layer.state_dict())
        model[at] = new.to("cpu")
    return model


def four_bits(**options):
    return lambda: with_bitsandbytes(
        lambda modules: lambda *sizes, **more: modules.Linear4bit(*sizes, **more, quant_type="nf4", **options)
    )


def eight_bits():
    def make(modules):
        return lambda *sizes, **more: modules.Linear8bitLt(*sizes, **more, has_fp16_weights=False)

    return with_bitsandbytes(make)


def with_torchao(config, **options):
    def make():
        quantization = pytest.importorskip("torchao.quantization")
        model = floating()
        quantization.quantize_(model, getattr(quantization, config)(**options), lambda module, name: name in ("0", "2"))
        return model

    return make


def with_gguf():
    """Blocks of 32 weights, each with a scale of 16 bits and 32 numbers of 8 bits: the kind Q8_0 of GGUF."""
    kinds = pytest.importorskip("gguf").GGMLQuantizationType
    utilities = pytest.importorskip("diffusers.quantizers.gguf.utils")
    model = floating()
    for at in (0, 2):
        layer = model[at]
        blocks = layer.weight.detach().reshape(-1, 32)
        scales = (blocks.abs().amax(1, keepdim=True) / 127).half()
        numbers = (blocks / scales.float()).round().to(torch.int8)
        stored = torch.cat([scales.view(torch.uint8), numbers.view(torch.uint8)], 1).reshape(layer.out_features, -1)
        new = utilities.GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
        new.weight = utilities.GGUFParameter(stored, quant_type=kinds.Q8_0)
        new.bias = layer.bias
        model[at] = new
    return model


MODELS = {
    "bnb-nf4": four_bits(),
    "bnb-nf4-single": four_bits(compress_statistics=False),
    "bnb-nf4-bfloat16-bytes": four_bits(quant_storage=torch.bfloat16),
    "bnb-int8": eight_bits,
    "torchao-int8": with_torchao("Int8WeightOnlyConfig"),
    "torchao-intx": with_torchao("IntxWeightOnlyConfig"),
    "torchao-float8": with_torchao("Float8WeightOnlyConfig"),
    "gguf-q8_0": with_gguf,
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
CONFIG = LoraConfig(r=4, alpha=8.0, target_modules=["0", "2"], modules_to_save=["4"])


def test_scales_that_a_move_of_the_model_leaves_behind_are_found(device):
    model = eight_bits()
    dense = detached_weight(model[0], "weight")
    assert torch.equal(detached_weight(model.to(device)[0], "weight").cpu(), dense)


def x():
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


def randomized(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def pair(make, **fields):
    """An adapted quantized model, and float LoRA on its dense values."""
    model, dense = make(), floating()
    for at in (0, 2):
        dense[at].weight.data.copy_(detached_weight(model[at], "weight"))
    for each in (model, dense):
        LoraModel(each, LoraConfig(**{**CONFIG.to_dict(), **fields}))
        randomized(each)
    return model, dense


def results(model):
    output = model(x())
    output.square().sum().backward()
    return {"output": output.detach(), **{n: p.grad for n, p in model.named_parameters() if p.requires_grad}}


@models
@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}, {"dropout": 0.5}], ids=["lora", "dora", "dropout"])
def test_the_law_holds_for_the_dense_values(make, fields):
    model, dense = pair(make, **fields)
    if "dropout" in fields:
        model.eval()
        dense.eval()
    expected, got = results(dense), results(model)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert float((got[name] - value).abs().max()) <= 1e-6 * max(float(value.abs().max()), 1.0), name
    model.train()(x()).sum().backward()


@models
@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}], ids=["lora", "dora"])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-6), (torch.bfloat16, 2e-2)], ids=["wider", "narrower"])
def test_the_bias_decides_the_type(make, fields, dtype, off):
    """`prepare_model_for_kbit_training` of PEFT casts all but the quantized weights, biases too."""
    model = make()
    for name, parameter in model.named_parameters():
        if name in ("0.bias", "4.weight", "4.bias"):
            parameter.data = parameter.data.to(dtype)
    LoraModel(model, LoraConfig(**{**CONFIG.to_dict(), **fields}))
    randomized(model)
    layer, inputs = model[0], x().to(dtype)
    expected = nn.functional.linear(inputs, layer.weight, layer.bias)
    assert expected.dtype == dtype
    torch.testing.assert_close(layer(inputs), expected, rtol=off, atol=off)
    model(inputs).sum().backward()
    merged = LoraModel(model.eval()).merge_and_unload(dequantize=True, max_error=0.5)
    torch.testing.assert_close(merged[0](inputs), expected, rtol=off, atol=off)


@models
def test_the_input_has_the_name_that_the_layer_gives_it(make):
    model = make()
    _, name, *_ = inspect.signature(type(model[0]).forward).parameters
    LoraModel(model, CONFIG)
    randomized(model)
    torch.testing.assert_close(model[0](**{name: x()}), model[0](x()))


class _WithBiasApart(nn.Linear):
    """Returns its bias beside its output, as Megatron's layers do."""

    def forward(self, x, *, scale=1.0):
        return nn.functional.linear(x, self.weight) * scale, self.bias


@models
def test_a_call_without_an_input_is_told_as_the_layer_tells_it(make):
    model = make()
    LoraModel(model, CONFIG)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model[0]()


def test_a_forward_of_another_kind_keeps_what_it_takes_and_returns():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(_WithBiasApart(64, 32))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))
    randomized(model)
    output, bias = model[0](x(), scale=2.0)
    assert bias is model[0].bias
    torch.testing.assert_close(output, 2 * nn.functional.linear(x(), model[0].weight))


@models
def test_an_adapter_fits_biases_of_another_type(make, tmp_path):
    model, other = make(), make()
    model[0].bias.data = model[0].bias.data.bfloat16()
    LoraModel(model, CONFIG).save_adapter(tmp_path)
    LoraModel.load_adapter(other, tmp_path)


@models
def test_the_dense_values_are_counted(make):
    model, dense = pair(make)
    quantized, floats = (LoraModel(each).plans["default"] for each in (model, dense))
    assert quantized.base_parameters == floats.base_parameters


@models
def test_nothing_dense_is_kept(make):
    model, dense = pair(make)
    assert kept(model, x()) <= 1.02 * kept(dense, x())


@models
def test_the_weight_reads_with_its_update(make):
    model, dense = pair(make)
    torch.testing.assert_close(model[0].weight, dense[0].weight)
    assert isinstance(model[0], nn.Linear)


@models
def test_train_validate_train(make):
    """On a processor with avx512_bf16, a forward of bitsandbytes' own in eval mode packs 4-bit weights anew."""
    model, _ = pair(make)
    expected = results(model)
    model.eval()
    lora = LoraModel(model)
    with torch.no_grad():
        model(x())
        with lora.disable_adapter():
            model(x())
    model.train().zero_grad()
    again = results(model)
    for name, value in expected.items():
        assert torch.equal(again[name], value), name


@models
def test_an_init_that_learns_from_data_leaves_the_weights_readable(make):
    """On a processor with avx512_bf16, a forward of bitsandbytes' own in eval mode packs 4-bit weights anew."""
    model = make()
    before, attributes = detached_weight(model[0], "weight"), [sorted(vars(layer)) for layer in model]
    lora = LoraModel(model, LoraConfig(**{**CONFIG.to_dict(), "init": "eva"}), init_data=InitData([x()]))
    assert torch.equal(detached_weight(model[0], "weight"), before)
    model.train()(x()).sum().backward()
    lora.unload()
    assert [sorted(vars(layer)) for layer in model] == attributes


def _is_torchao(tensor):
    """Whether it is one of torchao's; the bytes of others may look like nan."""
    return type(tensor).__module__.startswith("torchao")


@models
def test_unloading_gives_the_quantized_model_back(make):
    plain = make()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    classes, attributes = [type(m) for m in plain.modules()], [sorted(vars(m)) for m in plain.modules()]
    model = LoraModel(plain, CONFIG).unload()
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        first, second = (t.dequantize() if _is_torchao(t) else t for t in (after[key], value))
        assert torch.equal(torch.atleast_1d(first).view(torch.uint8), torch.atleast_1d(second).view(torch.uint8)), key


@models
def test_the_state_dict_keeps_what_the_library_writes(make):
    expected = list(make().state_dict())
    model, _ = pair(make)
    assert [key for key in model.state_dict() if "lora" not in key] == expected


@models
def test_adapters_travel(make, tmp_path):
    model, _ = pair(make)
    LoraModel(model).save_adapter(tmp_path)
    other = make()
    LoraModel.load_adapter(other, tmp_path)
    assert torch.equal(other(x()), model(x()))


@pytest.mark.parametrize("make", [make for make in MODELS.values() if make is not with_gguf])  # diffusers copies none
def test_copies(make):
    model, _ = pair(make)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x()), model(x()))


@pytest.mark.parametrize("make", [eight_bits, *(make for name, make in MODELS.items() if "nf4" in name)])
@pytest.mark.parametrize("active", ["default", "other"])
def test_pickles(make, active):
    """Pickle makes a plain parameter of a subclass, which the layers of bitsandbytes put up with."""
    model, _ = pair(make)
    lora = LoraModel(model)
    lora.add_adapter("other", LoraConfig(target_modules=["0"]))
    expected = model(x())
    lora.set_adapter(active)
    twin = pickle.loads(pickle.dumps(model))
    LoraModel(twin).set_adapter("default")
    assert torch.equal(twin(x()), expected)
    merged = LoraModel(twin).merge_and_unload(dequantize=True)
    torch.testing.assert_close(merged(x()), expected)


@models
def test_merging(make):
    model, dense = pair(make)
    lora = LoraModel(model)
    expected = model.eval()(x())
    lora.merge_adapter()
    torch.testing.assert_close(model(x()), expected)
    lora.unmerge_adapter()
    assert torch.equal(model(x()), expected)
    with pytest.raises(MergeError, match=r"'0.weight', '2.weight' is quantized by .*dequantize=True"):
        lora.merge_and_unload()
    assert torch.equal(model(x()), expected)
    lora.merge_and_unload(dequantize=True)
    assert [type(layer) for layer in model] == [type(layer) for layer in floating()]
    assert list(model.state_dict()) == list(floating().state_dict())
    torch.testing.assert_close(model(x()), LoraModel(dense).merge_and_unload().eval()(x()))


@models
@pytest.mark.parametrize("init", ["pissa", "loftq", "lora_ga"])
def test_inits_that_change_the_base_are_refused(make, init):
    model = make()
    with pytest.raises(TargetError, match=rf"'0': 'weight' is quantized by .* already, so the init '{init}' cannot"):
        LoraModel(model, LoraConfig(init=init, target_modules=["0"]))


@models
def test_other_refusals(make):
    model = make()
    with pytest.raises(TargetError, match=r"'0.weight': it is quantized by .* already"):
        LoraModel(model, LoraConfig(quantize="nf4", quantize_options={"min_size": 0}))
    with pytest.raises(TargetError, match=r"cannot be trained: '2.weight.*load the model with these layers left out"):
        LoraModel(model, LoraConfig(target_modules=["0"], modules_to_save=["2"]))
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def refused(model, message):
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TargetError, match=message):
        LoraModel(model, LoraConfig(target_modules=["0", "2"]))
    assert [type(module) for module in model.modules()] == classes
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_inputs_that_are_quantized_too_are_refused():
    for config in ("Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"):
        refused(with_torchao(config)(), r"'0': 'weight' is a \w+ of torchao that quantizes inputs too.*exclude")


def test_weights_that_bitsandbytes_packed_anew_are_refused():
    model = MODELS["bnb-nf4"]().eval()
    with torch.no_grad():
        model[0](x())
    if not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes packs anew on processors with avx512_bf16 only")
    refused(model, r"'0.weight' was packed anew by a forward of bitsandbytes.*load the model again")
    refused(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), model[0]), r"'3.weight' was packed anew")


def test_weights_that_are_not_quantized_yet_are_refused():
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    model = floating()
    model[0] = modules.Linear4bit(64, 96)
    model[2] = modules.Linear8bitLt(96, 64, has_fp16_weights=False)
    refused(model, r"'0.weight' is not quantized yet; move the model to its device first")
    model[0] = nn.Linear(64, 96)
    refused(model, r"'2': 'weight' is not quantized yet; move the model to its device first")
    model[2] = modules.Linear8bitLt(96, 64)
    refused(model, "'2': 'weight' keeps values of 16 bits")


def test_a_model_of_transformers_with_bitsandbytes_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["classifier"]
    )
    model = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "model", quantization_config=quantization, device_map="cpu"
    )
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"]))
    images = torch.randn(2, 3, 16, 16)
    model.train()
    model(images, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        expected = randomized(model).eval()(images).logits
    model.train()(images, labels=torch.tensor([0, 2])).loss.backward()  # after what validation runs
    lora.save_adapter(tmp_path / "adapter")
    again = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "model", quantization_config=quantization, device_map="cpu"
    )
    LoraModel.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.eval()(images).logits, expected)


class TestModelsOfDiffusers:
    @pytest.fixture
    def quantized(self, tmp_path):
        """A model that torchao quantized while it was loaded, adapted, and what it computes."""
        diffusers = pytest.importorskip("diffusers")
        quantization = pytest.importorskip("torchao.quantization")
        pytest.importorskip("accelerate")
        model = diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=4, num_layers=1, embedding_dim=8, num_embeddings=3
        )
        model.save_pretrained(tmp_path / "model")
        options = diffusers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
        model = diffusers.PriorTransformer.from_pretrained(
            tmp_path / "model", quantization_config=options, torch_dtype=torch.float32
        )
        LoraModel(model, LoraConfig(r=2, target_modules=["to_q", "to_v"]))
        return randomized(model)

    def computed(self, model):
        torch.manual_seed(3)
        with torch.no_grad():
            return model(torch.randn(2, 8), 5, torch.randn(2, 8), torch.randn(2, 3, 8)).predicted_image_embedding

    def test_are_saved_as_dense_ones_once_they_are(self, quantized, tmp_path):
        expected = self.computed(quantized)
        LoraModel(quantized).merge_and_unload(dequantize=True)
        torch.testing.assert_close(self.computed(quantized), expected)
        quantized.save_pretrained(tmp_path / "merged")
        again = type(quantized).from_pretrained(tmp_path / "merged")
        assert torch.equal(self.computed(again), self.computed(quantized))

    def test_say_again_how_they_are_quantized(self, quantized):
        before = dict(quantized.config)
        marks = quantizer_marks(quantized)
        assert marks[""][1].keys() == {"quantization_config"} <= before.keys()
        LoraModel(quantized).merge_and_unload(dequantize=True)
        assert quantizer_marks(quantized) == {}
        assert dict(quantized.config) == {k: v for k, v in before.items() if k != "quantization_config"}
        put_marks(quantized, marks)
        assert quantizer_marks(quantized) == marks
        assert dict(quantized.config) == before
        assert quantized.config.quantization_config is before["quantization_config"]


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_of_quanto_are_refused(frozen):
    quanto = pytest.importorskip("optimum.quanto")
    model = floating()
    quanto.quantize(model, weights=quanto.qint8)
    if frozen:
        quanto.freeze(model)
    refused(model, "'0': 'weight' is one of quanto")
