"""Fingerprints: one weight is recognized through rounding, and no other weight is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.files import same
from lora_plugins.files.fingerprint import fingerprint

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@pytest.mark.parametrize("shape", [(1,), (8, 3), (64, 3, 7, 7), (5000,), (4093,), (4094,)])
def test_a_weight_is_itself(shape):
    weight = torch.randn(shape)
    assert fingerprint(weight) == fingerprint(weight.clone())
    assert same(fingerprint(weight), fingerprint(weight))


def test_it_is_the_one_of_all_releases():
    """Files hold it: this test changes with their format only."""
    weight = (torch.arange(5000, dtype=torch.float64) * 0.7).sin().view(50, 100)
    known = {
        "norm": 49.99815051041328,
        "dot0": 10.341446333286848,
        "dot1": -5.514092319963071,
        "dot2": 101.93074375596169,
        "dot3": -29.088585249636246,
    }
    assert fingerprint(weight) == pytest.approx(known, rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(shapes, st.integers(0, 1000), st.sampled_from([torch.bfloat16, torch.float16, torch.float64]))
def test_rounding_is_forgiven(shape, seed, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    assert same(fingerprint(weight), fingerprint(weight.to(dtype)))


@settings(max_examples=50, deadline=None)
@given(st.integers(30, 300), st.integers(0, 1000))
def test_two_independent_weights_differ(size, seed):
    first, second = torch.randn(2, size, 20, generator=torch.Generator().manual_seed(seed))
    assert not same(fingerprint(first), fingerprint(second))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: -w, id="negated"),
        pytest.param(lambda w: w * 1.05, id="scaled"),
        pytest.param(lambda w: w.flip(0), id="rows reversed"),
        pytest.param(lambda w: w.T.contiguous(), id="transposed"),
        pytest.param(lambda w: w + 0.1 * torch.randn_like(w), id="trained further"),
        pytest.param(torch.zeros_like, id="zero"),
        pytest.param(lambda w: w.masked_fill(w == w.max(), float("nan")), id="not a number"),
    ],
)
def test_a_changed_weight_differs(change):
    weight = torch.randn(64, 64)
    assert not same(fingerprint(weight), fingerprint(change(weight)))


def test_a_weight_of_zeros_is_only_itself():
    zero = fingerprint(torch.zeros(3, 3))
    assert same(zero, fingerprint(torch.zeros(3, 3)))
    assert not same(zero, fingerprint(torch.full((3, 3), 1e-6)))


def test_it_draws_no_random_number_of_the_user():
    before = torch.get_rng_state()
    fingerprint(torch.ones(3))
    assert torch.equal(before, torch.get_rng_state())


def test_a_pruned_weight_is_told_by_what_is_left_of_it(tmp_path):
    def build(row):
        torch.manual_seed(0)
        mask = torch.ones(64, 64)
        mask[row] = 0
        return nn.Sequential(prune.custom_from_mask(nn.Linear(64, 64), "weight", mask))

    LoraModel(build(0), LoraConfig(r=2)).save_adapter(tmp_path)
    LoraModel.load_adapter(build(0), tmp_path)
    with pytest.raises(AdapterFileError, match="was trained on another base"):
        LoraModel.load_adapter(build(1), tmp_path)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_a_weight_of_spectral_norm_is_told_by_what_it_is_computed_from(normalize, tmp_path):
    """The weight moves with each forward in training, and the layer is the same."""

    def build(seed=0):
        torch.manual_seed(seed)
        return nn.Sequential(normalize(nn.Linear(64, 64)))

    model = build()
    for _ in range(3):
        model.train()(torch.randn(2, 64))
    LoraModel(model, LoraConfig(r=2)).save_adapter(tmp_path)
    LoraModel.load_adapter(build(), tmp_path)
    with pytest.raises(AdapterFileError, match="was trained on another base"):
        LoraModel.load_adapter(build(seed=1), tmp_path)
