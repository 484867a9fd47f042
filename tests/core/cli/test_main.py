"""The program: which commands it finds and runs, how it is started, and what is said where something is missing."""

import os
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest

from lora_plugins.cli import installed_commands
from lora_plugins.cli.main import main
from tests.core.cli.blocked_packages import without

OVERVIEW = """\
usage: lora-plugins COMMAND [arguments]        (also: lightning COMMAND, python -m lora_plugins COMMAND)

  train      fine-tune on your images: train DATA
  fit        train, as a YAML file says
  validate   measure on the validation split
  test       measure on the test split
  predict    write labels or masks: predict MODEL IMAGES
  plan       print what fit would adapt, and train nothing
  export     write a network for other runtimes: export MODEL OUT.onnx
  merge      write a checkpoint with its adapter merged, for load_from_checkpoint
  recipes    list, show and copy the YAML files that are shipped
  serve      answer images over HTTP by many adapters on one base: serve ADAPTERS
  report     put the reports of runs side by side
  generate   draw pictures from a diffusion pipeline and adapters, a checkpoint or a merged pipeline
  inspect    show what is in an adapter file of any format
  convert    write an adapter in another format
  plugins    list the installed plugins
  doctor     check the installation, and say what to do
  new-plugin write a package with a plugin of your own to start from

COMMAND --help shows the arguments of a command; fit --print_config prints a whole YAML file.
"""


class TestOtherCommands:
    def test_plugins(self, capsys):
        assert main(["plugins"]) == 0
        out = capsys.readouterr().out
        for word in ("lora-plugins", "loaded", "loftq", metadata.version("lora-plugins")):
            assert word in out

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
    def test_overview(self, capsys, arguments):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert all(f"  {name} " in out for name in installed_commands().table)
        assert (out, err) == (OVERVIEW, "")

    def test_help_of_a_command(self, capsys):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["help", "inspect"])
        assert capsys.readouterr().out.startswith("usage: lora-plugins inspect")
        assert main(["help", "inspct"]) == 1
        assert "no command 'inspct'. Did you mean 'inspect'?" in capsys.readouterr().err

    def test_a_command_that_is_called_otherwise(self, capsys):
        assert main(["version"]) == 1
        assert capsys.readouterr().err == "error: there is no command 'version'. It is '--version' here.\n"

    @pytest.mark.parametrize(("text", "traced"), [(None, False), ("import no_such_library", True)])
    def test_plugins_shows_the_traceback_of_a_file_that_there_is(self, capsys, monkeypatch, tmp_path, text, traced):
        path = tmp_path / "mine.py"
        if text is not None:
            path.write_text(text)
        monkeypatch.setenv("LORA_PLUGINS_LOAD", str(path))
        assert main(["plugins"]) == 1
        said = capsys.readouterr().err
        assert str(path) in said
        assert ("Traceback" in said) == traced

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out == f"lora-plugins {metadata.version('lora-plugins')}\n"

    @pytest.mark.parametrize(("typed", "meant"), [("plugin", "plugins"), ("trian", "train")])
    def test_unknown_command_offers_a_near_one(self, capsys, typed, meant):
        assert main([typed]) == 1
        err = capsys.readouterr().err
        assert f"'{meant}'" in err

    @pytest.mark.parametrize("program", ["lightning", "lora-plugins"])
    def test_the_other_owner_of_a_name_is_told_of_that_name_alone(self, capsys, monkeypatch, program):
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{program}"])
        assert main(["trian"]) == 1
        assert ("lightning-sdk" in capsys.readouterr().err) == (program == "lightning")


FOREIGN = """
def main():
    import sys
    print("foreign", sys.argv[1:])
"""


@pytest.fixture
def foreign(distribution):
    """A real distribution, on the path of this test only, that owns a script called `lightning` too."""
    distribution("foreign_sdk", "[console_scripts]\nlightning = foreign_cli:main\n", foreign_cli=FOREIGN)


class TestOtherOwnerOfTheName:
    def test_its_commands_are_handed_over(self, foreign, capsys, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["lightning", "login", "--now"])
        assert main() == 0
        assert capsys.readouterr().out == "foreign ['login', '--now']\n"

    def test_ours_stay_ours(self, foreign, capsys):
        assert main(["plugins"]) == 0
        assert "Plugins of lora_plugins" in capsys.readouterr().out


