"""The command `serve`: what it refuses before anything is served."""

from lora_plugins.cli.main import main


def test_the_command_names_a_missing_folder(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 1
    assert "There is no folder" in capsys.readouterr().err


def test_a_folder_without_adapters_is_not_served(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    assert main(["serve", str(tmp_path)]) == 1
    assert f"There is no adapter in {tmp_path}" in capsys.readouterr().err
