"""What `torch.compile` and checkpointing of activations insert, before or after: an adapter is what it is without."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_plugins import LoraConfig, LoraModel

CONFIG = LoraConfig(r=2, target_modules=["fc", "blocks.1.out"], modules_to_save=["head"], init="none")
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(self.norm(self.fc(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net().double()


def layer(model, wrapped):
    model.blocks[0].fc = wrapped(model.blocks[0].fc)
    return model


def norm(model, wrapped):
    model.blocks[0].norm = wrapped(model.blocks[0].norm)
    return model


def block(model, wrapped):
    model.blocks[1] = wrapped(model.blocks[1])
    return model


def head(model, wrapped):
    model.head = wrapped(model.head)
    return model


def nested(model, wrapped):
    for each in (layer, norm, head, block):
        model = each(model, wrapped)
    return wrapped(model)


PLACES = pytest.mark.parametrize("place", [layer, norm, block, head, nested])
WHEN = pytest.mark.parametrize("when", ["before", "after"])
WRAPPED = pytest.mark.parametrize(
    "wrapped",
    [lambda part: torch.compile(part, backend="eager"), checkpoint_wrapper],
    ids=["compiled", "checkpointed"],
)


@pytest.fixture(autouse=True)
def nothing_is_traced():
    """Names are tried here, and what is computed under a compiler elsewhere."""
    with torch.compiler.set_stance("force_eager"):
        yield


def adapted(place=None, wrapped=None, when=None, config=CONFIG):
    """Returns a model with an adapter, and its handle, where something was inserted before or after it."""
    model = net()
    if when == "before":
        model = place(model, wrapped)
    torch.manual_seed(1)
    lora = LoraModel(model, config)
    return (place(model, wrapped) if when == "after" else model).eval(), lora


def trained(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(X).square().sum().backward()
        optimizer.step()
    return model.eval()


def life(folder, model, lora):
    """Yields the outputs of one model in the order of its calls, and at the end which parameters are trained."""
    with torch.no_grad():
        yield trained_output(model)
        lora.save_adapter(folder)
        fresh = net().eval()
        LoraModel.load_adapter(fresh, folder)
        yield fresh(X)
        with lora.disable_adapter():
            yield model(X)
        with lora.mixed_batch(["default", None, None, "default"]):
            yield model(X)
        lora.add_adapter("b", LoraConfig(r=1, target_modules=["out"], init="none"))
        lora.set_adapter("b")
        yield model(X)
        lora.set_adapter("default")
        lora.merge_adapter()
        yield model(X)
        lora.unmerge_adapter()
        yield model(X)
        lora.unload()
        yield model(X)
    yield torch.tensor([parameter.requires_grad for parameter in model.parameters()], dtype=torch.float64)


def trained_output(model):
    with torch.enable_grad():
        return trained(model)(X)


@WHEN
@PLACES
@WRAPPED
def test_a_whole_life(tmp_path, place, wrapped, when):
    torch.manual_seed(2)
    expected = list(life(tmp_path / "a", *adapted()))
    torch.manual_seed(2)
    found = list(life(tmp_path / "a", *adapted(place, wrapped, when)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@WHEN
@PLACES
@WRAPPED
@pytest.mark.parametrize("format", ["lora_plugins", "peft"])
def test_files_fit_models_with_and_without(tmp_path, place, wrapped, when, format):
    model, lora = adapted(place, wrapped, when)
    lora.save_adapter(tmp_path / "a", format=format)
    for base in (net(), place(net(), wrapped)):
        LoraModel.load_adapter(base, tmp_path / "a")
        torch.testing.assert_close(base.eval()(X), model(X), rtol=0, atol=1e-12)


def grown(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def part_of(model):
    return nn.Module.get_submodule(model, "blocks").get_submodule("1")


@WHEN
@PLACES
@WRAPPED
@pytest.mark.parametrize("part", [lambda model: model, part_of], ids=["model", "part"])
def test_a_base_is_loaded(place, wrapped, when, part):
    """Its state dict has the names that it has with what was inserted."""
    expected, _ = adapted()
    part(expected).load_state_dict(part(grown(net())).state_dict())
    model, lora = adapted(place, wrapped, when)
    part(model).load_state_dict(part(grown(place(net(), wrapped))).state_dict())
    torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-12)
    with lora.disable_adapter(), LoraModel(expected).disable_adapter():
        torch.testing.assert_close(model(X), expected(X), rtol=0, atol=1e-12)


@WHEN
@PLACES
@WRAPPED
def test_an_adapted_state_dict_is_loaded_again(place, wrapped, when):
    model, _ = adapted(place, wrapped, when)
    state, expected = copy.deepcopy(model.state_dict()), model(X)
    grown(model)
    model.load_state_dict(state)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


@WHEN
@WRAPPED
def test_stored_weights(tmp_path, wrapped, when):
    config = LoraConfig(r=2, target_modules=["fc"], quantize="int8", quantize_options={"min_size": 1}, init="none")
    model, lora = adapted(nested, wrapped, when, config)
    lora.save_adapter(tmp_path / "a")
    base = net().eval()
    LoraModel.load_adapter(base, tmp_path / "a")
    torch.testing.assert_close(base(X), model(X), rtol=0, atol=1e-12)
    lora.merge_and_unload(dequantize=True)
    torch.testing.assert_close(base(X), model(X), rtol=0, atol=1e-12)


@WRAPPED
def test_a_handle_to_the_inserted_module_and_one_to_what_is_inside_are_alike(wrapped):
    model = net()
    lora = LoraModel(model, CONFIG)
    outer = LoraModel(wrapped(model))
    assert outer.adapters == lora.adapters
    outer.unload()
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
