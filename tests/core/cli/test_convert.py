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


@pytest.fixture
def lora():
    config = LoraConfig(r=2, alpha=3.0, target_modules=["q", "out"], modules_to_save=["head"])
    lora = LoraModel(Net().eval(), config)
    moved(lora.model)
    return lora


@pytest.fixture
def linear():
    lora = LoraModel(Net().eval(), LoraConfig(r=2, target_modules=["q"]))
    moved(lora.model)
    return lora


def loaded(path, **options):
    model = Net().eval()
    LoraModel.load_adapter(model, path, **options)
    return model(X)


class TestConvert:
    @pytest.mark.parametrize("target", ["peft", "lora_plugins"])
    @pytest.mark.parametrize("source", ["peft", "lora_plugins"])
    def test_with_a_model(self, source, target, lora, tmp_path, capsys):
        lora.save_adapter(tmp_path / "a", format=source)
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", target, "--model", NET, "4"]) == 0
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
        arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "peft", "--model", NET]
        assert main(arguments) == 1
        assert not (tmp_path / "b").exists()
        assert main([*arguments, "--weights", str(tmp_path / "base.safetensors")]) == 0
        assert (tmp_path / "b" / "adapter_config.json").is_file()

    def test_weights_with_one_name_of_a_shared_tensor(self, tmp_path):
        """As `save_pretrained` of transformers and `save_model` of safetensors write them."""
        config = LoraConfig(r=2, target_modules=["q"], init="pissa")
        LoraModel(Tied(), config).save_adapter(tmp_path / "a")
        save_model(Tied(), tmp_path / "base.safetensors")
        made = f"{Tied.__module__}:Tied"
        arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "peft", "--model", made]
        assert main([*arguments, "--weights", str(tmp_path / "base.safetensors")]) == 0

    def test_weights_of_another_model(self, linear, tmp_path, capsys):
        linear.save_adapter(tmp_path / "a", format="peft")
        save_file(
            {**Net().state_dict(), "head.bias": torch.zeros(5), "tail": torch.zeros(1)}, tmp_path / "b.safetensors"
        )
        arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "c"), "--to", "lora_plugins", "--model", NET]
        assert main([*arguments, "--weights", str(tmp_path / "b.safetensors")]) == 1
        assert "does not fit the model: 'head.bias', 'tail' differ" in capsys.readouterr().err

    def test_a_place_where_nothing_can_be_written(self, linear, tmp_path, capsys):
        path = linear.save_adapter(tmp_path / "a", format="peft")
        (tmp_path / "file").touch()
        assert main(["convert", str(path), str(tmp_path / "file" / "b"), "--to", "peft"]) == 1
        assert f"{tmp_path / 'file'} is a file. Name another place." in capsys.readouterr().err
        assert main(["convert", str(path), str(tmp_path / "file"), "--to", "peft"]) == 1
        assert "which is a file. Name a folder." in capsys.readouterr().err

    def test_without_a_model(self, lora, tmp_path):
        lora.save_adapter(tmp_path / "a", format="peft")
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--to", "peft"]) == 0
        torch.testing.assert_close(loaded(tmp_path / "b"), lora.model(X), rtol=0, atol=0)

    def test_options(self, linear, tmp_path):
        linear.save_adapter(tmp_path / "a", format="peft")
        arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b.safetensors"), "--to", "kohya"]
        assert main(arguments) == 1
        assert main([*arguments, "--write-option", "component=unet"]) == 0
        torch.testing.assert_close(loaded(tmp_path / "b.safetensors"), linear.model(X), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            pytest.param(["--to", "pefd"], "There is no format 'pefd'. Did you mean 'peft'?", id="format"),
            pytest.param(["--to", "kohya"], "what is trained in full has no form there", id="not expressible"),
            pytest.param(["--to", "lora_plugins"], "the base model is needed: --model MODULE:NAME", id="no model"),
            pytest.param(["--to", "peft", "--model", "torch"], "the import path of a class or function", id="no name"),
            pytest.param(["--to", "peft", "--model", "torch:nothing"], "has no attribute 'nothing'", id="nothing"),
            pytest.param(["--to", "peft", "--model", "no_module:x"], "No module named 'no_module'", id="no module"),
            pytest.param(
                ["--to", "peft", "--model", "builtins:str"], "which is no torch.nn.Module", id="no model made"
            ),
            pytest.param(["--to", "peft", "--model", NET, "5"], "The adapter does not fit this model", id="another"),
            pytest.param(["--to", "peft", "--model", "torch.nn:Linear"], "made no model: TypeError: Linear", id="made"),
            pytest.param(
                ["--to", "peft", "--model", NET, "--weights", "no.safetensors"],
                "there is no such file",
                id="no weights",
            ),
            pytest.param(
                ["--to", "peft", "--model", NET, "--weights", __file__],
                "which is no safetensors file",
                id="not weights",
            ),
            pytest.param(
                ["--to", "peft", "--weights", __file__], "which --model does not name", id="weights of no model"
            ),
            pytest.param(["--to", "peft", "--write-option", "component"], "write NAME=VALUE", id="no value"),
            pytest.param(["--to", "peft", "--read-option", "a=b"], "has no option 'a'", id="no option"),
        ],
    )
    def test_what_is_wrong_is_said(self, arguments, message, lora, tmp_path, capsys):
        lora.save_adapter(tmp_path / "a", format="peft")
        assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "b").exists()

    def test_names_without_dots_need_a_model(self, linear, tmp_path, capsys):
        path = linear.save_adapter(tmp_path / "a.safetensors", format="kohya", format_options={"component": "unet"})
        arguments = ["convert", str(path), str(tmp_path / "b"), "--to", "peft"]
        assert main(arguments) == 1
        assert "From 'kohya' to 'peft' the base model is needed" in capsys.readouterr().err
        assert main([*arguments, "--model", NET]) == 0
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
        assert "1 layers, 20 elements; 0 trained in full" in out

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
