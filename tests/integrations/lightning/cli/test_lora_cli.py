"""The commands of LightningCLI, with the sections `lora:` and `lora_callback:`; most run in this process."""

import copy
import gc
import inspect
import io
import json
import re
import sys
import threading
import warnings
from dataclasses import fields
from pathlib import Path

import jsonargparse
import pytest
import rich
import yaml
from packaging.version import Version
from rich.console import Console

from lora_plugins import LoraConfig, LoraModel
from lora_plugins.cli.main import main
from lora_plugins.errors import ConfigError
from lora_plugins.integrations.lightning import LoraCallback, LoraCLI, load_from_checkpoint
from lora_plugins.integrations.lightning.cli.held_places import held
from tests.integrations.lightning.cli.cli_cases import TOYS, checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, values
from tests.slow import slow_but

pytestmark = [
    # The point of the section `optimizer:`.
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden:UserWarning"),
]


# The oldest release that we allow names a section's type where a wrong value or a comment is meant.
since_4_49 = pytest.mark.skipif(Version(jsonargparse.__version__) < Version("4.49"), reason="words of jsonargparse")


def test_a_copy_of_a_module_that_calls_classes_later_has_no_copy_of_the_trainer(config, monkeypatch):
    later = {"scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}}}
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    cli = LoraCLI(args=["--config", config(model={"class_path": f"{TOYS}.Scheduled", "init_args": later})], run=False)
    cli.trainer.callbacks[-1].lock = threading.Lock()  # which cannot be copied, as processes that it has started
    assert not differing(values(copy.deepcopy(cli.model)), values(cli.model))


class Named(Classifier):
    """Has metrics of classes, whose names rich would take for styles and pictures."""

    def _step(self, batch, stage):
        self.log("iou/road [paved]", 0.5, on_step=False, on_epoch=True)
        self.log("[/end] :cat:", 0.25, on_step=False, on_epoch=True)
        return super()._step(batch, stage)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_metrics_are_printed_by_their_names(config, capsys, command):
    console = vars(rich.get_console())
    assert main([command, "--config", config(model={"class_path": f"{__name__}.Named"}, lora=None)]) == 0
    out = capsys.readouterr().out
    assert "iou/road [paved]" in out
    assert "[/end] :cat:" in out
    assert vars(rich.get_console()) is console


def test_metrics_are_printed_where_the_console_writes(config, monkeypatch, capsys):
    """As one that a script has set up for a log."""
    log = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(rich, "_console", log)
    assert main(["validate", "--config", config(model={"class_path": f"{__name__}.Named"}, lora=None)]) == 0
    assert "iou/road [paved]" in log.file.getvalue()
    assert "iou/road" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prefix", "start"),
    [pytest.param("my-app", "MY_APP_", id="of an application"), pytest.param(False, "", id="none")],
)
def test_one_field_in_a_variable_of_another_prefix_is_refused(config, monkeypatch, prefix, start):
    monkeypatch.setenv(f"{start}LORA__R", "3")
    options = {"default_env": True, "env_prefix": prefix}
    with pytest.raises(ConfigError, match=f"variable {start}LORA__R is not read"):
        LoraCLI(args=["--config", config(lora=None)], parser_kwargs=options, run=False)


class Followed(Classifier):
    """Names the next command itself."""

    def next_commands(self, trainer):
        return {"Predict": "lora-plugins predict adapter IMAGES"}


