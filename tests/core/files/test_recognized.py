"""Which format a file is of, and the options of a format."""

import pytest
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel
from lora_plugins.files import format_of, options_of
from lora_plugins.plugins import FORMATS, default_registry


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"])
def test_a_pickle_is_refused_by_name(suffix, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    path.write_bytes(b"")
    with pytest.raises(AdapterFileError, match="is a pickle, which can run anything"):
        format_of(path)


def test_a_checkpoint_is_told_which_commands_take_it(tmp_path):
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(AdapterFileError, match=r"Of a training, `lora-plugins export` and `merge` take it\.$"):
        format_of(tmp_path / "last.ckpt")


def test_another_file_is_of_no_format(tmp_path):
    path = tmp_path / "adapter.txt"
    path.write_bytes(b"")
    with pytest.raises(AdapterFileError, match=r"of none of the formats 'lora_plugins', 'peft'.*"):
        format_of(path)


@pytest.mark.parametrize("given", [".", "run", "run/adapter/adapter.json", "run/adapter/notes.txt", "run/m.onnx"])
def test_the_adapter_beside_a_path_is_named(given, tmp_path):
    folder = LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2)).save_adapter(tmp_path / "run" / "adapter")
    (folder / "notes.txt").touch()
    (tmp_path / "run" / "m.onnx").touch()
    with pytest.raises(AdapterFileError, match=f"Name the folder of an adapter: '{folder}'"):
        format_of(tmp_path / given)


@pytest.mark.parametrize("given", [".", "adapter_model.safetensors"], ids=["folder", "file"])
def test_the_file_that_is_not_there_is_named(given, tmp_path):
    """The tensors alone, of which nothing says by what they are scaled."""
    LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2)).save_adapter(tmp_path, format="peft")
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match=r"'adapter_config\.json' is not there, which the format 'peft'"):
        format_of(tmp_path / given)


def test_options(tmp_path):
    LoraModel(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2)).save_adapter(tmp_path / "own")
    own = format_of(tmp_path / "own")
    assert own.name == "lora_plugins"
    assert options_of(own, None) == dict(own.options)
    with pytest.raises(ConfigError, match=r"The format 'lora_plugins' has no option 'file'"):
        options_of(own, {"file": 1})


@pytest.mark.parametrize("given", [None, {}, {"patterns": "exact"}])
def test_options_that_are_given_count(given):
    peft = default_registry().get(FORMATS, "peft")
    assert options_of(peft, given) == {"out_proj": None, "patterns": None, **(given or {})}
