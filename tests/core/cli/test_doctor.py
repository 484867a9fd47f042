"""`lora-plugins doctor` and `lora-plugins plugins`: what they find, and what they say to do."""

import importlib
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lora_plugins.cli.main import main
from lora_plugins.kernels import DISABLE_VARIABLE, disabled_kernels, kernel_report
from lora_plugins.plugins import LOAD_VARIABLE, default_registry
from tests.core.processes import run_python

BROKEN = "import no_such_library\n"
WORKING = """
from lora_plugins import InitPlugin, hookimpl
class Mine(InitPlugin):
    name = {name!r}
    def fill(self, context):
        context.A.zero_(); context.B.zero_()
        return {{}}
@hookimpl
def lora_plugins_register_inits(registrar):
    registrar.add(Mine(), override={override})
"""


@pytest.fixture(autouse=True)
def fresh_registry():
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


@pytest.fixture
def plugin_of(distribution):
    """Puts a distribution with one plugin, or one of another group, on the path of this test."""

    def make(name, text, group="lora_plugins"):
        distribution(name, f"[{group}]\nof_{name} = plugin_of_{name}\n", **{f"plugin_of_{name}": text})

    return make


def doctor(capsys):
    code = main(["doctor"])
    return code, capsys.readouterr().out


class TestDoctor:
    def test_a_checkout_that_is_imported_but_not_installed(self, capsys, monkeypatch):
        importlib.import_module("lora_plugins.cli.doctor")  # what it imports is not found below
        monkeypatch.setattr(sys, "path", [])  # nothing that is installed is found; what is imported stays
        assert main(["doctor"]) == 1
        assert "lora-plugins is not installed, so that none of its plugins is found" in capsys.readouterr().err

    def test_versions_and_extras_are_listed(self, capsys):
        _, out = doctor(capsys)
        for words in (
            f"lora_plugins {metadata.version('lora-plugins')}",
            "torch",
            "extra 'lightning'",
            "extra 'vision'",
        ):
            assert words in out

    def test_this_installation_has_no_problem_of_its_own(self, capsys):
        assert "lora-plugins itself" not in doctor(capsys)[1]

    def test_stale_metadata_are_a_problem_with_a_way_out(self, capsys, tmp_path, monkeypatch):
        """As after an upgrade of a checkout that was not installed again."""
        info = tmp_path / "lora_plugins-0.0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-plugins\nVersion: 0.0.1\n")
        monkeypatch.syspath_prepend(tmp_path)
        code, out = doctor(capsys)
        assert code == 1
        lacking = "'formats', 'inits', 'layers', 'storages', 'variants', 'lora_plugins.commands'"
        assert f"[problem] lora-plugins itself lacks the entry points {lacking}" in out
        assert "pip install --force-reinstall --no-deps lora-plugins" in out

    def test_kernels_are_listed_with_the_reason(self, capsys):
        statuses = kernel_report()
        with disabled_kernels(statuses[0].name):
            _, out = doctor(capsys)
        wanted = {s.name: "yes" if s.used else f"no, because {s.reason}" for s in statuses}
        wanted[statuses[0].name] = "no, because switched off by disabled_kernels"
        lines = [line for line in out.splitlines() if "] kernel " in line]
        for line, status in zip(lines, statuses, strict=True):
            assert f"kernel {status.name} ({', '.join(status.operations)})" in line
            assert line.endswith(f"used here: {wanted[status.name]}")

    def test_a_kernel_that_does_not_exist_is_a_problem(self):
        done = run_python("-m", "lora_plugins", "doctor", **{DISABLE_VARIABLE: "fused_conf"})
        assert done.returncode == 1
        assert f"[problem] {DISABLE_VARIABLE} names 'fused_conf', which is not a kernel." in done.stdout
        assert f"Correct {DISABLE_VARIABLE}" in done.stdout

    def test_a_healthy_plugin_is_no_problem(self, capsys, plugin_of):
        plugin_of("good", WORKING.format(name="mine", override=False))
        _, out = doctor(capsys)
        assert "[ok] plugin 'of_good' of good 1.5: provides mine" in out

    def test_a_broken_plugin_is_a_problem_with_a_way_out(self, capsys, plugin_of):
        plugin_of("bad", BROKEN)
        code, out = doctor(capsys)
        assert code == 1
        assert "[problem] plugin 'of_bad' of bad 1.5 failed: ModuleNotFoundError" in out
        assert "plugin_of_bad.py, line 1" in out
        assert "LORA_PLUGINS_BLOCK=of_bad" in out

    @pytest.mark.parametrize(
        ("group", "meant"),
        [
            ("lora_plugin", "lora_plugins"),
            ("lora-plugins", "lora_plugins"),
            ("lora_plugins.command", "lora_plugins.commands"),
        ],
    )
    def test_a_group_that_is_called_nearly_as_ours_is_noted(self, capsys, plugin_of, group, meant):
        plugin_of("lost", WORKING.format(name="mine", override=False), group)
        _, out = doctor(capsys)
        assert f"[note] the entry point 'of_lost' of lost is in the group {group!r}, which is not ours" in out
        assert f"-> If it is a plugin, call the group {meant!r} and install it again." in out

    @pytest.mark.parametrize("group", ["lora", "pytest11", "other_plugins"])
    def test_groups_of_others_are_not_noted(self, capsys, plugin_of, group):
        plugin_of("other", "", group)
        _, out = doctor(capsys)
        assert "of_other" not in out

    @pytest.mark.parametrize("text", ["", "def x(:"], ids=["no hook", "no Python"])
    def test_where_it_broke_is_said_only_if_that_is_a_line_of_it(self, capsys, plugin_of, text):
        plugin_of("bad", text)
        _, out = doctor(capsys)
        (line,) = [line for line in out.splitlines() if "'of_bad' of bad 1.5 failed" in line]
        assert not any(of_others in line for of_others in ("manager.py", "<frozen"))

    def test_the_way_out_works_and_is_noted(self, capsys, plugin_of, monkeypatch):
        plugin_of("bad", BROKEN)
        monkeypatch.setenv("LORA_PLUGINS_BLOCK", "of_bad,of_bat")
        _, out = doctor(capsys)
        assert "[note] plugin 'of_bad' of bad 1.5: blocked by LORA_PLUGINS_BLOCK" in out
        assert "LORA_PLUGINS_BLOCK names 'of_bat', which is not installed" in out
        assert "Did you mean 'of_bad'" in out

    def test_a_clash_is_a_problem_that_names_both(self, capsys, plugin_of):
        plugin_of("rival", WORKING.format(name="kaiming", override=False))
        code, out = doctor(capsys)
        assert code == 1
        assert "[problem] Two plugins own the init 'kaiming'" in out
        assert "rival 1.5" in out

    @pytest.mark.parametrize(
        ("file", "found"),
        [("broken.py", "No module named 'no_such_library' ({}, line 1)\n"), ("gone.py", "{} does not exist.")],
        ids=["broken", "missing"],
    )
    def test_a_file_that_fails_is_a_problem_with_a_way_out(self, capsys, monkeypatch, tmp_path, file, found):
        (tmp_path / "broken.py").write_text(BROKEN)
        monkeypatch.setenv(LOAD_VARIABLE, str(tmp_path / file))
        code, out = doctor(capsys)
        assert code == 1
        assert found.format(tmp_path / file) in out
        assert f"-> Repair that file, or correct {LOAD_VARIABLE}, which names it; until then nothing" in out
        assert "said above" not in out

    def test_plugins_lists_all_and_every_clash(self, capsys, plugin_of):
        plugin_of("rival", WORKING.format(name="kaiming", override=False))
        plugin_of("other", WORKING.format(name="gaussian", override=False))
        assert main(["plugins"]) == 1
        out, error = capsys.readouterr()
        assert "of_rival" in out
        assert "of_other" in out
        assert "init 'kaiming'" in error
        assert "init 'gaussian'" in error

    def test_a_replacement_is_noted(self, capsys, plugin_of):
        plugin_of("better", WORKING.format(name="kaiming", override=True))
        _, out = doctor(capsys)
        assert "replaces init 'kaiming' of 'inits' of lora-plugins" in out
        assert "its init 'kaiming' is replaced by 'of_better' of better 1.5" in out

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("from lora_plugins.cli.main import main", "is ours"),
            ("from foreign_cli import main", "is not ours, but that of foreign-sdk"),
        ],
        ids=["ours", "foreign"],
    )
    def test_who_owns_the_lightning_command(self, capsys, tmp_path, monkeypatch, content, words):
        script = tmp_path / "lightning"
        script.write_text(f"#!{sys.executable}\n{content}\n")
        script.chmod(0o755)
        info = tmp_path / "foreign_sdk-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-sdk\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[console_scripts]\nlightning = foreign_cli:main\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("PATH", str(tmp_path))
        _, out = doctor(capsys)
        assert words in out
        assert "foreign-sdk" in out

    def test_a_lightning_command_that_cannot_be_read_is_not_ours(self, capsys, tmp_path, monkeypatch):
        script, read_bytes = tmp_path / "lightning", Path.read_bytes
        script.touch(0o711)

        def read(path):
            if path == script:
                raise PermissionError(13, "Permission denied", str(path))
            return read_bytes(path)

        monkeypatch.setattr(Path, "read_bytes", read)  # root can read it
        monkeypatch.setenv("PATH", str(tmp_path))
        _, out = doctor(capsys)
        assert f"the command `lightning` ({script}) is not ours" in out
        assert "found." in out.splitlines()[-1]

    def test_no_lightning_command(self, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "there is no command `lightning` on the PATH" in doctor(capsys)[1]

    @pytest.mark.parametrize("version", [None, "0.1"], ids=["missing", "too old"])
    def test_an_optional_package(self, capsys, tmp_path, monkeypatch, version):
        found = metadata.version

        def seen(name):
            if name != "timm":
                return found(name)
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(metadata, "version", seen)
        _, out = doctor(capsys)
        assert ("timm>=1.0.20 (0.1 is installed)" if version else "timm>=1.0.20 (not installed)") in out
        assert "pip install 'lora-plugins[vision]'" in out


class TestPlugins:
    def test_each_has_distribution_version_provisions_and_state(self, capsys, plugin_of):
        plugin_of("good", WORKING.format(name="mine", override=False))
        plugin_of("bad", BROKEN)
        assert main(["plugins"]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[2:] if line[:1].strip()}
        assert lines["of_good"].split() == ["of_good", "good", "1.5", "init", "mine", "loaded"]
        assert "failed: ModuleNotFoundError: No module named 'no_such_library'" in lines["of_bad"]

    def test_the_core_alone_is_enough(self, tmp_path):
        absent = ("lightning", "jsonargparse", "rich", "yaml")
        code = (
            f"import sys; [sys.modules.__setitem__(name, None) for name in {absent!r}]\n"
            "from lora_plugins.cli.main import main\n"
            "assert main(['plugins']) == 0\n"
            "main(['doctor'])\n"
            "main(['new-plugin', 'mine'])\n"
        )
        done = run_python("-c", code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for words in ("Plugins of lora_plugins", "problems found", "Wrote lora-plugins-mine"):
            assert words in done.stdout


class TestTraceback:
    def test_a_failed_plugin_that_is_asked_for_shows_its_own(self, tmp_path):
        (tmp_path / "mine.py").write_text("def start():\n    import no_such_library\nstart()\n")
        done = run_python("-m", "lora_plugins", "plugins", LORA_PLUGINS_LOAD=str(tmp_path / "mine.py"))
        assert done.returncode == 1
        assert "line 2, in start" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: Plugin 'mine' of ")
