"""Layers of an adapted model that the user replaces: nothing of the old ones is put into the new ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from lora_plugins import LoraConfig, LoraModel, StateError


def headed() -> LoraModel:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"], init="gaussian"), "a")
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    return lora


CALLS = {
    "set": lambda lora: lora.set_adapter("b"),
    "disable": lambda lora: lora.disable_adapter().__enter__(),
    "save": lambda lora: lora.pack("a"),
    "delete": lambda lora: lora.delete_adapter("a"),
    "mixed": lambda lora: lora.mixed_batch(["b"]).__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_head_of_another_shape(call):
    lora = headed()
    lora.model[2] = head = nn.Linear(6, 5)
    weight = head.weight.detach().clone()
    message = r"'2\.weight', '2\.bias' is gone or has another shape.*replaced, pruned or parametrized\. unload\(\)"
    with pytest.raises(StateError, match=message):
        CALLS[call](lora)
    assert lora.active_adapters == ("a",)
    lora.unload()
    assert torch.equal(lora.model[2].weight, weight)
    LoraModel(lora.model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    assert lora.model(torch.zeros(3, 4)).shape == (3, 5)


HEADS = {
    "identity": nn.Identity,
    "without bias": lambda: nn.Linear(6, 2, bias=False),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("call", CALLS)
def test_a_head_without_the_tensors_that_were_there(head, call):
    lora = headed()
    lora.model[2] = new = head()
    with pytest.raises(StateError, match=r"'2\.(weight|bias)' is gone .*replaced.* unload\(\)"):
        CALLS[call](lora)
    assert lora.active_adapters == ("a",)
    assert lora.unload()[2] is new
    assert type(lora.model[0]) is nn.Linear


RENAMED = {
    "pruned": (prune.identity, prune.remove),
    "parametrized": (parametrizations.weight_norm, parametrize.remove_parametrizations),
}


@pytest.mark.parametrize(("change", "undo"), RENAMED.values(), ids=RENAMED)
@pytest.mark.parametrize("call", CALLS)
def test_a_head_whose_weight_has_another_name_is_named_as_what_it_is(change, undo, call):
    lora = headed()
    change(lora.model[2], "weight")
    with pytest.raises(StateError, match=r"'2\.weight' is gone .* replaced, pruned or parametrized\. .*unload\(\)"):
        CALLS[call](lora)
    undo(lora.model[2], "weight")
    CALLS[call](lora)


@pytest.mark.parametrize("head", [nn.Identity, lambda: nn.Linear(6, 5)], ids=["identity", "another shape"])
def test_a_head_that_is_replaced_inside_a_block(head):
    lora = headed()
    with lora.disable_adapter() as model:
        model[2] = new = head()
        before = copy.deepcopy(new.state_dict())
    with pytest.raises(StateError, match=r"'2\.weight', '2\.bias' is gone"):
        lora.set_adapter("a")
    assert lora.unload()[2] is new
    torch.testing.assert_close(new.state_dict(), before, rtol=0, atol=0)
    assert type(model[0]) is nn.Linear


def test_a_norm_that_is_taken_out_inside_a_block():
    lora = convolutional(norm="track")
    with lora.disable_adapter() as model:
        model[1] = nn.Identity()
    assert type(lora.unload()[1]) is nn.Identity


@pytest.mark.parametrize("head", [*HEADS.values(), lambda: nn.Linear(6, 5)], ids=[*HEADS, "another shape"])
def test_merging_for_good_beside_a_new_head_keeps_the_update(head):
    lora = headed()
    model = lora.model.double()
    with torch.no_grad():
        model[0].lora_B["a"].normal_()
    x = torch.randn(3, 4).double()
    hidden = model[0](x)
    model[2] = new = head().double()
    expected = model(x)
    assert lora.merge_and_unload()[2] is new
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model[0](x), hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda lora: lora.pack("a"), id="pack"),
        pytest.param(lambda lora: lora.save_adapter("unwritten"), id="save"),
        pytest.param(lambda lora: lora.merge_adapter(), id="merge"),
        pytest.param(lambda lora: lora.merge_and_unload(), id="merge for good"),
    ],
)
def test_an_adapted_layer(call):
    lora = headed()
    lora.model[0] = new = nn.Linear(4, 6)
    weight = new.weight.detach().clone()
    with pytest.raises(StateError, match=r"The update of '0' by the adapter 'a' is gone: the layer was replaced"):
        call(lora)
    lora.unload()
    assert torch.equal(new.weight, weight)
    assert type(lora.model[2]) is nn.Linear


def tied() -> LoraModel:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    return LoraModel(model, LoraConfig(r=2, init="none"), "a")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda lora: lora.pack("a"), id="pack"),
        pytest.param(lambda lora: lora.add_weighted_adapter(["a"], [2.0], "b"), id="combine"),
    ],
)
def test_tensors_of_an_adapter_that_layers_do_not_share_any_more(call):
    lora = tied()
    lora.model.load_state_dict(copy.deepcopy(lora.model.state_dict()), assign=True)
    x = torch.randn(3, 4).double()
    lora.model(x).sum().backward()
    torch.optim.SGD(lora.model.parameters(), lr=0.1).step()
    expected = lora.model(x)
    with pytest.raises(StateError, match="'2' had the tensors of '0' when the adapter 'a' was added"):
        call(lora)
    torch.testing.assert_close(lora.merge_and_unload()(x), expected, rtol=1e-12, atol=1e-12)


def test_a_layer_that_had_the_tensors_of_another_one():
    lora = tied()
    lora.model[2] = nn.Linear(4, 4).double()
    lora.pack("a")


NEW_LAYERS = {
    "alike": lambda: nn.Linear(4, 6),
    "of another shape": lambda: nn.Linear(4, 5),
    "without a weight": nn.Identity,
}


@pytest.mark.parametrize("end", ["unmerge_adapter", "unload"])
@pytest.mark.parametrize("make", NEW_LAYERS.values(), ids=NEW_LAYERS)
def test_an_adapted_layer_while_its_update_is_merged(make, end):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    other = model[2].weight.detach().clone()
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    lora.merge_adapter()
    model[0] = new = make()
    before = copy.deepcopy(new.state_dict())
    getattr(lora, end)()
    assert model[0] is new
    torch.testing.assert_close(new.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(model[2]._parameters["weight"], other)


def test_an_update_that_was_merged_into_a_layer_that_is_gone():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    lora.merge_adapter()
    model[0] = nn.Linear(4, 6)
    with pytest.raises(StateError, match=r"The update of '0' by the adapter 'a' is gone: the layer was replaced"):
        lora.merge_and_unload()


def test_a_merged_weight_that_is_computed_from_now_on():
    model = nn.Sequential(nn.Linear(4, 6))
    lora = LoraModel(model, LoraConfig(r=2), "a")
    lora.merge_adapter()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(StateError, match=r"'weight' of '0' was taken away while the layer is adapted"):
        lora.unmerge_adapter()


def test_adapted_layers_that_change_places_while_merged():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layers = [*model]
    before = [layer.weight.detach().clone() for layer in layers]
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    lora.merge_adapter()
    model[0], model[1] = layers[1], layers[0]
    lora.unmerge_adapter()
    assert all(torch.equal(layer._parameters["weight"], weight) for layer, weight in zip(layers, before, strict=True))


def test_a_part_that_is_fused_into_another(tmp_path):
    """As by reparameterize_model of timm, in place."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.Linear(6, 2))
    lora = LoraModel(model, LoraConfig(r=2), "a")
    model[0] = nn.Linear(4, 6).requires_grad_(False)
    with pytest.raises(StateError, match=r"The update of '0\.0' by the adapter 'a' is gone"):
        lora.save_adapter(tmp_path / "adapter")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("first", [True, False], ids=["after_it", "ahead_of_it"])
