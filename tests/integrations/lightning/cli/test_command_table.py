"""The commands, as a user types them."""

import subprocess
import sys
from pathlib import Path

import pytest

from lora_plugins import LoraModel
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.core.cli.blocked_packages import without
from tests.integrations.lightning.cli.cli_cases import TOYS, checkpoint
from tests.integrations.lightning.toys import Classifier

pytestmark = [
    # The point of the section `optimizer:`.
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning"),
]


MODULE = "lora_plugins.integrations.lightning"


class TestErrors:
    @pytest.mark.parametrize(
        ("lora", "message"),
        [
            ({"target_modules": ["net.0", "nett"]}, "'nett' matches no module"),
            ({"init": "kaimin"}, "Did you mean 'kaiming'?"),
            ({"modules_to_save": ["hed"]}, "'hed' matches"),
        ],
        ids=["target", "init", "head"],
    )
    def test_one_message_no_traceback_nothing_written(self, config, capsys, tmp_path, lora, message):
        assert main(["fit", "--config", config(lora=lora)]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in err
        assert not (tmp_path / "adapter").exists()
        assert not (tmp_path / "checkpoints").exists()

    def test_traceback_on_request(self, config, monkeypatch):
        monkeypatch.setenv("LORA_PLUGINS_TRACEBACK", "1")
        with pytest.raises(ValueError, match="nett"):
            main(["fit", "--config", config(lora={"target_modules": ["nett"]})])


@pytest.mark.parametrize("arguments", [["--config", "x"], ["-V"], ["--lora.r", "4", "--help"]], ids=" ".join)
def test_options_without_a_command(arguments, capsys):
    assert main(arguments) == 1
    assert f"{arguments[0]} is given, and no command: lora-plugins fit" in capsys.readouterr().err


class BuildsInTurn(Classifier):
    """Has a part after `setup`, which `configure_model` goes on with."""

    def setup(self, stage):
        self.first = self.net[0]

    def configure_model(self):
        self.first.requires_grad_(False)


class TestOtherCommands:
    def test_plan_prints_and_trains_nothing(self, config, capsys, tmp_path):
        assert main(["plan", "--config", config()]) == 0
        out = capsys.readouterr().out
        assert "net.0,3 x2" in out
        assert "not trained yet" in out
        assert {path.name for path in tmp_path.iterdir()} == {"config.in.yaml"}

    def test_plan_builds_in_the_order_of_fit(self, config):
        assert main(["plan", "--config", config(model={"class_path": f"{__name__}.BuildsInTurn"})]) == 0

    @pytest.mark.parametrize("value", ["fit", "test"])
    def test_a_value_is_called_as_a_command(self, config, value):
        assert main(["plan", "--config", config(), "--trainer.default_root_dir", value]) == 0

    def test_fields_beside_those_of_a_file(self, config, tmp_path):
        (tmp_path / "lora.yaml").write_text("{target_modules: [net.0], init: loftq}")
        given = ["--lora", str(tmp_path / "lora.yaml"), "--lora.init_options.bits=2"]
        assert main(["plan", "--config", config(lora=None), *given]) == 0

    def test_plan_of_nothing(self, config, capsys):
        assert main(["plan", "--config", config(lora=None)]) == 1
        assert "nothing to plan" in capsys.readouterr().err

    def test_plan_takes_a_wrong_target_as_fit_does(self, config, capsys):
        assert main(["plan", "--config", config(lora={"target_modules": ["nett"]})]) == 1
        assert "'nett' matches no module" in capsys.readouterr().err


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch, config):
    (tmp_path / "users_own.py").write_text(f"from {TOYS} import Classifier\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert main(["plan", "--config", config(model={"class_path": "users_own.Classifier"})]) == 0


@pytest.mark.parametrize("missing", [pytest.param("lightning", marks=pytest.mark.slow), "jsonargparse"])
def test_missing_package_is_named_with_what_to_install(missing):
    calls = ("assert main(['plugins']) == 0 and main([]) == 0", "sys.exit(main(['fit', '--config', 'x.yaml']))")
    done = without((missing,), *calls)
    assert done.returncode == 1
    assert f"error: this command needs {missing}. Run: pip install 'lora-plugins[lightning]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        [str(Path(sys.executable).with_name("lora-plugins"))],
        [sys.executable, "-m", "lora_plugins"],
        [sys.executable, "-m", MODULE],
    ],
    ids=["lora-plugins", "python-m", "python-m-integration"],
)
def test_two_processes_from_the_command_line(command, config, tmp_path):
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"process_group_backend": "gloo", "find_unused_parameters": False},
    }
    section = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": strategy, "logger": False}
    path = config(trainer={**section, "enable_progress_bar": None, "default_root_dir": str(tmp_path)})
    done = subprocess.run([*command, "fit", "--config", path], capture_output=True, text=True, timeout=250, check=False)
    assert "Starting with 2 processes" in done.stderr, done.stderr[-2000:]
    assert "epoch 1/1" in done.stdout, done.stderr[-2000:]
    assert LoraModel.load_adapter(Classifier(width=8), tmp_path / "adapter").active_adapters == ("default",)
    assert load_from_checkpoint(Classifier, checkpoint(tmp_path))