class TestFit:
    @pytest.mark.parametrize("is_trial", [False, True], ids=["fit", "fast_dev_run"])
    def test_names_next_commands_where_there_are_files_for_them(self, config, capsys, is_trial):
        path = config(model={"class_path": f"{__name__}.Followed"})
        assert main(["fit", "--config", path, "--trainer.fast_dev_run", str(is_trial).lower()]) == 0
        assert ("lora-plugins predict adapter IMAGES" in capsys.readouterr().out) is not is_trial

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

    @pytest.mark.parametrize("command", slow_but(["validate", "test", "predict"], ["validate"]))
    def test_model_without_checkpoint_is_said_to_have_no_adapter(self, config, tmp_path, capsys, command):
        path, said = config(), f"Without --ckpt_path, {command} takes the model as it is built, without an adapter."
        assert main(["fit", "--config", path]) == 0
        assert "Without --ckpt_path" not in capsys.readouterr().out
        assert main([command, "--config", path]) == 0
        assert said in " ".join(capsys.readouterr().out.split())
        assert main([command, "--config", path, "--ckpt_path", checkpoint(tmp_path)]) == 0
        assert main([command, "--config", path, "--lora", "null"]) == 0
        assert "Without --ckpt_path" not in capsys.readouterr().out

    def test_checkpoint_of_a_module_that_saves_its_own_hyperparameters_goes_on(self, config, tmp_path):
        path = config(model={"class_path": f"{TOYS}.SavesItself", "init_args": {"width": 8}})
        assert main(["fit", "--config", path]) == 0
        hyperparameters = load(checkpoint(tmp_path))["hyper_parameters"]
        assert hyperparameters.keys() - {"_instantiator"} == {"of_its_own"}
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

    @pytest.mark.parametrize("value", ["{r: 3, target_modules: [net.0]}", "lora.yaml"], ids=["fields", "path"])
    def test_lora_section_in_an_environment_variable(self, config, tmp_path, monkeypatch, value):
        monkeypatch.chdir(tmp_path)
        Path("lora.yaml").write_text("{r: 3, target_modules: [net.0]}")
        monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
        monkeypatch.setenv("PL_FIT__LORA", value)
        assert main(["fit", "--config", config(lora=None)]) == 0
        assert LoraModel.load_adapter(Classifier(width=8), tmp_path / "adapter").plans["default"].config.r == 3

    @pytest.mark.parametrize(
        ("variable", "section", "flag"),
        [
            pytest.param("R", "{r: 3, ...}", "--lora.r", id="field"),
            pytest.param(
                "QUANTIZE_OPTIONS__MIN_SIZE",
                "{quantize_options: {min_size: 3}, ...}",
                "--lora.quantize_options.min_size",
                id="nested",
            ),
        ],
    )
    def test_one_field_in_an_environment_variable_is_refused(
        self, config, monkeypatch, capsys, variable, section, flag
    ):
        """It would be passed over, and without another field of the section the whole model be trained."""
        monkeypatch.setenv(f"PL_FIT__LORA__{variable}", "3")
        assert main(["plan", "--config", config()]) == 0  # which reads no variables
        monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
        capsys.readouterr()
        assert main(["fit", "--config", config(lora=None)]) != 0
        said = " ".join(capsys.readouterr().err.split())
        assert f"PL_FIT__LORA__{variable} is not read" in said
        assert f"PL_FIT__LORA='{section}'" in said
        assert f"the flag {flag}." in said

    def test_without_the_section_it_is_lightning(self, config, tmp_path):
        assert main(["fit", "--config", config(lora=None)]) == 0
        Classifier.load_from_checkpoint(checkpoint(tmp_path))

    def test_files_that_are_not_written_without_the_section_are_named(self, config, tmp_path, capsys):
        said, files = "lora_callback does nothing", {"export_to": str(tmp_path / "merged.safetensors")}
        assert main(["fit", "--config", config(lora_callback=files)]) == 0
        assert main(["fit", "--config", config(lora_callback={"merge_source": "best"}, lora=None)]) == 0
        assert said not in capsys.readouterr().out
        assert main(["fit", "--config", config(lora_callback=files), "--lora", "null"]) == 0
        assert f"{said}: 'export_to' is not written" in capsys.readouterr().out

    def test_callback_by_class_path(self, config, tmp_path):
        callback = {
            "class_path": "lora_plugins.integrations.lightning.LoraCallback",
            "init_args": {"config": {"r": 2}, "save_adapter_to": str(tmp_path / "other")},
        }
        trainer = {**yaml.safe_load(Path(config()).read_text())["trainer"], "callbacks": [callback]}
        assert main(["fit", "--config", config(lora=None, lora_callback=None, trainer=trainer)]) == 0
        assert (tmp_path / "other" / "adapter.json").exists()

    def test_section_and_callback_of_one_adapter_are_refused(self, config, tmp_path, capsys):
        callback = {
            "class_path": "lora_plugins.integrations.lightning.LoraCallback",
            "init_args": {"config": {"r": 2}},
        }
        trainer = {**yaml.safe_load(Path(config()).read_text())["trainer"], "callbacks": [callback]}
        assert main(["fit", "--config", config(trainer=trainer)]) == 1
        said = capsys.readouterr().err
        assert said.startswith(
            "error: There are a `lora:` section and a LoraCallback of the same target and adapter_name"
        )
        assert said.count("\n") == 1


