"""A model whose last reference goes is freed at once: nothing of ours waits for Python's collector with it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from lora_plugins import LoraConfig, LoraModel

X = torch.randn(2, 8)


def save(lora, folder):
    lora.save_adapter(folder / "a")


def load(lora, folder):
    lora.save_adapter(folder / "a")
    LoraModel.load_adapter(lora.model, folder / "a", "b")


def open_blocks(lora, _):
    lora.model.eval()
    with lora.disable_adapter(), lora.mixed_batch(["default", None]):
        lora.model(X)


def train(lora, _):
    lora.model(X).sum().backward()


def merge_for_now(lora, _):
    lora.merge_adapter()
    lora.model.eval()(X)
    lora.unmerge_adapter()


def fail(lora, _):
    with pytest.raises(ValueError, match="rank"):
        lora.add_adapter("b", LoraConfig(r=2, target_modules=["0"], rank_pattern={"9": 1}))


DONE = {
    "nothing": lambda *_: None,
    "saved": save,
    "loaded": load,
    "blocks": open_blocks,
    "trained": train,
    "merged for now": merge_for_now,
    "merged for good": lambda lora, _: lora.merge_and_unload(),
    "unloaded": lambda lora, _: lora.unload(),
    "an error": fail,
}
CONFIGS = {
    "plain": {},
    "dora": {"variant": "dora"},
    "dropout": {"dropout": 0.1},
    "low memory": {"memory": "low"},
    "a head": {"modules_to_save": ["2"], "target_modules": ["0"]},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("done", DONE.values(), ids=DONE)
def test_a_model_is_freed_without_the_collector(done, config, tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    lora = LoraModel(model, LoraConfig(**{"r": 2, "target_modules": ["0", "2"], **config}))
    gc.collect()
    gc.disable()
    try:
        done(lora, tmp_path)
        left = [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
        del model, lora
        assert [reference() for reference in left if reference() is not None] == []
    finally:
        gc.enable()


def parametrize_later(lora, _):
    with lora.disable_adapter():
        parametrizations.weight_norm(lora.model[2], "bias", dim=None)
    lora.model(X)
    lora.delete_adapter("default")


COMPUTED, PLAIN = LoraConfig(r=2, target_modules=["0"]), LoraConfig(r=2, target_modules=["2"], modules_to_save=["1"])
STORED = LoraConfig(target_modules=["2"], bias="all", quantize="nf4", quantize_options={"min_size": 0})


def adapted(config, do):
    return lambda model, folder: do(LoraModel(model, config), folder)


PARAMETRIZED = {
    "planned": lambda model, _: LoraModel.plan(model, COMPUTED),
    "saved": adapted(COMPUTED, save),
    "trained": adapted(COMPUTED, train),
    "merged for now": adapted(COMPUTED, merge_for_now),
    "merged for good": adapted(COMPUTED, lambda lora, _: lora.merge_and_unload()),
    "unloaded": adapted(COMPUTED, lambda lora, _: lora.unload()),
    "blocks": adapted(PLAIN, open_blocks),
    "stored": adapted(STORED, train),
    "parametrized later": adapted(PLAIN, parametrize_later),
}


@pytest.mark.parametrize("do", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_layers_with_a_class_of_their_own_are_freed(do, tmp_path):
    """Torch makes a class for each parametrized layer, which holds the layer."""
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(8, 8)),
        parametrizations.weight_norm(nn.BatchNorm1d(8), dim=None),
        nn.Linear(8, 4),
    )
    do(model, tmp_path)
    left = [weakref.ref(each) for each in (*model.modules(), *model.parameters())]
    del model
    gc.collect()
    assert [reference() for reference in left if reference() is not None] == []


def test_nothing_is_left_at_a_class_of_many_layers():
    class Own(nn.Linear):
        pass

    before = dict(vars(Own))
    LoraModel(nn.Sequential(Own(8, 8)), COMPUTED).unload()
    assert vars(Own) == before


def test_nothing_is_left_at_the_class_of_all_parametrizations():
    before = {*vars(ParametrizationList)}
    model = nn.Sequential(nn.Linear(8, 8), parametrizations.weight_norm(nn.Linear(8, 4))).eval()
    lora = LoraModel(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    with lora.mixed_batch(["default", None]):
        model(torch.ones(2, 8))
    assert {*vars(ParametrizationList)} == before


def delete(lora):
    lora.delete_adapter("b")


def load_anew(lora):
    lora.model.load_state_dict({name: tensor.clone() for name, tensor in lora.model.state_dict().items()}, assign=True)
    lora.delete_adapter("b")


def handles():
    gc.collect()
    return sum(type(each) is RemovableHandle for each in gc.get_objects())  # `isinstance` imports what is lazy


@pytest.mark.parametrize("end", [delete, load_anew])
def test_nothing_is_kept_of_adapters_that_came_and_went(end):
    lora = LoraModel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), LoraConfig(r=2))

    def come_and_go():
        lora.add_adapter("b", LoraConfig(r=2))
        lora.set_adapter("b")
        lora.set_adapter("default")
        end(lora)

    come_and_go()
    before = handles()
    for _ in range(9):
        come_and_go()
    assert handles() == before