GREET = """
from lora_plugins.cli import Command

def run(arguments):
    print("hello", arguments)
    return 3

def lack(arguments):
    import no_such_library

COMMANDS = {
    "greet": Command("say hello", run),
    "first": Command("take options first", run, options_first=True),
    "lack": Command("need a library", lack, needs=("no_such_library",), requirement="polite[library]"),
    "stumble": Command("need another library than it says", lack, needs=("other",), requirement="polite[other]"),
}
"""


class TestCommandsOfOthers:
    """A table of commands joins by an entry point, and no table takes another one's commands away."""

    @pytest.fixture
    def polite(self, distribution):
        distribution(
            "polite", "[lora_plugins.commands]\npolite = commands_of_polite:COMMANDS\n", commands_of_polite=GREET
        )

    def test_are_listed_run_and_offered(self, polite, capsys):
        assert main([]) == 0
        assert "  greet      say hello\n" in capsys.readouterr().out
        assert main(["greet", "--loud"]) == 3
        assert capsys.readouterr().out == "hello ['greet', '--loud']\n"
        assert main(["gret"]) == 1
        assert "Did you mean 'greet'" in capsys.readouterr().err

    def test_take_options_first_where_they_say_so(self, polite, capsys):
        assert main(["--config", "x", "first"]) == 3
        assert capsys.readouterr().out == "hello ['--config', 'x', 'first']\n"

    def test_a_library_that_is_missing_is_named_with_what_to_install(self, polite, capsys):
        assert main(["lack"]) == 1
        expected = "error: this command needs no_such_library. Run: pip install 'polite[library]'\n"
        assert capsys.readouterr().err == expected
        with pytest.raises(ModuleNotFoundError, match="no_such_library"):
            main(["stumble"])

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            ("ConfigError('it cannot be')", "it cannot be"),
            ("OSError(28, 'full', 'it')", f"{os.strerror(28)} for it. Make room, or name a place on another disk."),
        ],
        ids=["ours", "a full disk"],
    )
    def test_notes_of_an_error_are_told(self, distribution, capsys, error, told):
        text = f"""
            from lora_plugins.cli import Command
            from lora_plugins import ConfigError

            def run(arguments):
                error = {error}
                error.add_note("It happened on a copy.")
                raise error

            COMMANDS = {{"stumble": Command("", run)}}
        """
        mine = textwrap.dedent(text)
        distribution("noting", "[lora_plugins.commands]\nit = commands_of_noting:COMMANDS\n", commands_of_noting=mine)
        assert main(["stumble"]) == 1
        assert capsys.readouterr().err == f"error: {told}\nIt happened on a copy.\n"

    def test_an_error_while_another_was_handled_is_told_itself(self, distribution):
        text = """
            from lora_plugins.cli import Command
            from lora_plugins import ConfigError

            def run(arguments):
                try:
                    raise ConfigError("it was handled")
                except ConfigError:
                    return {}["what is wrong"]

            COMMANDS = {"stumble": Command("", run)}
        """
        mine = textwrap.dedent(text)
        distribution("clumsy", "[lora_plugins.commands]\nit = commands_of_clumsy:COMMANDS\n", commands_of_clumsy=mine)
        with pytest.raises(KeyError, match="what is wrong"):
            main(["stumble"])

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
            ("COMMANDS = {'greet': print}", "TypeError: it is not a mapping of names to lora_plugins.cli.Command"),
            ("", "AttributeError: module 'commands_of_rude' has no attribute 'COMMANDS'"),
            ("raise SystemExit('needs a card')", "SystemExit: needs a card"),
        ],
        ids=["import", "type", "name", "exit"],
    )
    def test_a_table_that_fails_stops_no_other_command(self, distribution, capsys, text, reason):
        distribution("rude", "[lora_plugins.commands]\nrude = commands_of_rude:COMMANDS\n", commands_of_rude=text)
        said = f"warning: The commands 'rude' of rude 1.5 cannot be loaded: {reason}\n"
        assert main(["plugins"]) == 0
        assert capsys.readouterr().err == ""
        assert main([]) == 0
        assert capsys.readouterr() == (OVERVIEW, said)
        assert main(["greet"]) == 1
        assert capsys.readouterr().err.startswith(f"{said}error: there is no command 'greet'.")
        main(["doctor"])
        assert f"[problem] {said.removeprefix('warning: ')}" in capsys.readouterr().out

    def test_a_name_that_is_taken_stays_with_its_owner(self, distribution, capsys):
        text = "from lora_plugins.cli import Command\nCOMMANDS = {n: Command('', print) for n in ('fit', 'doctor')}"
        distribution("greedy", "[lora_plugins.commands]\nit = commands_of_greedy:COMMANDS\n", commands_of_greedy=text)
        assert main([]) == 0
        out, err = capsys.readouterr()
        assert out == OVERVIEW
        owners = {"fit": f"lora-plugins {metadata.version('lora-plugins')}", "doctor": "lora-plugins"}
        assert err == "".join(
            f"warning: The command {name!r} of greedy 1.5 is left out: {owner} has one of that name.\n"
            for name, owner in owners.items()
        )


