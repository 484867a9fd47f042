"""Runs of `lora-plugins train` that go on at the same time, each in a folder of its own."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_plugins import ConfigError
from lora_plugins.cli.main import main
from lora_plugins.tasks.autoconfig.run_folder import folders, held

from ..conftest import noise, write_image


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        write_image(tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number}.jpg", noise(32, 32, seed=number))
    return tmp_path / "photos"


def first_free(photos):
    with held(folders(None, photos)) as out:
        return out


def test_runs_at_the_same_time_have_folders_of_their_own(photos):
    with held(folders(None, photos)) as first, held(folders(None, photos)) as second:
        assert [first, second] == [Path("runs/photos"), Path("runs/photos-2")]
        assert first_free(photos) == Path("runs/photos-3")
    assert first_free(photos) == Path("runs/photos")


def test_it_has_the_name_of_the_data(tmp_path):
    (tmp_path / "photos.v2").mkdir()
    (tmp_path / "list.csv").touch()
    found = [first_free(tmp_path / name) for name in ("photos.v2", "list.csv")]
    assert found == [Path("runs/photos.v2"), Path("runs/list")]


def test_names_that_a_logger_takes_for_variables_of_the_shell(tmp_path, monkeypatch):
    """Of `runs/$SET`, the log would lie in another folder than the rest."""
    monkeypatch.setenv("SET", "elsewhere")
    monkeypatch.delenv("UNSET", raising=False)
    for name in ("a $SET", "$UNSET"):
        (tmp_path / name).mkdir()
    assert first_free(tmp_path / "a $SET") == Path("runs/a _SET")
    assert first_free(tmp_path / "$UNSET") == Path("runs/$UNSET")
    named = folders(Path("$SET/run"), tmp_path / "$UNSET")
    with pytest.raises(ConfigError, match=r"\$SET/run holds .* into elsewhere/run\. Name another"), held(named):
        pass
    assert not Path("$SET").exists()


def test_one_with_results_stays(photos):
    with held(folders(None, photos)) as out:
        (out / "adapter").mkdir()
    assert first_free(photos) == Path("runs/photos-2")
    with pytest.raises(ConfigError, match="there are results already"), held(folders(Path("runs/photos"), photos)):
        pass


def test_results_that_came_since_it_was_chosen(photos):
    """Another run ends after a folder was found to be free, and before it is locked."""
    tried = list(folders(None, photos))[:2]
    with held(tried) as out:
        (out / "merged.safetensors").touch()
    with held(tried) as out:
        assert out == Path("runs/photos-2")


def test_the_named_one_is_refused_by_the_command_while_a_run_goes_on_there(capsys):
    with held([Path("mine")]):
        (Path("mine") / "train.yaml").write_text("of the first run")
        assert main(["train", "photos", "--out", "mine", "--device", "cpu"]) == 1
        assert "--out is mine, where another run is going on. Name a new folder." in capsys.readouterr().err
        assert (Path("mine") / "train.yaml").read_text() == "of the first run"


def _hold(entered, path):
    with held([path]):
        entered.set()
        signal.pause()


@pytest.mark.slow
def test_a_killed_run_does_not_keep_its_folder(photos):
    context = multiprocessing.get_context("spawn")
    entered = context.Event()
    process = context.Process(target=_hold, args=(entered, Path("runs/photos")))
    process.start()
    assert entered.wait(100)
    assert first_free(photos) == Path("runs/photos-2")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert first_free(photos) == Path("runs/photos")


def test_what_a_killed_run_was_writing_does_not_keep_a_named_folder(photos, tmp_path):
    (out := tmp_path / "out").mkdir()
    for name in ("train.yaml", ".lock", ".merged.safetensors.0a1b2c3d-123-4e5f6a7b", ".DS_Store"):
        (out / name).touch()
    with held(folders(out, photos)) as given:
        assert given == out


def test_a_disk_without_locks_is_trained_on_all_the_same(photos, monkeypatch):
    def refused(lock, **_):
        Path(lock.lock_file).touch()
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("lora_plugins.tasks.autoconfig.run_folder.FileLock.acquire", refused)
    assert first_free(photos) == Path("runs/photos")
    assert not Path("runs").exists()


def test_nothing_is_left_of_a_run_that_could_not_begin(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["train", "empty"]) == 1
    assert "holds no images" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_named_folder_that_was_there_stays(tmp_path):
    (out := tmp_path / "out").mkdir()
    assert main(["train", "nowhere", "--out", str(out)]) == 1
    assert not [*out.iterdir()]


@pytest.mark.slow
def test_processes_of_one_run_have_one_folder(photos):
    """Lightning starts the second by the arguments of the first, when that has its folder already."""
    two = {"PL_TRAINER_DEVICES": "2", "PL_TRAINER_STRATEGY": "ddp", "OMP_NUM_THREADS": "1"}
    with held(folders(None, photos)):
        subprocess.run(
            [sys.executable, "-m", "lora_plugins", "train", "photos", "--epochs", "1", "--device", "cpu"],
            env=os.environ | two,
            check=True,
        )
    assert {path.name for path in Path("runs").iterdir()} == {"photos-2"}
    assert (Path("runs") / "photos-2" / "adapter").is_dir()
