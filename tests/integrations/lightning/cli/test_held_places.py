"""Places of results that one run holds; what the command says of a place that another run has: `test_lora_cli`."""

import pytest
from filelock import FileLock

from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning.cli.held_places import held


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file").touch()
    return {"beside no file": [tmp_path / "file" / "adapter"], "twice": [tmp_path / "adapter", tmp_path / "adapter"]}


@pytest.mark.parametrize("kind", ["beside no file", "twice"])
def test_what_is_for_the_callback_to_refuse_is_left_to_it(places, tmp_path, kind):
    with held(map(str, places[kind])):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_lock_that_cannot_be_opened_stays_with_its_run(tmp_path, monkeypatch):
    """That of another user, in a folder that both may write."""

    def refused(*_, **__):
        raise PermissionError

    (theirs := tmp_path / ".adapter.lock").touch()
    monkeypatch.setattr(FileLock, "acquire", refused)
    with held([str(tmp_path / "adapter")]):
        pass
    assert theirs.exists()


def test_two_results_in_one_place_are_not_said_to_be_of_two_runs(config, tmp_path, capsys):
    mine = {"config": {"r": 2}, "adapter_name": "b", "merge_on_fit_end": False, "save_adapter_to": str(tmp_path / "a")}
    callbacks = [{"class_path": "lora_plugins.integrations.lightning.LoraCallback", "init_args": mine}]
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    changes = {"trainer": {**options, "callbacks": callbacks}, "optimizer": None, "lr_scheduler": None}
    path = config(lora_callback={"save_adapter_to": mine["save_adapter_to"]}, **changes)
    assert main(["fit", "--config", path]) == 1
    assert f"Two results of a run would be written to {tmp_path / 'a'}" in capsys.readouterr().err