def script(name: str) -> list[str]:
    return [str(Path(sys.executable).with_name(name))]


@pytest.mark.parametrize(
    "command",
    [
        script("lightning"),
        script("lora-plugins"),
        [sys.executable, "-m", "lora_plugins"],
        [sys.executable, "-m", "lora_plugins.integrations.lightning"],
    ],
    ids=["lightning", "lora-plugins", "python-m", "python-m-integration"],
)
def test_promised_spellings(command):
    """What the commands do is covered elsewhere; each spelling has to reach the same main."""
    done = subprocess.run([*command, "plugins"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "lora-plugins" in done.stdout


class TestPlaces:
    """What the system has against a place is a line, whichever command looks there."""

    def test_a_name_that_is_too_long(self, capsys, monkeypatch):
        name = "x" * 300
        assert main(["inspect", name]) == 1
        assert capsys.readouterr().err == f"error: File name too long for {name}. Name a shorter one.\n"
        monkeypatch.setenv("LORA_PLUGINS_TRACEBACK", "1")
        with pytest.raises(OSError, match="File name too long"):
            main(["inspect", name])

    @pytest.mark.parametrize(
        "arguments",
        [
            pytest.param(["inspect", "closed/it"], id="inspect"),
            pytest.param(["convert", "closed/it", "out", "--to", "peft"], id="convert", marks=pytest.mark.slow),
        ],
    )
    def test_a_place_that_may_not_be_read(self, tmp_path, arguments):
        without_rights = []
        if os.geteuid() == 0:  # who may read everything
            if shutil.which("setpriv") is None:
                pytest.skip("the tests run as root, and there is no setpriv")
            without_rights = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
        (tmp_path / "closed").mkdir(0)
        command = [*without_rights, sys.executable, "-m", "lora_plugins", *arguments]
        ran = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
        (tmp_path / "closed").chmod(0o700)
        said = "error: Permission denied for closed/it. Name another place, or ask for the right to it.\n"
        assert (ran.returncode, ran.stderr) == (1, said)


class TestCoreAlone:
    """Nothing that only extras bring can be imported."""

    ABSENT = (
        *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"),
        *("jsonargparse", "rich", "yaml", "timm", "torchvision", "transformers", "PIL", "matplotlib", "sklearn"),
    )

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["plugins"], "Plugins of lora_plugins"),
            (["doctor"], "found."),
            (["new-plugin", "mine"], "Wrote lora-plugins-mine"),
            (["--help"], OVERVIEW),
            (["new-plugin", "--help"], "usage: lora-plugins new-plugin"),
        ],
        ids=" ".join,
    )
    def test_commands_of_the_core_run(self, tmp_path, arguments, words):
        done = without(self.ABSENT, f"sys.exit(main({arguments!r}))", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert words in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "extra"),
        [
            (["fit"], "lightning"),
            (["plan"], "lightning"),
            (["merge", "adapter", "x.ckpt", "--model", "some.Class"], "lightning"),
            (["--config", "x"], "lightning"),
            (["train", "photos"], "vision"),
            (["predict", "adapter", "photos"], "vision"),
            (["export", "adapter", "x.onnx"], "vision"),
        ],
        ids=lambda each: " ".join(each) if isinstance(each, list) else "",
    )
    def test_commands_of_extras_say_what_to_install(self, tmp_path, arguments, extra):
        (tmp_path / "adapter").mkdir()
        done = without(self.ABSENT, f"sys.exit(main({arguments!r}))", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: this command needs ")
        assert done.stderr.endswith(f". Run: pip install 'lora-plugins[{extra}]'\n")

    def test_that_check_can_fail(self):
        assert "No module named 'torch'" in without(("torch",), "main(['doctor'])").stderr
