"""Models whose tensors are elsewhere, without Lightning: split over processes by torch, or offloaded by accelerate."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.nn.functional import linear, mse_loss
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from lora_plugins import LoraConfig, LoraModel, StateError

CONFIG = LoraConfig(r=2, target_modules=["0", "2"], init="none")
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()


def fsdp2(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def fsdp(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


IN_A_PROCESS = pytest.mark.usefixtures("one_process")
SPLIT = pytest.mark.parametrize(
    "split",
    [
        fsdp2,
        pytest.param(fsdp, marks=pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning", "ignore::FutureWarning")),
    ],
)

# Plain layers return them too.
VIEWS = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")


def adapted(split=lambda model: model):
    model = net()
    torch.manual_seed(1)
    lora = LoraModel(model, CONFIG)
    lora.add_adapter("other", CONFIG)
    return split(model), lora


def trained(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        mse_loss(model(X), torch.ones(4, 3, dtype=X.dtype)).backward()
        optimizer.step()
    return model.eval()


CALLS = {
    "add": lambda lora, path: lora.add_adapter("new", CONFIG),
    "load": lambda lora, path: LoraModel.load_adapter(lora.model, path, "new"),
    "swap": lambda lora, path: lora.swap_adapter("other", path),
    "combine": lambda lora, path: lora.add_weighted_adapter(["default", "other"], [1, 1], "new"),
    "save": lambda lora, path: lora.save_adapter(path.with_name("new")),
    "merge": lambda lora, path: lora.merge_adapter(),
    "merge for good": lambda lora, path: lora.merge_and_unload(),
}


@SPLIT
@IN_A_PROCESS
@pytest.mark.parametrize("call", CALLS)
def test_what_needs_whole_tensors_is_refused(tmp_path, split, call):
    adapted()[1].save_adapter(tmp_path / "adapter", "default")
    model, lora = adapted(split)
    expected = trained(model)(X)
    with pytest.raises(StateError, match=r"'0\.weight', '0\.bias', .* are split over processes"):
        CALLS[call](lora, tmp_path / "adapter")
    assert torch.equal(model(X), expected)
    assert [*lora.adapters] == ["default", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("call", CALLS)
def test_what_needs_whole_tensors_is_refused_where_deepspeed_has_taken_them(tmp_path, call):
    adapted()[1].save_adapter(tmp_path / "adapter", "default")
    _, lora = adapted()
    whole = {parameter: parameter.data for parameter in lora.model.parameters()}
    for parameter, value in whole.items():
        parameter.ds_shape, parameter.data = value.shape, value.new_empty(0)
    with pytest.raises(StateError, match=r"'0\.weight', '0\.bias', .* are split .* inside of .*GatheredParameters"):
        CALLS[call](lora, tmp_path / "adapter")
    for parameter, value in whole.items():
        parameter.data = value
    CALLS[call](lora, tmp_path / "adapter")


@IN_A_PROCESS
def test_a_model_that_was_split_before_is_not_adapted():
    with pytest.raises(StateError, match=r"Adding an adapter .*'0\.weight'.* are split"):
        LoraModel(fsdp2(net()), CONFIG)


@SPLIT
@IN_A_PROCESS
@VIEWS
def test_everything_else_is_as_ever(split):
    whole, ours = adapted()
    model, lora = adapted(split)
    torch.testing.assert_close(trained(model)(X), trained(whole)(X), rtol=0, atol=1e-12)
    for handle in (lora, ours):
        handle.set_adapter(["default", "other"], weights=[0.5, 2.0])
    torch.testing.assert_close(model(X), whole(X), rtol=0, atol=1e-12)
    for handle in (lora, ours):
        handle.set_adapter("default")
    with lora.disable_adapter():
        torch.testing.assert_close(model(X), net()(X), rtol=0, atol=1e-12)
    if split is fsdp:  # which reads weights by their attributes
        return
    with lora.mixed_batch(["default", None, "other", None]), ours.mixed_batch(["default", None, "other", None]):
        torch.testing.assert_close(model(X), whole(X), rtol=0, atol=1e-12)


class Scaled(nn.Linear):
    def forward(self, x):
        return linear(x, 2 * self.weight, self.bias)


class Reads(nn.Module):
    """Hands the weight of a layer to torch's function."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = nn.Linear(inputs, outputs)

    def forward(self, x):
        return linear(x, self.inner.weight)


