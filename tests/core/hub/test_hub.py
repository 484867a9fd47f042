"""Adapters on the Hub: the real client, against a small server on the loopback.

The client reads where the Hub is when it is imported, so each script runs in a process of its own.
"""

import textwrap

import pytest
from torch import nn

from lora_plugins import ConfigError, LoraConfig, LoraModel
from lora_plugins.hub.download import Location
from tests.core.hub.fresh_process import run_fresh
from tests.core.hub.server import running_hub

pytest.importorskip("huggingface_hub")

NET = """
import torch
from torch import nn
from lora_plugins import AdapterFileError, LoraConfig, LoraModel

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()

def adapted():
    lora = LoraModel(build(), LoraConfig(r=2, alpha=3.0, target_modules=["0"], modules_to_save=["2"], init="none"))
    with torch.no_grad():
        lora.model[2].bias.add_(1)
    return lora

X = torch.linspace(-1, 1, 12).view(3, 4)
EXPECTED = adapted().model(X)

def check(model):
    torch.testing.assert_close(model(X), EXPECTED, rtol=0, atol=0)
"""


@pytest.fixture
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script with the client set to the server; returns the process that is done."""

    def run_script(script, **variables):
        environment = {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_of_the_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **variables,
        }
        return run_fresh(NET + textwrap.dedent(script), tmp_path, environment)

    return run_script


def written(folder, **options):
    """The files of an adapter of the scripts' own network, by path."""
    scope = {}
    exec(NET, scope)
    scope["adapted"]().save_adapter(folder, **options)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestLoading:
    @pytest.mark.parametrize("name", ["lora_plugins", "peft"])
    def test_a_repository(self, name, hub, run, tmp_path):
        files = written(tmp_path / "a", format=name)
        hub.repositories["owner/name"] = {"main": {**files, "model.safetensors": b"a large base", "README.md": b""}}
        done = run(
            """
            model = build()
            LoraModel.load_adapter(model, "hf://owner/name")
            check(model)
            """
        )
        assert done.returncode == 0, done.stderr
        fetched = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
        assert fetched == set(files)  # and not what else is in the repository

    def test_a_revision(self, hub, run, tmp_path):
        files = written(tmp_path / "a")
        hub.repositories["owner/name"] = {"main": {}, "v1.0": files}
        done = run(
            """
            check(LoraModel.load_adapter(build(), "hf://owner/name@v1.0").model)
            try:
                LoraModel.load_adapter(build(), "hf://owner/name@v2")
            except AdapterFileError as error:
                print(error)
            """
        )
        assert done.returncode == 0, done.stderr
        assert "RevisionNotFoundError" in done.stdout
        assert "hf auth login" in done.stdout

    def test_folders_and_a_file_in_a_repository(self, hub, run, tmp_path):
        adapter = written(tmp_path / "a", format="peft")
        files = {f"{folder}/{path}": data for folder in ("night", "night-v1.5") for path, data in adapter.items()}
        scope = {}
        exec(NET, scope)
        lora = LoraModel(scope["build"](), LoraConfig(r=2, target_modules=["0"], init="none"))
        style = lora.save_adapter(tmp_path / "s.safetensors", format="kohya", format_options={"component": "unet"})
        hub.repositories["owner/name"] = {"main": {**files, "styles/My style (v1) [2].safetensors": style.read_bytes()}}
        done = run(
            """
            check(LoraModel.load_adapter(build(), "hf://owner/name/night").model)
            check(LoraModel.load_adapter(build(), "hf://owner/name/night-v1.5").model)
            lora = LoraModel.load_adapter(build(), "hf://owner/name/styles/My style (v1) [2].safetensors")
            assert lora.plans["default"].layers[0].name == "0"
            """
        )
        assert done.returncode == 0, done.stderr

    def test_what_was_downloaded_is_there_without_a_network(self, hub, run, tmp_path):
        hub.repositories["owner/name"] = {"main": written(tmp_path / "a")}
        script = 'check(LoraModel.load_adapter(build(), "hf://owner/name").model)'
        assert run(script).returncode == 0
        asked = len(hub.asked)
        assert run(script, HF_HUB_OFFLINE="1").returncode == 0
        assert len(hub.asked) == asked

    def test_no_repository(self, run):
        done = run(
            """
            model = build()
            try:
                LoraModel.load_adapter(model, "hf://owner/nothing")
            except AdapterFileError as error:
                print(error)
            assert not any("lora" in name for name, _ in model.named_parameters())
            """
        )
        assert "Downloading 'hf://owner/nothing' is not possible: RepositoryNotFoundError" in done.stdout, done.stderr

    def test_no_such_path(self, hub, run, tmp_path):
        hub.repositories["owner/name"] = {"main": written(tmp_path / "a")}
        paths = ["day", "day.safetensors", "night/s.safetensors"]
        done = run(
            f"""
            for path in {paths}:
                try:
                    LoraModel.load_adapter(build(), f"hf://owner/name/{{path}}")
                except AdapterFileError as error:
                    print(error)
            """
        )
        for path in paths:
            said = f"'hf://owner/name/{path}' is no file, and no folder with files of an adapter"
            assert said in done.stdout, done.stderr

    def test_by_the_commands(self, hub, run, tmp_path):
        hub.repositories["owner/name"] = {"main": written(tmp_path / "a", format="peft")}
        done = run(
            """
            from lora_plugins.cli.main import main
            assert main(["inspect", "hf://owner/name"]) == 0
            assert main(["convert", "hf://owner/name", "converted", "--to", "peft"]) == 0
            check(LoraModel.load_adapter(build(), "converted").model)
            """
        )
        assert done.returncode == 0, done.stderr
        assert "format: peft" in done.stdout


