"""Weights of adapted layers that a module writes by hand: the run stops, since what it writes would be lost."""

import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, linear, mse_loss, one_hot

from lora_plugins import LoraConfig, LoraModel, StateError
from tests.integrations.lightning.toys import Classifier, differing, values
from tests.integrations.lightning.training.training_cases import fit, learned


def copy_data(codes, new):
    codes.weight.data.copy_(new)


def set_data(codes, new):
    codes.weight.data = new


def copy_without_gradients(codes, new):
    with torch.no_grad():
        codes.weight.copy_(new)


def replace_dead_rows(codes, new):
    weight = codes.weight.detach()
    weight[:2] = new[:2]


class Quantized(Classifier):
    """With the codebook of a VQ-VAE, moved by averages of what is assigned to each code (arXiv 1711.00937)."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.codes = nn.Embedding(5, 16).requires_grad_(False)
        self.register_buffer("sums", self.codes.weight.clone())

    def forward(self, x):
        x = self.net[:3](x)
        nearest = torch.cdist(x, self.codes.weight).argmin(1)
        codes = self.codes(nearest)
        if self.training and torch.is_grad_enabled():
            self.sums.mul_(0.9).add_(one_hot(nearest, 5).float().T @ x.detach(), alpha=0.1)
            self.write(self.codes, self.sums.clone())
        return self.net[3:](x + (codes - x).detach()) + 0 * mse_loss(x, codes.detach())


class Bounded(Classifier):
    """Keeps a weight from below zero after each step, as networks that are convex in their input do."""

    def on_before_zero_grad(self, _):
        self.net[3].weight.data.clamp_(0)


class BoundedAfter(Classifier):
    """Does it when all callbacks are done with the batch."""

    def on_train_batch_end(self, *_):
        self.net[3].weight.data.clamp_(0)


class BoundedBefore(Classifier):
    """Does it ahead of each forward, which then reads the weight without the layer."""

    def forward(self, x):
        self.net[3].weight.data.clamp_(0)
        return linear(self.net[:3](x), self.net[3].weight)


class Ensemble(Classifier):
    """Runs copies of its head that differ a little, all at once."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        values = {name: torch.stack([p, 1.01 * p]) for name, p in self.named_parameters() if p.requires_grad}

        def loss(values):
            return cross_entropy(functional_call(ByWeight(self), values, (x,)), y)

        return vmap(loss)({f"module.{name}": p for name, p in values.items()}).mean()


class ByWeight(nn.Module):
    """Reads the weight of the head of a module."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        net = self.module.net
        return linear(net[:3](x), net[3].weight)


class BoundedByItsNorm(Classifier):
    """Divides a weight by its norm after each step: the argument is read after the tensor that is written into."""

    def on_before_zero_grad(self, _):
        self.net[3].weight.data.div_(self.net[3].weight.norm())


class AdaptsALayerLater(BoundedAfter):
    """Adapts the layer in a hook, when there are optimizers."""

    def on_fit_start(self):
        lora = LoraModel(self)
        lora.add_adapter("later", LoraConfig(r=2, target_modules=["net.3"]))
        lora.set_adapter(["default", "later"])


class ReadsAtLength(Classifier):
    """Uses a weight in a loop, without the layer, and computes with copies of it."""

    def forward(self, x):
        self.net[3].weight.detach().clone().clamp_(0)
        return sum(linear(self.net[:3](x), self.net[3].weight) for _ in range(3))


class MakesOptimizersAnew(Classifier):
    """Does so in its second epoch, and notes whether a weight that it has read is kept."""

    def forward(self, x):
        weight = self.net[3].weight
        self.read = weakref.ref(weight)
        return linear(self.net[:3](x), weight)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_epoch_end(self):
        self.is_kept = self.read() is not None


WRITES = [copy_data, set_data, copy_without_gradients, replace_dead_rows]


@pytest.mark.parametrize("write", WRITES)
def test_codebook_that_is_moved_by_hand_stops_the_run(tmp_path, write):
    with pytest.raises(StateError, match=r"writes into .codes\.weight. .* exclude_modules"):
        fit(tmp_path, Quantized(write), LoraConfig(r=2, target_modules="all"))


@pytest.mark.parametrize("write", WRITES)
def test_it_moves_as_ever_where_it_is_excluded(tmp_path, write):
    module = Quantized(write)
    before = values(module)
    fit(tmp_path, module, LoraConfig(r=2, target_modules="all", exclude_modules=["codes"]))
    assert "codes.weight" in differing(before, values(module))


@pytest.mark.parametrize("kind", [Bounded, BoundedBefore, BoundedAfter, BoundedByItsNorm])
def test_weight_that_is_kept_in_bounds_stops_the_run(tmp_path, kind):
    with pytest.raises(StateError, match=r"writes into .net\.3\.weight. .* in modules_to_save"):
        fit(tmp_path, kind())


@pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "on_train_start", "on_train_epoch_start"])
def test_weight_that_a_hook_writes_before_training_stops_the_run(tmp_path, hook):
    def write(self):
        copy_without_gradients(self.net[3], torch.ones(()))
        return getattr(Classifier, hook)(self)

    writing = type("Writing", (Classifier,), {hook: write})
    with pytest.raises(StateError, match=r"writes into .net\.3\.weight. .* load_state_dict"):
        fit(tmp_path, writing())


def test_it_is_kept_in_bounds_where_it_is_trained_in_full(tmp_path):
    module = BoundedAfter()
    before = values(module)
    fit(tmp_path, module, LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"]))
    assert (module.net[3].weight >= 0).all()
    assert "net.3.bias" in differing(before, values(module))


def test_one_batch_is_enough_to_see_it(tmp_path):
    with pytest.raises(StateError, match=r"writes into .net\.3\.weight. "):
        fit(tmp_path, BoundedAfter(), max_steps=1)


def test_weight_of_a_layer_that_a_hook_adapts_stops_the_run(tmp_path):
    with pytest.raises(StateError, match=r"writes into .net\.3\.weight. "):
        fit(tmp_path, AdaptsALayerLater(), LoraConfig(r=2, target_modules=["net.0"]))


@pytest.mark.parametrize("kind", [ReadsAtLength, Ensemble])
def test_weight_that_is_only_read_does_not(tmp_path, kind):
    module = kind()
    fit(tmp_path, module)
    assert learned(module)


def test_readings_are_not_kept_where_optimizers_are_made_anew(tmp_path):
    module = MakesOptimizersAnew()
    fit(tmp_path, module, max_epochs=2)
    assert not module.is_kept