class Attends(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(inputs, 2), nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


class Fixed(nn.Linear):
    """A weight that is a buffer."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


READING = {
    "a forward of its own": (Scaled, {}),
    "parts with DoRA": (nn.Linear, {"variant": "dora", "fused_parts": {"0": ["q", "v"]}}),
    "another module": (Reads, {}),
    "another module, with dropout": (Reads, {"dropout": 0.3}),
    "a call, with dropout": (nn.Linear, {"dropout": 0.3}),
    "attention": (Attends, {}),
    "a buffer": (Fixed, {}),
    "weight norm": (lambda *sizes: weight_norm(nn.Linear(*sizes)), {}),
    "spectral norm": (lambda *sizes: spectral_norm(nn.Linear(*sizes)), {}),
    "pruned": (lambda *sizes: prune.l1_unstructured(nn.Linear(*sizes), "weight", 0.5), {}),
}


@SPLIT
@IN_A_PROCESS
@pytest.mark.parametrize(("kind", "fields"), READING.values(), ids=READING)
def test_a_weight_is_the_updated_one_for_whoever_reads_it_in_a_forward(split, kind, fields):
    def gradients(split):
        torch.manual_seed(0)
        model = nn.Sequential(kind(8, 12), nn.ReLU(), kind(12, 4)).double()
        LoraModel(model, LoraConfig(r=2, init="none", **fields))
        model = split(model)
        torch.manual_seed(1)
        output = model(X)
        output.square().sum().backward()
        whole = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters() if p.requires_grad]
        return [output.detach(), *whole]

    torch.testing.assert_close(gradients(split), gradients(lambda model: model), rtol=0, atol=1e-12)


@IN_A_PROCESS
@VIEWS
@pytest.mark.parametrize("kind", ["a buffer", "weight norm"])
def test_outside_of_the_forward_a_weight_that_is_no_parameter_is_the_base_s(kind):
    plain, layer = (READING[kind][0](8, 12).double() for _ in range(2))
    try:
        fully_shard(plain).weight  # noqa: B018
    except NotImplementedError as error:
        pytest.skip(f"torch cannot compute it from shards: {error}")
    expected = layer.weight
    model = nn.Sequential(layer)
    LoraModel(model, LoraConfig(r=2, init="none"))
    fully_shard(model)(X)
    model.reshard()
    got = getattr(layer.weight, "full_tensor", lambda: layer.weight)()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@SPLIT
@IN_A_PROCESS
@pytest.mark.parametrize("call", ["set", "disable"])
def test_a_head_of_an_adapter_is_not_exchanged_while_it_is_split(split, call):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    lora.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    split(model)
    with pytest.raises(StateError, match=r"'2\.weight', '2\.bias' takes another value, and is split over processes"):
        lora.set_adapter("other") if call == "set" else lora.disable_adapter().__enter__()
    assert lora.active_adapters == ("default",)


@SPLIT
@IN_A_PROCESS
@VIEWS
def test_statistics_that_move_are_the_base_s_in_a_block(split):
    def outputs(split):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).double()
        lora = LoraModel(model, LoraConfig(r=2, target_modules=["0", "2"], init="none", norm="track"))
        trained(split(model))
        with lora.disable_adapter():
            base = model(X)
        return base, model(X)

    torch.testing.assert_close(outputs(split), outputs(lambda model: model), rtol=0, atol=1e-12)


class Table(nn.Module):
    """An embedding, and a head that shares its table."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, indices):
        return self.head(self.embed(indices))


@IN_A_PROCESS
@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("targets", ["all", ["embed"]], ids=["both", "one"])
def test_a_shared_weight_is_refused_under_fsdp(targets):
    model = Table()
    LoraModel(model, LoraConfig(r=2, init="none", target_modules=targets))
    with pytest.raises(StateError, match="'weight' of 'embed' is shared with another module"):
        fsdp(model)(torch.tensor([1, 2]))


@IN_A_PROCESS
@VIEWS
def test_the_first_call_of_all_is_a_mixed_batch():
    (whole, ours), (model, lora) = adapted(), adapted(fsdp2)
    for each in (whole, model):
        each.eval()
    with lora.mixed_batch(["default", None, "other", None]), ours.mixed_batch(["default", None, "other", None]):
        torch.testing.assert_close(model(X), whole(X), rtol=0, atol=1e-12)


@SPLIT
@IN_A_PROCESS
@pytest.mark.parametrize("call", ["delete_adapter", "unload"])
def test_taking_adapters_off(split, call):
    whole, ours = adapted()
    model, lora = adapted(split)
    for each, handle in ((model, lora), (whole, ours)):
        trained(each)
        handle.delete_adapter("default") if call == "delete_adapter" else handle.unload()
    torch.testing.assert_close(model(X), whole(X), rtol=0, atol=1e-12)


@IN_A_PROCESS
def test_a_layer_that_was_split_by_itself_stays_so():
    model, lora = adapted(fsdp2)
    with lora.disable_adapter():
        assert isinstance(model[0], FSDPModule)
    lora.unload()
    model[0].reshard()


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return linear(x, self.fc.weight, self.fc.bias)


DISTRIBUTED = {
    "called": net,
    "read": Reading,
    "transposed": lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.ConvTranspose2d(2, 3, 2, stride=2)),
}


