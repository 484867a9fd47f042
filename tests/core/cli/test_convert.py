"""`inspect` and `convert`, by the program itself."""

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.cli.main import main
from tests.core.formats.peft_cases import moved


class Net(nn.Module):
    def __init__(self, width="4"):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.ModuleDict({"q": nn.Linear(int(width), 6), "out": nn.Conv1d(6, 2, 3, padding=1)})
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.attn["out"](self.attn["q"](x).mT).mT)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.again = self.head


NET = f"{Net.__module__}:Net"
X = torch.linspace(-1, 1, 40).view(2, 5, 4)


def adapted(**fields):
    lora = LoraModel(Net().eval(), LoraConfig(r=2, **fields))
    moved(lora.model)
    return lora


@pytest.fixture
def lora():
    return adapted(alpha=3.0, target_modules=["q", "out"], modules_to_save=["head"])


@pytest.fixture
def linear():
    return adapted(target_modules=["q"])


def convert(source, target, *arguments):
    """The exit status of the command."""
    return main(["convert", str(source), str(target), "--to", *map(str, arguments)])


def loaded(path):
    model = Net().eval()
    LoraModel.load_adapter(model, path)
    return model(X)


class TestConvert:
    @pytest.mark.parametrize("target", ["peft", "lora_plugins"])
    @pytest.mark.parametrize("source", ["peft", "lora_plugins"])
    def test_with_a_model(self, source, target, lora, tmp_path, capsys):
        lora.save_adapter(tmp_path / "a", format=source)
        assert convert(tmp_path / "a", tmp_path / "b", target, "--model", NET, "4") == 0
        out = capsys.readouterr().out
        assert f"in the format '{target}'" in out
        assert ("weights that this model had" in out) == (target == "lora_plugins")
        torch.testing.assert_close(loaded(tmp_path / "b"), lora.model(X), rtol=0, atol=1e-6)  # float32

    def test_with_weights(self, lora, tmp_path):
        """`pissa` needs those of the base."""
        base = Net()
        with torch.no_grad():
            base.attn["q"].weight.add_(1)
        save_file(base.state_dict(), tmp_path / "base.safetensors")
        lora = LoraModel(base.eval(), LoraConfig(r=2, target_modules=["q"], init="pissa"))
        lora.save_adapter(tmp_path / "a")
        arguments = [tmp_path / "a", tmp_path / "b", "peft", "--model", NET]
        assert convert(*arguments) == 1
        assert not (tmp_path / "b").exists()
        assert convert(*arguments, "--weights", tmp_path / "base.safetensors") == 0
        assert (tmp_path / "b" / "adapter_config.json").is_file()

    def test_weights_with_one_name_of_a_shared_tensor(self, tmp_path):
        """As `save_pretrained` of transformers and `save_model` of safetensors write them."""
        config = LoraConfig(r=2, target_modules=["q"], init="pissa")
        LoraModel(Tied(), config).save_adapter(tmp_path / "a")
        save_model(Tied(), tmp_path / "base.safetensors")
        made = f"{Tied.__module__}:Tied"
        weights = tmp_path / "base.safetensors"
        assert convert(tmp_path / "a", tmp_path / "b", "peft", "--model", made, "--weights", weights) == 0

    def test_weights_of_another_model(self, linear, tmp_path, capsys):
        linear.save_adapter(tmp_path / "a", format="peft")
        weights = tmp_path / "b.safetensors"
        save_file({**Net().state_dict(), "head.bias": torch.zeros(5), "tail": torch.zeros(1)}, weights)
        assert convert(tmp_path / "a", tmp_path / "c", "lora_plugins", "--model", NET, "--weights", weights) == 1
        assert "does not fit the model: 'head.bias', 'tail' differ" in capsys.readouterr().err

    def test_a_place_where_nothing_can_be_written(self, linear, tmp_path, capsys):
        path = linear.save_adapter(tmp_path / "a", format="peft")
        (tmp_path / "file").touch()
        assert convert(path, tmp_path / "file" / "b", "peft") == 1
        assert f"{tmp_path / 'file'} is a file. Name another place." in capsys.readouterr().err
        assert convert(path, tmp_path / "file", "peft") == 1
        assert "which is a file. Name a folder." in capsys.readouterr().err

    def test_without_a_model(self, lora, tmp_path):
        lora.save_adapter(tmp_path / "a", format="peft")
        assert convert(tmp_path / "a", tmp_path / "b", "peft") == 0
        torch.testing.assert_close(loaded(tmp_path / "b"), lora.model(X), rtol=0, atol=0)

    def test_options(self, linear, tmp_path):
        linear.save_adapter(tmp_path / "a", format="peft")
        arguments = [tmp_path / "a", tmp_path / "b.safetensors", "kohya"]
        assert convert(*arguments) == 1
        assert convert(*arguments, "--write-option", "component=unet") == 0
        torch.testing.assert_close(loaded(tmp_path / "b.safetensors"), linear.model(X), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param(["pefd"], "There is no format 'pefd'. Did you mean 'peft'?", id="format"),
            pytest.param(["kohya"], "what is trained in full has no form there", id="not expressible"),
            pytest.param(["lora_plugins"], "the base model is needed: --model MODULE:NAME", id="no model"),
            pytest.param(["peft", "--model", "torch"], "the import path of a class or function", id="no name"),
            pytest.param(["peft", "--model", "torch:nothing"], "has no attribute 'nothing'", id="nothing"),
            pytest.param(["peft", "--model", "no_module:x"], "No module named 'no_module'", id="no module"),
            pytest.param(["peft", "--model", "builtins:str"], "which is no torch.nn.Module", id="no model made"),
            pytest.param(["peft", "--model", NET, "5"], "The adapter does not fit this model", id="another"),
            pytest.param(["peft", "--model", "torch.nn:Linear"], "made no model: TypeError: Linear", id="made"),
            pytest.param(
                ["peft", "--model", NET, "--weights", "no.safetensors"], "there is no such file", id="no weights"
            ),
            pytest.param(
                ["peft", "--model", NET, "--weights", __file__], "which is no safetensors file", id="not weights"
            ),
            pytest.param(["peft", "--weights", __file__], "which --model does not name", id="weights of no model"),
            pytest.param(["peft", "--write-option", "component"], "write NAME=VALUE", id="no value"),
            pytest.param(["peft", "--read-option", "a=b"], "has no option 'a'", id="no option"),
        ],
    )
    def test_what_is_wrong_is_said(self, arguments, message, lora, tmp_path, capsys):
        lora.save_adapter(tmp_path / "a", format="peft")
        assert convert(tmp_path / "a", tmp_path / "b", *arguments) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()

    def test_names_without_dots_need_a_model(self, linear, tmp_path, capsys):
        path = linear.save_adapter(tmp_path / "a.safetensors", format="kohya", format_options={"component": "unet"})
        assert convert(path, tmp_path / "b", "peft") == 1
        assert "From 'kohya' to 'peft' the base model is needed" in capsys.readouterr().err
        assert convert(path, tmp_path / "b", "peft", "--model", NET) == 0
        torch.testing.assert_close(loaded(tmp_path / "b"), linear.model(X), rtol=0, atol=0)


