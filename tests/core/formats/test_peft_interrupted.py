"""PEFT's two files of an adapter, which are replaced by those of another one and stopped on the way."""

import os
from contextlib import suppress

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel

X = torch.ones(2, 4)


def adapted(alpha):
    torch.manual_seed(0)
    lora = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, alpha=alpha, init="none"))
    with torch.no_grad():
        lora.model[0].lora_B["default"].mul_(alpha)
    return lora


def loaded(folder):
    torch.manual_seed(0)
    return LoraModel.load_adapter(nn.Sequential(nn.Linear(4, 4)), folder).model(X)


@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
@pytest.mark.parametrize("count", [1, 2])
def test_there_is_one_adapter_and_no_file_of_the_other(tmp_path, monkeypatch, call, count):
    old, new = adapted(2.0), adapted(16.0)
    old.save_adapter(tmp_path, format="peft")
    run, calls = getattr(os, call), []

    def stopped(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(os, call, stopped)
    with suppress(KeyboardInterrupt):
        new.save_adapter(tmp_path, format="peft")
    monkeypatch.undo()
    outputs = [each.model(X) for each in (old, new)]
    found = loaded(tmp_path)
    assert any(torch.equal(found, output) for output in outputs)
    assert len([*tmp_path.iterdir()]) == 2


def test_where_only_the_tensors_change_there_is_an_adapter_at_every_moment(tmp_path, monkeypatch):
    old, new = adapted(2.0), adapted(2.0)
    with torch.no_grad():
        new.model[0].lora_B["default"].mul_(3)
    old.save_adapter(tmp_path, format="peft")
    replace, found = os.replace, []

    def observed(source, target):
        found.append(loaded(tmp_path))
        replace(source, target)
        found.append(loaded(tmp_path))

    monkeypatch.setattr(os, "replace", observed)
    new.save_adapter(tmp_path, format="peft")
    before, after = (each.model(X) for each in (old, new))
    assert [torch.equal(each, before) for each in found] == [True, False, False, False]
    assert all(torch.equal(each, after) for each in found[1:])
