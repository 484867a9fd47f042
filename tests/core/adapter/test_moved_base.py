"""What has moved of the base and the adapter does not hold, such as buffers of layers: `save_adapter` names it."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lora_plugins import LoraConfig, LoraModel

CODEBOOK = r"does not hold '1\.entries', which have changed"


class Codebook(nn.Module):
    """The nearest entry to each row; the entries follow the rows in training, as in a VQ-VAE."""

    def __init__(self, replaces=False):
        super().__init__()
        self.replaces = replaces
        self.register_buffer("entries", torch.randn(5, 6))

    def forward(self, x):
        nearest = torch.cdist(x, self.entries).argmin(1)
        if self.training:
            moved = self.entries.index_add(0, nearest, 0.1 * (x - self.entries[nearest]).detach())
            if self.replaces:
                self.entries = moved
            else:
                self.entries.copy_(moved)
        return x + (self.entries[nearest] - x).detach()


def build(**options):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), Codebook(**options), nn.BatchNorm1d(6), nn.Linear(6, 2))


def trained(model, **fields):
    lora = LoraModel(model, LoraConfig(r=2, init="gaussian", **fields))
    model.train()(torch.randn(8, 4))
    model.eval()
    return lora


@pytest.mark.parametrize("replaces", [False, True], ids=["written", "replaced"])
def test_is_named(tmp_path, replaces):
    lora = trained(build(replaces=replaces))
    with pytest.warns(UserWarning, match=CODEBOOK) as caught:
        lora.save_adapter(tmp_path)
    assert [entry.filename for entry in caught] == [__file__]
    assert "'2." not in str(caught[0].message)  # the norm stands still


def test_is_saved_with_its_module(tmp_path):
    lora, x = trained(build(), modules_to_save=["1"]), torch.randn(3, 4)
    lora.save_adapter(tmp_path)
    fresh = build().eval()
    LoraModel.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), lora.model(x))


def test_each_adapter_counts_from_its_own_beginning(tmp_path):
    lora = trained(build())
    lora.add_adapter("later", LoraConfig(r=2, norm="track"))
    lora.save_adapter(tmp_path / "later", "later")
    with pytest.warns(UserWarning, match=CODEBOOK):
        lora.save_adapter(tmp_path / "first", "default")


@torch.no_grad()
def normalize(model):
    """As nViT does after each step: what `weight` answers with goes into the frozen weight, update and all."""
    model[0]._parameters["weight"].copy_(nn.functional.normalize(model[0].weight))


@torch.no_grad()
def clamp(model):
    """As the critic of a WGAN."""
    for parameter in model.parameters():
        parameter.clamp_(-0.1, 0.1)


@torch.no_grad()
def shrink_biases(model):
    model[3].bias.mul_(0.9)


@pytest.mark.parametrize(
    ("write", "names"),
    [(normalize, r"'0\.weight'"), (clamp, r"'0\.weight', '0\.bias', '2\.weight'"), (shrink_biases, r"'3\.bias'")],
    ids=["normalized", "clamped", "bias"],
)
def test_frozen_weights_that_something_wrote_into_are_named(tmp_path, write, names):
    lora = LoraModel(build(), LoraConfig(r=2, init="gaussian"))
    write(lora.model)
    with pytest.warns(UserWarning, match=rf"does not hold {names}.*, which have changed"):
        lora.save_adapter(tmp_path)


def test_what_an_average_rounds_is_not_named(tmp_path):
    lora = LoraModel(build(), LoraConfig(r=2))
    average = AveragedModel(lora.model, avg_fn=lambda mean, value, _: 0.9 * mean + 0.1 * value, use_buffers=True)
    for _ in range(5):
        average.update_parameters(lora.model)
    assert not torch.equal(average.module[1].entries, lora.model[1].entries)
    LoraModel(average.module).save_adapter(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.bfloat16(), id="cast"),
        pytest.param(lambda model: model.load_state_dict(nn.Sequential(*build()).state_dict()), id="the base loaded"),
        pytest.param(lambda model: model[1].register_buffer("count", torch.ones(1)), id="a buffer that is new"),
        pytest.param(lambda model: delattr(model[1], "entries"), id="a buffer that is gone"),
    ],
)
def test_is_not_judged_after(tmp_path, change):
    lora = LoraModel(build(), LoraConfig(r=2))
    change(lora.model)
    lora.save_adapter(tmp_path)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
        torch.empty(0),
        torch.tensor([0, -torch.inf]),
        torch.ones(2, dtype=torch.complex64),
        torch.tensor([True]),
    ],
    ids=["sparse", "meta", "empty", "infinite", "complex", "bool"],
)
def test_buffers_of_other_kinds_are_no_obstacle(tmp_path, buffer):
    model = build()
    model[1].register_buffer("other", buffer)
    LoraModel(model, LoraConfig(r=2)).save_adapter(tmp_path)