class TestPushing:
    def test_what_is_pushed_is_loaded(self, hub, run):
        done = run(
            """
            address = adapted().push_to_hub(
                "owner/new", base_model="owner/base", license="apache-2.0", metrics={"accuracy": 0.9731},
                description="Digits, a quarter turned.", message="The first one",
            )
            print(address)
            check(LoraModel.load_adapter(build(), "hf://owner/new").model)
            """
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{hub.address}/owner/new/commit/")
        assert hub.messages == ["The first one"]
        card = hub.repositories["owner/new"]["main"]["README.md"].decode()
        for part in (
            "base_model: owner/base",
            "license: apache-2.0",
            "- lora_plugins",
            "# new",
            "Digits, a quarter turned.",
            'LoraModel.load_adapter(model, "hf://owner/new")',
            "lora-plugins convert hf://owner/new converted --to peft",
            "merge_and_unload()",
            "| accuracy | 0.9731 |",
            "| `0` | 2 | 3 | 20 |",
            "Trained in full: `2.bias`, `2.weight`.",
        ):
            assert part in card, card

    def test_the_next_one_replaces_the_files_of_the_former(self, hub, run):
        """A file of tensors has the name of its contents; what others put there stays."""
        done = run(
            """
            lora = adapted()
            lora.push_to_hub("owner/new")
            lora.push_to_hub("owner/new")
            """
        )
        assert done.returncode == 0, done.stderr
        files = hub.repositories["owner/new"]["main"]
        former = next(name for name in files if name.endswith(".safetensors"))
        others = {"adapter-old/adapter.safetensors": b"1", "adapter-b.safetensors": b"2"}
        files |= others
        done = run(
            """
            lora = adapted()
            with torch.no_grad():
                lora.model[0].lora_B["default"].add_(1)
            lora.push_to_hub("owner/new")
            LoraModel.load_adapter(build(), "hf://owner/new")
            """
        )
        assert done.returncode == 0, done.stderr
        files = hub.repositories["owner/new"]["main"]
        assert former not in files
        assert others.items() <= files.items()
        assert len([name for name in files if name.endswith(".safetensors")]) == 3

    def test_in_the_format_of_peft(self, hub, run):
        pytest.importorskip("peft")
        done = run('adapted().push_to_hub("owner/new", format="peft")')
        assert done.returncode == 0, done.stderr
        files = hub.repositories["owner/new"]["main"]
        assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert b'PeftModel.from_pretrained(model, "owner/new")' in files["README.md"]
        assert b"library_name: peft" in files["README.md"]

    def test_what_cannot_be_written_is_not_pushed(self, hub, run):
        done = run(
            """
            try:
                adapted().push_to_hub("owner/new", format="kohya", format_options={"component": "unet"})
            except AdapterFileError as error:
                print(error)
            """
        )
        assert "what is trained in full has no form there" in done.stdout, done.stderr
        assert hub.repositories == {}


class TestLocations:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hf://a/b", Location("a/b")),
            ("hf://a/b@main", Location("a/b", "", "main")),
            ("hf://a/b/c/d.safetensors@refs/pr/1", Location("a/b", "c/d.safetensors", "refs/pr/1")),
            ("hf://a-1/b_2.c", Location("a-1/b_2.c")),
            ("hf://a/b/My style (v1) [é]/_s.safetensors@v1", Location("a/b", "My style (v1) [é]/_s.safetensors", "v1")),
        ],
    )
    def test_what_they_say(self, text, expected):
        assert Location.of(text) == expected

    @pytest.mark.parametrize(
        "text", ["hf://", "hf://a", "hf://a/../../b", "hf://a/b@", "hf:///a/b", "hf://a/b/../c", "hf://a/b/c:/d"]
    )
    def test_what_is_none(self, text):
        with pytest.raises(ConfigError, match="is no place on the Hub"):
            LoraModel.load_adapter(nn.Linear(2, 2), text)


def test_without_the_client_it_is_said_what_to_install(run, tmp_path):
    (tmp_path / "huggingface_hub.py").write_text("raise ImportError('not there')")
    done = run(
        """
        import sys
        from lora_plugins import ConfigError
        sys.path.insert(0, ".")
        try:
            LoraModel.load_adapter(build(), "hf://owner/name")
        except ConfigError as error:
            print(error)
        """
    )
    assert "pip install 'lora-plugins[hub]'" in done.stdout, done.stderr


def test_a_local_folder_needs_no_client(tmp_path):
    written(tmp_path / "a")
    code = NET + f"check(LoraModel.load_adapter(build(), {str(tmp_path / 'a')!r}).model)\nimport sys\n"
    code += "assert 'huggingface_hub' not in sys.modules"
    assert run_fresh(code, tmp_path, {}).returncode == 0
