"""A checkpoint becomes a file that needs no lora_plugins."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.integrations.lightning.cli import export_checkpoint, merge_checkpoint
from tests.integrations.lightning.cli.cli_cases import TOYS, checkpoint, needs_vision
from tests.integrations.lightning.late_layers import OnLoading
from tests.integrations.lightning.toys import (
    CONFIG,
    Classifier,
    HidesItsBackbone,
    differing,
    load,
    loader,
    lora,
    trainer,
    values,
)

pytestmark = [
    # The point of the section `optimizer:`.
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning"),
]

LATE = "tests.integrations.lightning.late_layers"
STORED = {"quantize": "nf4", "quantize_options": {"min_size": 0}}
BASES = pytest.mark.parametrize("trained", [{}, STORED], ids=["float", "stored"], indirect=True)


class Refusing(Classifier):
    def __init__(self, **kwargs):
        raise TypeError("a task got an unexpected argument")


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the:UserWarning")
def test_what_the_state_dict_of_the_module_hides_is_merged(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="it")
    run = trainer(tmp_path, [LoraCallback(CONFIG, export_to=str(tmp_path / "fit.safetensors")), saver])
    run.fit(module := HidesItsBackbone(lr=0.3), loader())
    expected = nn.Module.state_dict(module)
    path, merged = tmp_path / "it.ckpt", tmp_path / "merged.ckpt"
    export_checkpoint(HidesItsBackbone, path, tmp_path / "command.safetensors")
    merge_checkpoint(HidesItsBackbone, path, merged)
    loaded = HidesItsBackbone.load_from_checkpoint(merged)
    files = [load_file(tmp_path / f"{name}.safetensors") for name in ("fit", "command")]
    for found in (*files, nn.Module.state_dict(loaded)):
        assert not differing(found, expected)


class Delegates(Classifier):
    """Has the names of its network in its files, in both directions."""

    def state_dict(self, *args, **kwargs):
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return self.net.load_state_dict(state_dict, strict, assign)


def test_files_have_the_names_that_the_module_gives_them(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="it")
    run = trainer(tmp_path, [LoraCallback(CONFIG, export_to=str(tmp_path / "fit.safetensors")), saver])
    run.fit(module := Delegates(lr=0.3), loader())
    merge_checkpoint(Delegates, tmp_path / "it.ckpt", tmp_path / "merged.ckpt")
    for state in (load_file(tmp_path / "fit.safetensors"), load(tmp_path / "merged.ckpt")["state_dict"]):
        fresh = Delegates()
        fresh.load_state_dict(state)
        assert not differing(values(fresh), values(module))


class TakesANumber(Classifier):
    def __init__(self, lr):
        assert isinstance(lr, float)
        super().__init__(lr=lr)


class InHalfPrecision(Classifier):
    def __init__(self, lr=0.1):
        super().__init__(lr=lr)
        self.net.bfloat16()


@pytest.mark.parametrize(("command", "ending"), [("export", "safetensors"), ("merge", "ckpt")])
class TestWhatRoundingMayLose:
    @pytest.fixture
    def arguments(self, tmp_path, command, ending):
        """Those of a merge into a base of bfloat16, which loses most of the update."""
        run = trainer(tmp_path, [lora(merge_on_fit_end=False)], max_epochs=1)
        run.fit(Classifier(lr=1e-3), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        paths = [str(tmp_path / name) for name in ("it.ckpt", f"x.{ending}")]
        return [command, *paths, "--model", f"{__name__}.InHalfPrecision"]

    def test_is_refused_or_allowed(self, arguments, capsys):
        assert main(arguments) == 1
        assert "allow it with max_error" in capsys.readouterr().err
        assert main([*arguments, "--max-error", "inf"]) == 0

    @pytest.mark.parametrize("wrong", ["-1", "nan", "much"])
    def test_is_a_share(self, arguments, wrong, capsys):
        assert main([*arguments, f"--max-error={wrong}"]) == 1
        assert f"'{wrong}' is not a number of at least 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["1e-3", "0.001"])
def test_arguments_are_numbers_as_in_a_configuration(tmp_path, number):
    run = trainer(tmp_path, [lora()], max_epochs=1)
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    paths = [str(tmp_path / "it.ckpt"), str(tmp_path / "x.safetensors")]
    assert main(["export", *paths, "--model", f"{__name__}.TakesANumber", "--argument", f"lr={number}"]) == 0


class TestFiles:
    """A checkpoint becomes a file that needs no lora_plugins."""

    @pytest.fixture(params=[{}], ids=["float"])
    def trained(self, config, tmp_path, request):
        expected = str(tmp_path / "expected.safetensors")
        callback = {"merge_on_fit_end": False, "target": "net", "export_to": expected, "dequantize": True}
        lora = {"r": 2, "target_modules": ["0", "3"], **request.param}
        assert main(["fit", "--config", config(lora=lora, lora_callback=callback)]) == 0
        return checkpoint(tmp_path), load_file(tmp_path / "expected.safetensors")

    @BASES
    def test_export(self, trained, tmp_path, capsys):
        path, expected = trained
        out = str(tmp_path / "out" / "merged.safetensors")
        assert main(["export", path, out, "--model", f"{TOYS}.Classifier"]) == 0
        assert f"Merged model: {out}" in capsys.readouterr().out
        assert not differing(load_file(out), expected)

    @BASES
    def test_merge(self, trained, tmp_path):
        path, expected = trained
        out = str(tmp_path / "merged.ckpt")
        assert main(["merge", path, out, "--model", f"{TOYS}.Classifier"]) == 0
        module = Classifier.load_from_checkpoint(out)
        assert not differing(values(module.net), expected)

    def test_nothing_of_an_average_is_left(self, config, tmp_path):
        options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "default_root_dir": str(tmp_path)}
        averaged = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging"}
        assert main(["fit", "--config", config(trainer={**options, "callbacks": [averaged]})]) == 0
        path, out = checkpoint(tmp_path), str(tmp_path / "merged.ckpt")
        assert {"current_model_state", "averaging_state"} <= load(path).keys()
        assert main(["merge", path, out, "--model", f"{TOYS}.Classifier"]) == 0
        assert not {"current_model_state", "averaging_state"} & load(out).keys()

    def test_what_the_module_reads_of_its_checkpoint_is_there(self, config, tmp_path):
        model = {"class_path": f"{LATE}.OnLoading"}
        assert main(["fit", "--config", config(model=model, lora={"r": 2, "target_modules": ["net.0", "head"]})]) == 0
        out = str(tmp_path / "merged.ckpt")
        assert main(["merge", checkpoint(tmp_path), out, "--model", f"{LATE}.OnLoading"]) == 0
        assert OnLoading.load_from_checkpoint(out).head.in_features == 16
        assert load(out).keys() == {
            *("epoch", "global_step", "pytorch-lightning_version", "state_dict", "hparams_name", "hyper_parameters"),
            "width",
        }

    @pytest.mark.parametrize(
        ("output", "model", "message"),
        [
            ("x.bin", f"{TOYS}.Classifier", "ends in .safetensors"),
            ("x.safetensors", f"{TOYS}.Clasifier", "'Classifier'"),
            pytest.param(
                "x.safetensors",
                "lora_plugins.tasks.SemanticSegmentationTsk",
                "Did you mean 'SemanticSegmentationTask'",
                marks=needs_vision,
            ),
            ("x.safetensors", "torch.nn.Linear", "no class of a LightningModule. Write its import path"),
            ("x.safetensors", "no_such_module.Classifier", "no module 'no_such_module'"),
            ("x.safetensors", "./toys.Classifier", "'./toys.Classifier', which is no import path."),
            ("expected.safetensors/x.safetensors", f"{TOYS}.Classifier", "is a file. Name another place."),
        ],
        ids=[
            "ending",
            "class",
            "class that is imported late",
            "class of no module",
            "module",
            "path of a file",
            "place",
        ],
    )
    def test_wrong_arguments(self, trained, tmp_path, capsys, output, model, message):
        assert main(["export", trained[0], str(tmp_path / output), "--model", model]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / output).exists()

    @pytest.mark.parametrize(("command", "ending"), [("export", "safetensors"), ("merge", "ckpt")])
    def test_arguments_that_the_class_does_not_take(self, trained, tmp_path, capsys, command, ending):
        arguments = [command, trained[0], str(tmp_path / f"x.{ending}"), "--model", f"{TOYS}.Classifier"]
        assert main([*arguments, "--argument", "no_such=1"]) == 1
        assert "Classifier takes no argument 'no_such'." in capsys.readouterr().err

    def test_a_class_that_the_checkpoint_is_not_of(self, tmp_path, capsys):
        run = trainer(tmp_path, [lora(merge_on_fit_end=False)], max_epochs=1)
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        paths = [str(tmp_path / "it.ckpt"), str(tmp_path / "x.safetensors")]
        assert main(["export", *paths, "--model", f"{__name__}.Refusing"]) == 1
        assert "cannot be loaded as a Refusing: a task got an unexpected argument" in capsys.readouterr().err

    @pytest.mark.parametrize("command", ["export", "merge"])
    def test_no_checkpoint(self, tmp_path, capsys, command):
        path, out = str(tmp_path / "it.ckpt"), str(tmp_path / "out")
        assert main([command, path, out, "--model", f"{TOYS}.Classifier"]) == 1
        assert f"There is no {path}. Give a checkpoint with an adapter." in capsys.readouterr().err

    def test_plain_checkpoint(self, config, tmp_path, capsys):
        assert main(["fit", "--config", config(lora=None, lora_callback=None)]) == 0
        out = str(tmp_path / "x.safetensors")
        assert main(["export", checkpoint(tmp_path), out, "--model", f"{TOYS}.Classifier"]) == 1
        assert "holds no adapter" in capsys.readouterr().err