@pytest.mark.parametrize("several", [False, True], ids=["alone", "in a list"])
@pytest.mark.parametrize("where", ["in the file", "as a flag"])
def test_a_file_in_another_format_is_written(config, tmp_path, capsys, where, several):
    """And no folder that is called as the text of the flag."""
    file = {"path": str(tmp_path / "theirs"), "format": "peft"}
    named = [file] if several else file
    flags = ["--lora_callback.save_adapter_to", json.dumps(named)] if where == "as a flag" else []
    path = config(lora_callback=None if flags else {"save_adapter_to": named})
    assert main(["fit", "--config", path, *flags]) == 0, capsys.readouterr().err
    assert (tmp_path / "theirs" / "adapter_config.json").is_file()


@pytest.mark.parametrize("option", ["save_adapter_to", "export_to"])
def test_a_place_that_another_run_will_write_is_refused(config, tmp_path, capsys, option):
    place = tmp_path / "runs" / "mine.safetensors"
    path = config(lora_callback={option: str(place)})
    with held([str(place)]):
        assert main(["fit", "--config", path]) == 1
        assert f"Another run is going on that will write {place}" in capsys.readouterr().err
        assert not place.exists()
    assert not (tmp_path / "runs").exists()
    assert main(["fit", "--config", path]) == 0, capsys.readouterr().err
    assert [each.name for each in (tmp_path / "runs").iterdir()] == [place.name]


def test_results_of_an_earlier_run_that_will_be_replaced_are_said(config, tmp_path, capsys):
    places = {"save_adapter_to": str(tmp_path / "adapter"), "export_to": str(tmp_path / "m.safetensors")}
    path = config(lora_callback=places)

    def said(*arguments):
        assert main(["fit", "--config", path, *arguments]) == 0, capsys.readouterr().err
        return [line for line in capsys.readouterr().out.splitlines() if "earlier run" in line]

    assert said() == []
    (line,) = said()
    assert line.startswith(", ".join(map(repr, places.values())))
    assert "Ctrl-C twice" in line
    assert said("--trainer.fast_dev_run", "true") == []  # writes none
    assert said("--trainer.max_epochs", "2", "--ckpt_path", checkpoint(tmp_path)) == []  # goes on with that run


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
        section = yaml.safe_load(capsys.readouterr().out)["lora"]
        section = section.get("init_args", section)  # jsonargparse below 4.53 names the class as well
        assert list(section) == [field.name for field in fields(LoraConfig)]
        with pytest.raises(SystemExit):
            main(["fit", "--lora.help"])
        out = " ".join(capsys.readouterr().out.split())
        for field in fields(LoraConfig):
            assert re.search(rf"--lora\.{field.name}\+? [^ ]+ [A-Z`]\w+[` -]", out), field.name

    @since_4_49
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
        ("changes", "message"),
        [
            pytest.param({"lora": {"rank": 2}}, "LoraConfig has no field 'rank'", id="unknown_field"),
            pytest.param(
                {"lora": {"r": 0}}, "error: lora: r is a rank, a whole number from 1 to 65536, not 0.", id="rank_0"
            ),
            pytest.param({"lora": {"bias": "some"}}, "bias is 'some'", id="choice"),
            pytest.param({"lora_callback": {"adaptername": "x"}}, "adaptername", id="callback_option"),
            pytest.param(
                {"lora": {"dequantize": True}}, "lora_callback has: lora_callback.dequantize.", id="of_the_callback"
            ),
            pytest.param(
                {"lora_callback": {"r": 2}}, "lora_callback has no field 'r'; lora has: lora.r.", id="of_the_config"
            ),
            pytest.param({"lora_callback": {"export_to": "x.bin"}}, "error: export_to is 'x.bin'", id="export_name"),
            pytest.param({"loraa": {"r": 2}}, "has the key 'loraa'. Did you mean 'lora'", id="section"),
        ],
    )
    def test_wrong_value_is_one_message_with_its_name(self, config, capsys, changes, message):
        assert main(["fit", "--config", config(**changes)]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_garbage_is_collected_while_the_command_does_its_work(config, monkeypatch):
    seen = []
    monkeypatch.setattr(LoraCLI, "fit", lambda cli, model, **_: seen.append(gc.isenabled()))
    assert main(["fit", "--config", config()]) == 0
    assert seen == [True]


def test_a_file_may_hold_several_commands_before_the_name_of_one(config, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(LoraCLI, "fit", lambda cli, model, **_: seen.append(cli.subcommand))
    section = yaml.safe_load(Path(config()).read_text())
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"fit": section, "validate": section}))
    assert main(["--config", str(tmp_path / "both.yaml"), "fit"]) == 0
    assert seen == ["fit"]


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
