"""The commands, as a user types them; most run in this process, the promised spellings in one of their own."""

import inspect
import re
import subprocess
import sys
import warnings
from dataclasses import fields
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback, LoraCLI, load_from_checkpoint
from lora_plugins.integrations.lightning.main import COMMANDS, main
from tests.integrations.toys import Classifier, differing, load, loader, values

TOYS = "tests.integrations.toys"
MODULE = "lora_plugins.integrations.lightning"

pytestmark = [
    # The point of the section `optimizer:`.
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning"),
]


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file with changes, and gives its path."""

    def write(**changes):
        content = {
            "seed_everything": 1,
            "model": {"class_path": f"{TOYS}.Classifier", "init_args": {"width": 8}},
            "data": {"class_path": f"{TOYS}.Data"},
            "lora": {"r": 2, "target_modules": ["net.0", "net.3"]},
            "lora_callback": {"save_adapter_to": str(tmp_path / "adapter")},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
            "trainer": {
                "max_epochs": 1,
                "accelerator": "cpu",
                "logger": False,
                "enable_progress_bar": False,
                "default_root_dir": str(tmp_path),
            },
            **changes,
        }
        path = tmp_path / "config.in.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return str(path)

    return write


def checkpoint(tmp_path) -> str:
    return str(next((tmp_path / "checkpoints").glob("*.ckpt")))


class TestFit:
    def test_prints_the_plan_and_where_the_adapter_is(self, config, tmp_path, capsys):
        assert main(["fit", "--config", config()]) == 0
        out = capsys.readouterr().out
        assert "net.0" in out
        assert "linear" in out
        assert "2 layers adapted" in out
        assert f"Adapter: {tmp_path / 'adapter'}" in out
        LoraModel.load_adapter(Classifier(width=8), tmp_path / "adapter")

    def test_checkpoint_goes_on_in_every_command(self, config, tmp_path):
        path = config()
        assert main(["fit", "--config", path]) == 0
        assert not set(load(checkpoint(tmp_path))["state_dict"]) & set(Classifier().state_dict())
        for command in ("validate", "test", "predict"):
            assert main([command, "--config", path, "--ckpt_path", checkpoint(tmp_path)]) == 0
        more = ["--trainer.max_epochs", "2", "--ckpt_path", checkpoint(tmp_path)]
        assert main(["fit", "--config", path, *more]) == 0

    def test_checkpoint_of_a_module_that_saves_its_own_hyperparameters_goes_on(self, config, tmp_path):
        path = config(model={"class_path": f"{TOYS}.SavesItself", "init_args": {"width": 8}})
        assert main(["fit", "--config", path]) == 0
        assert load(checkpoint(tmp_path))["hyper_parameters"] == {"of_its_own": 8}
        more = ["--trainer.max_epochs", "2", "--ckpt_path", checkpoint(tmp_path)]
        for command in (["validate", *more[2:]], ["test", *more[2:]], ["fit", *more]):
            assert main([*command, "--config", path]) == 0

    def test_truncated_checkpoint_stops_with_what_to_do(self, config, tmp_path, capsys):
        path = config()
        assert main(["fit", "--config", path]) == 0
        whole = Path(checkpoint(tmp_path))
        whole.write_bytes(whole.read_bytes()[:2000])
        capsys.readouterr()
        assert main(["test", "--config", path, "--ckpt_path", str(whole)]) != 0
        said = capsys.readouterr().err
        assert "cannot be read as a checkpoint" in said
        assert "Traceback" not in said

    def test_checkpoint_of_the_command_line_loads_without_it(self, config, tmp_path):
        assert main(["fit", "--config", config()]) == 0
        module = load_from_checkpoint(Classifier, checkpoint(tmp_path))
        assert type(module) is Classifier
        assert module.net[0].out_features == 8

    def test_lora_section_in_a_file_of_its_own(self, config, tmp_path):
        (tmp_path / "lora.yaml").write_text(yaml.safe_dump({"r": 3, "target_modules": ["net.0"]}))
        assert main(["fit", "--config", config(lora=str(tmp_path / "lora.yaml"))]) == 0
        assert LoraModel.load_adapter(Classifier(width=8), tmp_path / "adapter").adapters["default"].r == 3

    def test_without_the_section_it_is_lightning(self, config, tmp_path):
        assert main(["fit", "--config", config(lora=None)]) == 0
        Classifier.load_from_checkpoint(checkpoint(tmp_path))

    def test_callback_by_class_path(self, config, tmp_path):
        callback = {
            "class_path": "lora_plugins.integrations.lightning.LoraCallback",
            "init_args": {"config": {"r": 2}, "save_adapter_to": str(tmp_path / "other")},
        }
        trainer = {**yaml.safe_load(Path(config()).read_text())["trainer"], "callbacks": [callback]}
        assert main(["fit", "--config", config(lora=None, lora_callback=None, trainer=trainer)]) == 0
        assert (tmp_path / "other" / "adapter.json").exists()


def test_override_of_a_users_own_optimizer_is_said_and_that_of_our_tasks_is_not(config, tmp_path):
    trainer_section = {"logger": False, "max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in ({"class_path": f"{TOYS}.Classifier"}, {"class_path": f"{__name__}.OfOurs"}):
            LoraCLI(run=False, args=["--config", config(model=model, trainer=trainer_section)])
    said = [str(w.message) for w in caught if "will be overridden" in str(w.message)]
    assert [message.split(".")[0] for message in said] == ["`Classifier"]


class OfOurs(Classifier):
    def configure_optimizers(self):
        return super().configure_optimizers()

    configure_optimizers.__module__ = "lora_plugins.tasks.training.vision_task"


class TestConfig:
    def test_print_config_lists_every_field_and_help_explains_it(self, config, capsys):
        with pytest.raises(SystemExit):
            main(["fit", "--config", config(), "--print_config"])
        assert list(yaml.safe_load(capsys.readouterr().out)["lora"]) == [field.name for field in fields(LoraConfig)]
        with pytest.raises(SystemExit):
            main(["fit", "--lora.help"])
        out = " ".join(capsys.readouterr().out.split())
        for field in fields(LoraConfig):
            assert re.search(rf"--lora\.{field.name}\+? [^ ]+ [A-Z`]\w+[` -]", out), field.name

    def test_print_config_with_comments_documents_every_field_and_is_a_config(self, config, capsys, tmp_path):
        with pytest.raises(SystemExit):
            main(["fit", "--config", config(), "--print_config=comments"])
        printed = capsys.readouterr().out
        sections = dict(re.findall(r"^(lora|lora_callback):\n(.*?)(?=^\w|\Z)", printed, flags=re.M | re.S))
        names = [field.name for field in fields(LoraConfig)]
        options = [name for name in inspect.signature(LoraCallback).parameters if name != "config"]
        for section, keys in (("lora", names), ("lora_callback", options)):
            for key in keys:
                assert re.search(rf"^  # [^\n]+\n  {key}:", sections[section], flags=re.M), key
        path = tmp_path / "printed.yaml"
        path.write_text(printed)
        assert main(["fit", "--config", str(path)]) == 0

    def test_printed_config_runs_and_prints_the_same(self, config, capsys, tmp_path):
        printed = []
        path = config()
        for _ in range(2):
            with pytest.raises(SystemExit):
                main(["fit", "--config", path, "--print_config"])
            printed.append(capsys.readouterr().out)
            path = str(tmp_path / "printed.yaml")
            Path(path).write_text(printed[-1])
        assert printed[0] == printed[1]
        assert main(["fit", "--config", path]) == 0

    @pytest.mark.parametrize(
        ("changes", "message", "code"),
        [
            ({"lora": {"rank": 2}}, "rank", 2),
            ({"lora": {"r": 0}}, "error: r is a rank, a whole number of at least 1, not 0.", 1),
            ({"lora": {"bias": "some"}}, "bias", 2),
            ({"lora_callback": {"adaptername": "x"}}, "adaptername", 2),
            ({"lora_callback": {"export_to": "x.bin"}}, "error: export_to is 'x.bin'", 1),
            ({"loraa": {"r": 2}}, "loraa", 2),
        ],
        ids=["unknown_field", "rank_0", "choice", "callback_option", "export_name", "section"],
    )
    def test_wrong_value_ends_with_its_name(self, config, capsys, changes, message, code):
        try:
            ended = main(["fit", "--config", config(**changes)])
        except SystemExit as stopped:  # what jsonargparse finds itself
            ended = stopped.code
        assert ended == code
        assert message in capsys.readouterr().err


class TestFiles:
    """A checkpoint becomes a file that needs no lora_plugins."""

    @pytest.fixture
    def trained(self, config, tmp_path):
        callback = {"merge_on_fit_end": False, "target": "net", "export_to": str(tmp_path / "expected.safetensors")}
        lora = {"r": 2, "target_modules": ["0", "3"]}
        assert main(["fit", "--config", config(lora=lora, lora_callback=callback)]) == 0
        return checkpoint(tmp_path), load_file(tmp_path / "expected.safetensors")

    def test_export(self, trained, tmp_path, capsys):
        path, expected = trained
        out = str(tmp_path / "out" / "merged.safetensors")
        assert main(["export", path, out, "--model", f"{TOYS}.Classifier"]) == 0
        assert f"Merged model: {out}" in capsys.readouterr().out
        assert not differing(load_file(out), expected)

    def test_merge(self, trained, tmp_path):
        path, expected = trained
        out = str(tmp_path / "merged.ckpt")
        assert main(["merge", path, out, "--model", f"{TOYS}.Classifier"]) == 0
        module = Classifier.load_from_checkpoint(out)
        assert not differing(values(module.net), expected)

    @pytest.mark.parametrize(
        ("output", "model", "message"),
        [
            ("x.bin", f"{TOYS}.Classifier", "ends in .safetensors"),
            ("x.safetensors", f"{TOYS}.Clasifier", "'Classifier'"),
            ("x.safetensors", "no_such_module.Classifier", "no module 'no_such_module'"),
        ],
        ids=["ending", "class", "module"],
    )
    def test_wrong_arguments(self, trained, tmp_path, capsys, output, model, message):
        assert main(["export", trained[0], str(tmp_path / output), "--model", model]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / output).exists()

    def test_plain_checkpoint(self, config, tmp_path, capsys):
        assert main(["fit", "--config", config(lora=None, lora_callback=None)]) == 0
        out = str(tmp_path / "x.safetensors")
        assert main(["export", checkpoint(tmp_path), out, "--model", f"{TOYS}.Classifier"]) == 1
        assert "holds no adapter" in capsys.readouterr().err


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


class TestOtherCommands:
    def test_plan_prints_and_trains_nothing(self, config, capsys, tmp_path):
        assert main(["plan", "--config", config()]) == 0
        out = capsys.readouterr().out
        assert "net.3" in out
        assert "not trained yet" in out
        assert {path.name for path in tmp_path.iterdir()} == {"config.in.yaml"}

    def test_plan_of_nothing(self, config, capsys):
        assert main(["plan", "--config", config(lora=None)]) == 1
        assert "nothing to plan" in capsys.readouterr().err

    def test_plan_takes_a_wrong_target_as_fit_does(self, config, capsys):
        assert main(["plan", "--config", config(lora={"target_modules": ["nett"]})]) == 1
        assert "'nett' matches no module" in capsys.readouterr().err

    def test_plugins(self, capsys):
        assert main(["plugins"]) == 0
        out = capsys.readouterr().out
        for word in ("lora-plugins", "loaded", "loftq", metadata.version("lora-plugins")):
            assert word in out

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_overview(self, capsys, arguments):
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert all(f"  {name} " in out for name in COMMANDS)

    def test_unknown_command_offers_a_near_one(self, capsys):
        assert main(["plugin"]) == 1
        err = capsys.readouterr().err
        assert "'plugins'" in err
        assert "lightning-sdk" in err


FOREIGN = """
def main():
    import sys
    print("foreign", sys.argv[1:])
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A real distribution, on the path of this test only, that owns a script called `lightning` too."""
    (tmp_path / "foreign_cli.py").write_text(FOREIGN)
    info = tmp_path / "foreign_sdk-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-sdk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = foreign_cli:main\n")
    monkeypatch.syspath_prepend(tmp_path)


class TestOtherOwnerOfTheName:
    def test_its_commands_are_handed_over(self, foreign, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["lightning", "login", "--now"])
        assert main() == 0
        assert capsys.readouterr().out == "foreign ['login', '--now']\n"

    def test_ours_stay_ours(self, foreign, capsys):
        assert main(["plugins"]) == 0
        assert "Plugins of lora_plugins" in capsys.readouterr().out


def test_modules_of_the_current_folder_are_found(tmp_path, monkeypatch, config):
    (tmp_path / "users_own.py").write_text(f"from {TOYS} import Classifier\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert main(["plan", "--config", config(model={"class_path": "users_own.Classifier"})]) == 0


def script(name: str) -> list[str]:
    return [str(Path(sys.executable).with_name(name))]


@pytest.mark.parametrize(
    "command",
    [
        script("lightning"),
        script("lora-plugins"),
        [sys.executable, "-m", "lora_plugins"],
        [sys.executable, "-m", MODULE],
    ],
    ids=["lightning", "lora-plugins", "python-m", "python-m-integration"],
)
def test_promised_spellings(command):
    """What needs Lightning is covered above; each spelling has to reach the same main."""
    done = subprocess.run([*command, "plugins"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "lora-plugins" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [script("lora-plugins"), [sys.executable, "-m", "lora_plugins"], [sys.executable, "-m", MODULE]],
    ids=["lora-plugins", "python-m", "python-m-integration"],
)
def test_two_processes_from_the_command_line(command, config, tmp_path):
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"process_group_backend": "gloo", "find_unused_parameters": False},
    }
    section = {"max_epochs": 1, "accelerator": "cpu", "devices": 2, "strategy": strategy, "logger": False}
    path = config(trainer={**section, "enable_progress_bar": False, "default_root_dir": str(tmp_path)})
    done = subprocess.run([*command, "fit", "--config", path], capture_output=True, text=True, timeout=250, check=False)
    assert "Starting with 2 processes" in done.stderr, done.stderr[-2000:]
    assert "`Trainer.fit` stopped: `max_epochs=1` reached." in done.stderr, done.stderr[-2000:]
    assert LoraModel.load_adapter(Classifier(width=8), tmp_path / "adapter").active_adapters == ("default",)
    assert load_from_checkpoint(Classifier, checkpoint(tmp_path))


@pytest.mark.parametrize("missing", ["lightning", "jsonargparse"])
def test_missing_package_is_named_with_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from lora_plugins.integrations.lightning.main import main\n"
        "assert main(['plugins']) == 0 and main([]) == 0\n"
        "sys.exit(main(['fit', '--config', 'x.yaml']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pip install 'lora-plugins[lightning]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_class_is_usable_in_a_script_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    made = LoraCLI(
        Classifier,
        subclass_mode_model=False,
        run=False,
        args=[
            *("--seed_everything", "1"),
            *("--lora.r", "2"),
            *("--trainer.max_epochs", "1"),
            *("--trainer.accelerator", "cpu"),
            *("--trainer.logger", "false"),
            *("--trainer.enable_progress_bar", "false"),
            *("--trainer.default_root_dir", str(tmp_path)),
        ],
    )
    made.trainer.fit(made.model, loader())
    assert differing(values(made.model), values(Classifier())) == {"net.0.weight", "net.3.weight"}
