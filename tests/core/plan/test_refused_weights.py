"""Weights that nothing can be added to, and parameters that cannot be trained, are refused while planning, by name."""

import pytest
import torch
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError


class Packed(torch.Tensor):
    """As the tensors of quantization libraries are: views work, and arithmetic does not."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.to):
            raise NotImplementedError("packed values cannot be added")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_weight_of_a_type_that_cannot_be_computed_with():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(torch.randn(2, 4).as_subclass(Packed), requires_grad=False)
    with pytest.raises(TargetError, match=r"'1': 'weight' is a (Packed|Parameter), to which nothing can be added"):
        LoraModel(model, LoraConfig(r=2))
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (lambda: nn.Linear(4, 2), torch.sparse_coo),
        (lambda: nn.Linear(4, 2), torch.sparse_csr),
        (lambda: nn.Conv2d(4, 2, 3), torch.sparse_coo),
    ],
    ids=["linear-coo", "linear-csr", "convolution-coo"],
)
def test_a_sparse_weight(make, layout):
    model = nn.Sequential(nn.Linear(4, 4), make())
    model[1].weight = nn.Parameter(model[1].weight.to_sparse(layout=layout), requires_grad=False)
    with pytest.raises(TargetError, match=rf"'1': 'weight' is {layout}, .* make it dense, or exclude the layer"):
        LoraModel(model, LoraConfig(r=2))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))


def test_a_weight_of_8_bits_is_not_stored_in_fewer():
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    model[0].weight.data = model[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(TargetError, match=r"stored as int8; .*\n  '0.weight': it has 8 bits already, as torch.float8"):
        LoraModel(model, LoraConfig(r=2, quantize="int8", quantize_options={"min_size": 0}))


def test_a_weight_that_is_read_as_another_tensor():
    class Scaled(nn.Linear):
        def __getattr__(self, name):
            found = super().__getattr__(name)
            return found * 0.5 if name == "weight" else found

    model = nn.Sequential(nn.Linear(4, 4), Scaled(4, 2))
    with pytest.raises(TargetError, match=r"'1': 'weight' is not what the layer computes with.*Exclude the layer"):
        LoraModel(model, LoraConfig(r=2))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"]))


def test_a_module_to_save_with_integers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = nn.Parameter(torch.ones(2, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"cannot be trained: '1\.weight of torch\.int8'"):
        LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"modules_to_save": ["1"]}, r"'1\.weight of torch\.complex64', '1\.bias"), ({"bias": "all"}, r"'1\.bias of")],
    ids=["module to save", "bias"],
)
def test_complex_parameters_to_train(fields, named):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, dtype=torch.complex64))
    with pytest.raises(TargetError, match=rf"cannot be trained: {named}.*complex ones are not served"):
        LoraModel(model, LoraConfig(r=2, target_modules=["0"], **fields))
    LoraModel(model, LoraConfig(r=2, target_modules=["0"], bias="lora_only"))


@pytest.mark.parametrize("field", ["r", "rank_pattern"])
@pytest.mark.parametrize("value", [10**400, 10**5000, 10**20, 2**16 + 1], ids=["400", "5000", "20", "one too many"])
def test_a_huge_rank(field, value):
    with pytest.raises(ConfigError, match="is a rank, a whole number from 1 to 65536, not "):
        LoraConfig(**{field: {"0": value} if field == "rank_pattern" else value})


@pytest.mark.parametrize("field", ["alpha", "dropout", "layers_to_transform", "init", "bias", "allow_plugins"])
def test_an_integer_that_cannot_be_printed_is_refused_all_the_same(field):
    with pytest.raises(ConfigError):
        LoraModel.plan(nn.Sequential(nn.Linear(4, 4)), LoraConfig(**{field: 10**5000}))


def test_a_name_that_every_module_has_is_no_adapter():
    with pytest.raises(ConfigError, match="'training' cannot name an adapter"):
        LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2), "training")
