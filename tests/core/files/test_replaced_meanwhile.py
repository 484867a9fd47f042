"""Adapters that another process replaces while they are read: it is the old one or the new one."""

import pytest
import torch
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from tests.state.interrupted import passed, traced

X = torch.ones(2, 4)
FORMATS = {
    "lora_plugins": ("adapter", {}, "files/folder.py"),
    "peft": ("adapter", {}, "formats/tensor_file.py"),
    "kohya": ("adapter.safetensors", {"component": "unet"}, "formats/tensor_file.py"),
}
"""The name of a file or folder, options, and which of our files has the lines that read it; by format."""


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4))


def adapted(alpha):
    lora = LoraModel(base(), LoraConfig(r=2, alpha=alpha, init="none"))
    with torch.no_grad():
        lora.model[0].lora_B["default"].mul_(alpha)
    return lora


@pytest.mark.parametrize("format", FORMATS)
def test_one_of_them_is_read_whole(tmp_path, format):
    name, options, reader = FORMATS[format]
    old, new = adapted(2.0), adapted(16.0)
    outputs = [each.model(X) for each in (old, new)]
    replaced = False

    def write(lora):
        lora.save_adapter(tmp_path / name, format=format, format_options=options)

    def read():
        return LoraModel.load_adapter(base(), tmp_path / name, format=format, format_options=options).model(X)

    def replacing_at(line):
        count = 0

        def before_each_line(_):
            nonlocal count, replaced
            count += 1
            if count == line + 1:
                write(new)
                replaced = True

        return before_each_line

    write(old)
    lines = passed(read)
    last = {line: at for at, line in enumerate(lines) if line.startswith(reader)}
    for line in last.values():
        write(old)
        replaced = False
        with traced(replacing_at(line)):
            found = read()
        assert replaced, lines[line]
        assert any(torch.equal(found, output) for output in outputs), lines[line]