def test_an_adapted_layer_that_is_copied_within_the_model(tmp_path, first):
    model = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(4, 4)), nn.Identity())
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    place = 2 if first else 0
    model[place] = copy.deepcopy(model[1])
    with pytest.raises(StateError, match=rf"'{place}\.0' were copied after .* 'a' was added, .* from '1\.0'"):
        lora.save_adapter(tmp_path / "adapter")
    assert not any(tmp_path.iterdir())
    x = torch.ones(2, 4)
    expected = model(x)
    torch.testing.assert_close(lora.merge_and_unload()(x), expected)


def test_an_adapted_layer_that_is_copied_over_another():
    """As by a continual learner, whose frozen copy is made anew when training starts."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    model[1] = copy.deepcopy(model[0])
    with pytest.raises(StateError, match=r"'1' were copied after the adapter 'a' was added, as '1' from '0', .* setup"):
        lora.pack("a")


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda lora: lora.pack("a"), id="save"),
        pytest.param(lambda lora: lora.add_weighted_adapter(["a", "b"], [1, 1], "c"), id="combine"),
    ],
)
def test_an_adapted_layer_that_is_put_into_another_module(call):
    """Files and other adapters speak of it by a name that it does not have any more; a merge does not."""
    model = nn.Sequential(nn.Linear(4, 6)).eval()
    lora = LoraModel(model, LoraConfig(r=2, init="none"), "a")
    lora.add_adapter("b", LoraConfig(r=2))
    x = torch.ones(2, 4)
    expected, model[0] = model(x), nn.Sequential(model[0])
    with pytest.raises(StateError, match=r"1 layer has another name .* adapter 'a' .* as '0', which is '0\.0' now"):
        call(lora)
    lora.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    lora.unmerge_adapter()
    model[0] = model[0][0]
    call(lora)


def convolutional(**fields) -> LoraModel:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)).eval()
    return LoraModel(model, LoraConfig(r=2, init="none", **fields), "a")


REPLACED = {
    "synchronized": nn.SyncBatchNorm.convert_sync_batchnorm,
    "another": lambda model: model.__setitem__(1, nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_norm_that_stands_still(replace):
    lora = convolutional()
    replace(lora.model)
    with pytest.raises(StateError, match=r"'1' replaced norms that are frozen for .*convert_sync_batchnorm"):
        lora.pack("a")
    lora.set_adapter("a")  # as any call, it makes them stand still
    assert not lora.model.train()[1].training
    lora.pack("a")
    assert type(lora.unload()[1]) in (nn.SyncBatchNorm, nn.BatchNorm1d)


@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_a_norm_that_moves(replace):
    lora = convolutional(norm="track")
    replace(lora.model)
    lora.model[1].running_mean.fill_(3.0)
    assert lora.pack("a").tensors["value/1.running_mean"].eq(3).all()


def test_a_norm_without_statistics_in_its_place():
    lora = convolutional()
    lora.model[1] = nn.GroupNorm(2, 4)
    lora.pack("a")
