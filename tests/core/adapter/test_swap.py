"""Hot swap: after it, the model is what it would be with the saved adapter, and nothing was compiled again."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError, VariantPlugin
from tests.core.registries import registry_of
from tests.state.interrupted import passed, stopped

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = {"target_modules": ["0", "2"]}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()


def adapted(seed=1, model=None, name="a", **fields) -> LoraModel:
    lora = LoraModel(base() if model is None else model, LoraConfig(**{"r": 4, **TARGETS, **fields}), name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in lora.model.named_parameters():
            if parameter.requires_grad or f".{name}" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4)
    return lora


@pytest.fixture
def saved(tmp_path):
    def save(**fields):
        other = adapted(seed=2, **fields)
        other.save_adapter(tmp_path / "other")
        return tmp_path / "other", other.model(X)

    return save


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


FITTING = {
    "same": ({}, {}),
    "smaller-rank": ({}, {"r": 2}),
    "other-scaling": ({}, {"alpha": 3.0, "use_rslora": True}),
    "fewer-layers": ({}, {"target_modules": ["2"]}),
    "other-ranks": ({}, {"rank_pattern": {"0": 1}}),
    "dora": ({"variant": "dora"}, {"variant": "dora", "r": 2}),
    "biases": ({"bias": "lora_only"}, {"bias": "lora_only", "r": 1}),
    "heads": (
        {"target_modules": ["0"], "modules_to_save": ["2"]},
        {"target_modules": ["0"], "modules_to_save": ["2"], "r": 3},
    ),
}


@pytest.mark.parametrize(("own", "other"), FITTING.values(), ids=FITTING)
def test_it_computes_what_the_saved_one_does(own, other, saved):
    path, expected = saved(**other)
    lora = adapted(**own)
    parameters = dict(lora.model.named_parameters())
    lora.swap_adapter("a", path)
    close(lora.model(X), expected)
    assert {name: id(p) for name, p in lora.model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert lora.adapters["a"].r == 4
    close(lora.merge_and_unload()(X), expected)


@pytest.mark.parametrize(("own", "other"), FITTING.values(), ids=FITTING)
def test_one_that_is_not_active_waits_with_the_new_values(own, other, saved):
    path, expected = saved(**other)
    lora = adapted(name="first", r=1)
    adapted(model=lora.model, **own)
    before = lora.model(X)
    lora.swap_adapter("a", path)
    assert torch.equal(lora.model(X), before)
    lora.set_adapter("a")
    close(lora.model(X), expected)


def test_one_that_is_not_active_is_what_it_was_where_the_swap_is_stopped(saved):
    path, _ = saved(**FITTING["heads"][1])
    lora = adapted(name="first", r=1)
    adapted(model=lora.model, **FITTING["heads"][0])

    def swap(model):
        return lambda: LoraModel(model).swap_adapter("a", path)

    def tensors(model):
        return LoraModel(model).pack("a").tensors

    swap(copy.deepcopy(lora.model))()  # what is made once is there from now on
    lines = passed(swap(copy.deepcopy(lora.model)))
    for at in [at for at, line in enumerate(lines) if "swap.py" in line][-12:]:
        model = copy.deepcopy(lora.model)
        where, raised = stopped(swap(model), at)
        assert raised
        for key, value in tensors(lora.model).items():
            assert torch.equal(tensors(model)[key], value), f"{key} at {where}"


def test_what_was_compiled_stays_compiled(saved):
    path, expected = saved(r=2, alpha=3.0)
    lora, counter = adapted(), CompileCounter()
    compiled = torch.compile(lora.model, backend=counter)
    with torch.no_grad():
        compiled(X)
        frames = counter.frame_count
        lora.swap_adapter("a", path)
        close(compiled(X), expected)
    assert frames > 0
    assert counter.frame_count == frames


def test_what_is_saved_afterwards_is_the_same_adapter(saved, tmp_path):
    path, expected = saved(r=2)
    lora = adapted()
    lora.swap_adapter("a", path)
    lora.save_adapter(tmp_path / "again")
    close(LoraModel.load_adapter(base(), tmp_path / "again").model(X), expected)


def test_a_backward_through_the_former_values_is_an_error(saved):
    path, _ = saved()
    lora = adapted()
    loss = lora.model(X).sum()
    lora.swap_adapter("a", path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


REFUSED = {
    "higher-rank": ({"r": 2}, {}, "its rank on '0' is 4, and that of the one that is there 2"),
    "more-layers": ({"target_modules": ["0"]}, {}, "it adapts '2', which the one that is there does not"),
    "variant": ({}, {"variant": "dora"}, "it is of the variant 'dora', and the one that is there 'lora'"),
    "fewer-layers-of-a-variant": (
        {"variant": "dora"},
        {"variant": "dora", "target_modules": ["0"]},
        "a variant has to be on all layers, and '2' lack it",
    ),
    "heads": (
        {"target_modules": ["0"]},
        {"target_modules": ["0"], "bias": "lora_only"},
        "only one of the two has values of '0.bias'",
    ),
    "changed-base": ({}, {"init": "pissa"}, "the init 'pissa' has changed the base"),
}


@pytest.mark.parametrize(("own", "other", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(own, other, message, saved):
    path, _ = saved(**other)
    lora = adapted(**own)
    before = lora.model(X)
    with pytest.raises(AdapterFileError, match=message):
        lora.swap_adapter("a", path)
    assert torch.equal(lora.model(X), before)


class ByRank(VariantPlugin):
    """Scales the update by the rank, which is that of A: rows of zeros count."""

    name = "by_rank"

    def shapes(self, rows, columns, r):
        return {}

    def first_values(self, weight, A, B, scaling):
        return {}

    def delta_weight(self, weight, A, B, scaling, own):
        return len(A) * scaling * (B @ A)


@pytest.mark.parametrize("other", [{"r": 2}, {"alpha": 3.0}], ids=str)
def test_a_variant_that_does_more_than_rescale_rows_keeps_rank_and_scaling(other, tmp_path):
    registry = registry_of(ByRank())

    def saved(name, seed, **fields):
        model = base()
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, **TARGETS, "init": "none", "variant": "by_rank", **fields})
        lora = LoraModel(model, config, registry=registry)
        lora.save_adapter(tmp_path / name)
        return lora

    saved("other", 1, **other)
    own, alike = saved("own", 2), saved("alike", 3)
    before = own.model(X)
    with pytest.raises(AdapterFileError, match=r"its rank or scaling on '0' differs, on which .* 'by_rank' may"):
        own.swap_adapter("default", tmp_path / "other")
    close(own.model(X), before)
    own.swap_adapter("default", tmp_path / "alike")
    close(own.model(X), alike.model(X))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    ("own", "other"), [(["first", "second"], ["first"]), (["first"], ["first", "second"])], ids=["more", "fewer"]
)
def test_one_that_adapts_other_layers_with_the_weight_that_they_share_is_refused(own, other, tmp_path):
    adapted(seed=2, model=Tied().double(), target_modules=other).save_adapter(tmp_path / "other")
    lora = adapted(model=Tied().double(), target_modules=own)
    before = lora.model(X)
    with pytest.raises(AdapterFileError, match="only one of the two adapts 'second' with 'first', whose weight they"):
        lora.swap_adapter("a", tmp_path / "other")
    assert torch.equal(lora.model(X), before)


def test_one_that_adapts_other_parts_is_refused(tmp_path):
    def attention(*parts):
        torch.manual_seed(0)
        model = nn.ModuleDict({"own": nn.MultiheadAttention(8, 2)})
        return LoraModel(model, LoraConfig(r=2, target_modules=["own"], fused_parts={"own": [*parts]}), "a")

    attention("q", "v").save_adapter(tmp_path)
    with pytest.raises(AdapterFileError, match="it adapts other parts of 'own'"):
        attention("q", "k").swap_adapter("a", tmp_path)


def test_another_scaling_is_as_exact_as_the_model(saved):
    narrow = adapted(seed=2, model=base().float(), alpha=3.0)
    path = narrow.save_adapter(saved()[0].parent / "narrow")
    expected = LoraModel.load_adapter(base(), path).model(X)
    lora = adapted(r=7)
    lora.swap_adapter("a", path)
    close(lora.model(X), expected)


def test_an_unknown_name_is_refused(saved):
    path, _ = saved()
    with pytest.raises(StateError, match="no adapter 'b'"):
        adapted().swap_adapter("b", path)


@pytest.mark.parametrize("state", ["merged", "block"])
def test_it_is_refused_while_the_values_do_not_act(state, saved):
    path, _ = saved()
    lora = adapted()
    before = copy.deepcopy(lora.model.state_dict())
    if state == "merged":
        lora.merge_adapter()
        with pytest.raises(StateError, match="Swapping an adapter's tensors is not possible while 'a' is merged"):
            lora.swap_adapter("a", path)
        lora.unmerge_adapter()
    else:
        with lora.disable_adapter(), pytest.raises(StateError, match="is not possible inside disable_adapter"):
            lora.swap_adapter("a", path)
    assert all(torch.equal(value, before[key]) for key, value in lora.model.state_dict().items())