@IN_A_PROCESS
@pytest.mark.parametrize("make", DISTRIBUTED.values(), ids=DISTRIBUTED)
def test_tensors_of_one_mesh(make):
    torch.manual_seed(0)
    model = make().double()
    lora = LoraModel(model, LoraConfig(r=2, init="none", bias="all"))  # torch 2.8 differentiates no frozen ones here
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    expected = [model(X), *torch.autograd.grad(model(X).sin().sum(), trained.values())]
    mesh = init_device_mesh("cpu", (1,))
    distribute_module(model, mesh)
    x = distribute_tensor(X, mesh, [Shard(0)])
    trained = [model.get_parameter(name) for name in trained]  # torch 2.8 lets all require gradients
    found = [model(x), *torch.autograd.grad(model(x).sin().sum(), trained)]
    torch.testing.assert_close([each.full_tensor() for each in found], expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(StateError, match="split over processes"):
        lora.merge_adapter()


@SPLIT
@IN_A_PROCESS
def test_the_way_out_is_a_whole_state_dict(tmp_path, split):
    model, _ = adapted(split)
    expected = trained(model)(X)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole, lora = adapted()
    whole.load_state_dict(state)
    lora.save_adapter(tmp_path / "adapter", "default")
    base = net().eval()
    LoraModel.load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(base(X), expected, rtol=0, atol=1e-12)


class Kinds(nn.Module):
    """Layers that add the update in a branch, and ones that run their own forward with the updated weight."""

    def __init__(self):
        super().__init__()
        self.words, self.memory = nn.Embedding(9, 8), nn.GRU(8, 8, batch_first=True)
        self.norm, self.conv, self.head = nn.LayerNorm(8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, indices):
        x = self.words(indices)
        x = self.norm(x + self.memory(x)[0])
        return self.head(x + self.conv(x.mT).mT)


INDICES = torch.tensor([[1, 3, 5], [2, 4, 0]])


STORED = {"quantize_modules": "all", "quantize_options": {"min_size": 1}}


def kinds(options):
    torch.manual_seed(0)
    model = Kinds().double().eval()
    config = LoraConfig(r=2, target_modules="all", init="none", **options)
    if config.variant == "dora":
        config = replace(config, target_modules=["memory", "conv", "head"])
    torch.manual_seed(1)
    lora = LoraModel(model, config)
    lora.add_adapter("other", LoraConfig(r=1, target_modules=["head", "words"], init="none"))
    return model, lora


def offloaded(model, folder, where):
    accelerate = pytest.importorskip("accelerate")
    if where == "memory":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "dora"}, {"quantize": "nf4", **STORED}, {"quantize": "int8", **STORED}],
    ids=["lora", "dora", "nf4", "int8"],
)
def test_an_adapted_model_is_offloaded_by_accelerate(tmp_path, where, options):
    whole, ours = kinds(options)
    model, lora = kinds(options)
    offloaded(model, tmp_path / "offloaded", where)
    for names in ("default", "other") if "variant" in options else ("default", ["default", "other"], "other"):
        for handle in (lora, ours):
            handle.set_adapter(names)
        torch.testing.assert_close(model(INDICES), whole(INDICES), rtol=0, atol=1e-12)
    with lora.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(model(INDICES), whole(INDICES), rtol=0, atol=1e-12)
    for call in (lambda: lora.save_adapter(tmp_path / "a"), lora.merge_adapter, lora.merge_and_unload):
        with pytest.raises(StateError, match=r"are on the meta device.*remove_hook_from_submodules\(model\)"):
            call()
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)
    lora.save_adapter(tmp_path / "a", "other")
    lora.merge_and_unload(dequantize=True)
    torch.testing.assert_close(model(INDICES), whole(INDICES), rtol=0, atol=1e-12)


def test_what_accelerate_places_is_the_base_s_own():
    """The weight that is meant would become the parameter, and the update count twice."""
    place = pytest.importorskip("accelerate.utils").set_module_tensor_to_device
    model, _ = kinds({})
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name, _ in [*model.named_parameters()]:
        place(model, name, "meta")  # no card is here
    placed = dict(model.named_parameters())
    assert all(parameter.is_meta for parameter in placed.values())
    assert [name for name, parameter in placed.items() if not parameter.requires_grad] == frozen