class TestInspect:
    @pytest.mark.parametrize("name", ["lora_plugins", "peft"])
    def test_folders(self, name, lora, tmp_path, capsys):
        lora.save_adapter(tmp_path / "a", format=name)
        assert main(["inspect", str(tmp_path / "a")]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        for line in (f"format: {name}", "attn.q 2 3 20", "attn.out 2 3 40", "head.weight 6"):
            assert line in lines
        assert lines[-1] == "2 layers, 60 elements; 9 trained in full"

    @pytest.mark.parametrize("name", ["diffusers", "kohya"])
    def test_files(self, name, linear, tmp_path, capsys):
        path = linear.save_adapter(tmp_path / "a.safetensors", format=name, format_options={"component": "unet"})
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert f"format: {name}" in out
        assert "1 layer, 20 elements; 0 trained in full" in out

    def test_a_stored_base_is_told(self, tmp_path, capsys):
        config = LoraConfig(r=2, target_modules=["q", "out"], quantize="int8", quantize_options={"min_size": 0})
        LoraModel(Net().eval(), config).save_adapter(tmp_path / "a")
        assert main(["inspect", str(tmp_path / "a")]) == 0
        assert "base: 2 weights stored as int8" in capsys.readouterr().out

    def test_what_is_none(self, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("none")
        assert main(["inspect", str(tmp_path / "notes.txt")]) == 1
        assert "none of the formats 'lora_plugins', 'peft', 'diffusers', 'kohya'" in capsys.readouterr().err
        torch.save({}, tmp_path / "weights.bin")
        assert main(["inspect", str(tmp_path / "weights.bin")]) == 1
        assert "is a pickle" in capsys.readouterr().err
        assert main(["inspect", str(tmp_path / "nothing")]) == 1
        assert "does not exist" in capsys.readouterr().err