def test_an_adapted_model_is_dispatched_by_accelerate(device):
    whole, _ = kinds({})
    model, _ = kinds({})
    parts = {name: device if name != "head" else "cpu" for name, _ in model.named_children()}
    pytest.importorskip("accelerate").dispatch_model(model, parts, main_device=device, force_hooks=True)
    placed = model(INDICES.to(device)).cpu()
    torch.testing.assert_close(placed, whole(INDICES), rtol=0, atol=1e-12)


def test_layers_that_share_a_weight_are_dispatched_by_accelerate(device):
    """It assigns what was one parameter again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)).double()
    model[2].weight = model[0].weight
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0", "2"], init="none"))
    whole = model(INDICES)
    pytest.importorskip("accelerate").dispatch_model(model, {"": device}, force_hooks=True)
    torch.testing.assert_close(model(INDICES.to(device)).cpu(), whole, rtol=0, atol=1e-12)
    lora.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(INDICES.to(device)).cpu(), whole, rtol=0, atol=1e-12)
    first, last = (dict(model[at].named_parameters())["weight"] for at in (0, 2))
    assert first is last


@pytest.mark.parametrize("where", ["memory", "files"])
@pytest.mark.parametrize("call", ["unmerge_adapter", "unload"])
def test_a_merge_is_undone_when_the_model_is_taken_back(tmp_path, where, call):
    """accelerate has the merged weights elsewhere, and brings them for each forward."""
    whole, ours = kinds({})
    model, lora = kinds({})
    lora.merge_adapter()
    offloaded(model, tmp_path / "offloaded", where)
    merged = model(INDICES)
    with pytest.raises(StateError, match=r"Unmerging needs.*are on the meta device.*remove_hook_from_submodules"):
        getattr(lora, call)()
    torch.testing.assert_close(model(INDICES), merged, rtol=0, atol=0)
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)
    getattr(lora, call)()
    if call == "unload":
        ours.unload()
    torch.testing.assert_close(model(INDICES), whole(INDICES), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["conv"], "modules_to_save": ["head"]}, {"target_modules": ["conv"], "init": "pissa"}],
    ids=["a head", "a changed base"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda lora: lora.set_adapter("other"),
        lambda lora: lora.disable_adapter().__enter__(),
        lambda lora: lora.delete_adapter("default"),
        lambda lora: lora.unload(),
    ],
    ids=["set", "disable", "delete", "unload"],
)
def test_a_value_of_an_adapter_is_not_exchanged_while_it_is_elsewhere(tmp_path, options, call):
    torch.manual_seed(0)
    model = Kinds().double().eval()
    base = model(INDICES)
    lora = LoraModel(model, LoraConfig(r=2, **options))
    lora.add_adapter("other", LoraConfig(r=1, target_modules=["conv"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * parameter.requires_grad)
    offloaded(model, tmp_path / "offloaded", "memory")
    expected = model(INDICES)
    with pytest.raises(StateError, match=r"takes another value.*meta device.*remove_hook_from_submodules\(model\)"):
        call(lora)
    assert lora.active_adapters == ("default",)
    torch.testing.assert_close(model(INDICES), expected, rtol=0, atol=0)
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)
    call(lora)
    torch.testing.assert_close(model(INDICES), base, rtol=0, atol=1e-12)


def test_heads_of_rows_are_moved_with_the_model(device):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init="none", modules_to_save=["2"])
    lora = LoraModel(net().eval().to(device), config)
    lora.add_adapter("other", config)
    with torch.no_grad(), lora.mixed_batch(["other", None, "default", "other"]) as model:
        expected = model(X.to(device)).cpu()
        torch.testing.assert_close(model.cpu()(X), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(model.to(device)(X.to(device)).cpu(), expected, rtol=0, atol=1e-12)


def test_layers_that_shared_tensors_are_saved_when_accelerate_has_parted_them(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    model[2].weight = model[0].weight
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0", "2"], init="none"))
    before = lora.save_adapter(tmp_path / "before")
    offloaded(model, tmp_path, "memory")
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)
    after = lora.save_adapter(tmp_path / "after")
    assert {path.name for path in after.iterdir()} == {path.name for path in before.iterdir()}  # of their content
    with pytest.raises(StateError, match=r"'2' had the tensors of '0' .* offloading by accelerate"):
        lora.pack("default")  # into whose tensors a resume may write
